"""Where an instance stands: what its caller is told, its steps, and the legal moves between them."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class Status(StrEnum):
    """What a caller is told of an instance (Supplier API, ``GET /v1/instances/{id}``)."""

    CREATING = "creating"
    RUNNING = "running"
    STOPPING = "stopping"
    TERMINATED = "terminated"
    ERROR = "error"


LEGAL_STATUS: Final[dict[Status, frozenset[Status]]] = {
    Status.CREATING: frozenset({Status.RUNNING, Status.STOPPING, Status.ERROR}),
    Status.RUNNING: frozenset({Status.STOPPING, Status.ERROR}),
    Status.ERROR: frozenset({Status.STOPPING, Status.TERMINATED}),
    Status.STOPPING: frozenset({Status.TERMINATED}),
    Status.TERMINATED: frozenset(),
}
"""From each status, those that may follow. No status goes backwards."""


class Step(StrEnum):
    """Where an instance's life stands. Each names the act that is under way or to be repeated."""

    LEASE_ADDRESS = "lease_address"
    CLONE_DISK = "clone_disk"
    WRITE_SEED = "write_seed"
    CHECK_GPUS = "check_gpus"
    BIND_GPUS = "bind_gpus"
    START_DOMAIN = "start_domain"
    AWAIT_READY = "await_ready"
    RUNNING = "running"
    STOP_DOMAIN = "stop_domain"
    REMOVE_FILES = "remove_files"
    RETURN_ADDRESS = "return_address"
    CLEAN_GPUS = "clean_gpus"
    RETURN_GPUS = "return_gpus"
    ENDED = "ended"


RELEASE_STEPS: Final = frozenset(
    {
        Step.STOP_DOMAIN,
        Step.REMOVE_FILES,
        Step.RETURN_ADDRESS,
        Step.CLEAN_GPUS,
        Step.RETURN_GPUS,
    }
)
"""Steps that give things back; DELETE has nothing left to pre-empt in them."""

FIRST_STEP: Final = Step.LEASE_ADDRESS
FIRST_RELEASE_STEP: Final = Step.STOP_DOMAIN

LEGAL_STEPS: Final[dict[Step, frozenset[Step]]] = {
    Step.LEASE_ADDRESS: frozenset({Step.CLONE_DISK, Step.STOP_DOMAIN}),
    Step.CLONE_DISK: frozenset({Step.WRITE_SEED, Step.STOP_DOMAIN}),
    Step.WRITE_SEED: frozenset({Step.CHECK_GPUS, Step.STOP_DOMAIN}),
    Step.CHECK_GPUS: frozenset({Step.BIND_GPUS, Step.STOP_DOMAIN}),
    # A guest that ended is started again. A reboot of the host gives its GPUs back to their drivers, in
    # whichever step it comes.
    Step.BIND_GPUS: frozenset({Step.START_DOMAIN, Step.CHECK_GPUS, Step.STOP_DOMAIN}),
    Step.START_DOMAIN: frozenset({Step.AWAIT_READY, Step.CHECK_GPUS, Step.STOP_DOMAIN}),
    Step.AWAIT_READY: frozenset({Step.RUNNING, Step.CHECK_GPUS, Step.STOP_DOMAIN}),
    Step.RUNNING: frozenset({Step.CHECK_GPUS, Step.STOP_DOMAIN}),
    Step.STOP_DOMAIN: frozenset({Step.REMOVE_FILES}),
    Step.REMOVE_FILES: frozenset({Step.RETURN_ADDRESS}),
    Step.RETURN_ADDRESS: frozenset({Step.CLEAN_GPUS}),
    Step.CLEAN_GPUS: frozenset({Step.RETURN_GPUS}),
    Step.RETURN_GPUS: frozenset({Step.ENDED}),
    Step.ENDED: frozenset(),
}
"""From each step, those that may follow. A failed create walks the release steps like a DELETE."""
