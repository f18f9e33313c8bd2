"""What a caller asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Tier(StrEnum):
    """How an instance is sold."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


@dataclass(frozen=True, slots=True)
class GuestInput:
    """What the caller wants inside the guest. Holds secrets: kept out of every ``repr``.

    Attributes:
        ssh_public_keys: OpenSSH public keys for the login user.
        docker_image: Image reference to run as a container with all GPUs, or None.
        startup_script: The bootstrap script, byte for byte; None when the order had none.
    """

    ssh_public_keys: tuple[str, ...] = field(default=(), repr=False)
    docker_image: str | None = field(default=None, repr=False)
    startup_script: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Order:
    """A validated ``POST /v1/instances``.

    Attributes:
        instance_id: GPU.ai's id; the idempotency key.
        fingerprint: SHA-256 (hex) of the canonical body, which tells a repeat from a misuse of the id.
    """

    instance_id: str
    gpu_type: str
    gpu_count: int
    tier: Tier
    region: str | None
    guest_input: GuestInput
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Shape:
    """What one instance gets of the host.

    Attributes:
        cpu_cores: vCPUs, one per host core claimed.
        memory_mib: Guest memory.
        storage_gib: Virtual size of the root disk.
    """

    gpu_type: str
    gpu_count: int
    cpu_cores: int
    memory_mib: int
    storage_gib: int

    @property
    def name(self) -> str:
        """Short label for metrics and the learned boot time: ``h100_sxm x2``."""
        return f"{self.gpu_type} x{self.gpu_count}"
