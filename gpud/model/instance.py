"""An accepted order, and the names that derive from it."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from gpud.model.card import PciAddress
from gpud.model.host import Grant
from gpud.model.order import Tier
from gpud.model.step import Status, Step

UPSTREAM_ID = re.compile(r"i-[0-9a-f]{16}")
"""Shape of an ``upstream_id``. Names of files and domains are made from it, so it is this narrow."""

DOMAIN_PREFIX: Final = "gpud-"
_DOMAIN_NAMESPACE: Final = uuid.UUID("6f0c3c5e-6a0f-5a39-9f0e-0b1f6f7f2d11")


@dataclass(frozen=True, slots=True)
class Instance:
    """One accepted order and where it stands: a row of the store.

    Times are seconds since the epoch.

    Attributes:
        running_at: When the guest first reported that its script was started.
        failure: What a caller is told of an ``error``.
        boot_id: Of the guest's boot that was counted last (Linux' ``random/boot_id``).
        guest_boots: In how many of its boots the guest reported that its script was started.
        boots_at_start: ``guest_boots`` when the domain was last started: more means it is up again.
        script_exit_code: Of the script's last run, if it has ended.
        restarts: How often in a row the domain had to be started again soon after its last start.
        last_start_at: When the domain was last started.
        former_drivers: The driver that each PCI function of its GPUs had before gpud took it, written
            down before the first act on any of them; an empty name for a function without one.
        drivers_noted_in: The boot of the server in which that was written down.
    """

    upstream_id: str
    instance_id: str
    fingerprint: str
    tier: Tier
    grant: Grant
    status: Status
    step: Step
    step_since: float
    created_at: float
    running_at: float | None = None
    ended_at: float | None = None
    delete_requested_at: float | None = None
    failure: str | None = None
    boot_id: str | None = None
    guest_boots: int = 0
    boots_at_start: int = 0
    script_exit_code: int | None = None
    restarts: int = 0
    last_start_at: float | None = None
    former_drivers: Mapping[PciAddress, str] = field(default_factory=dict)
    drivers_noted_in: str | None = None

    @property
    def domain_name(self) -> str:
        """Name of the libvirt domain."""
        return DOMAIN_PREFIX + self.upstream_id

    @property
    def domain_uuid(self) -> uuid.UUID:
        """UUID of the libvirt domain, derived so that a second start can only be the same domain."""
        return uuid.uuid5(_DOMAIN_NAMESPACE, self.upstream_id)

    @property
    def mac(self) -> str:
        """MAC address of the guest's NIC, derived from the id; locally administered, unicast."""
        digest = hashlib.sha256(self.upstream_id.encode()).digest()
        return ":".join(f"{octet:02x}" for octet in (0x52, *digest[:5]))

    @property
    def live(self) -> bool:
        """Whether anything may still exist for it on the host."""
        return self.step is not Step.ENDED
