"""The words of the house: GPUs, orders, instances, and the legal moves between their states.

Types only. Nothing here reads a clock, a file or the network.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Final, Self

UPSTREAM_ID = re.compile(r"i-[0-9a-f]{16}")
"""Shape of an ``upstream_id``. Names of files and domains are made from it, so it is this narrow."""

DOMAIN_PREFIX: Final = "gpud-"
_DOMAIN_NAMESPACE: Final = uuid.UUID("6f0c3c5e-6a0f-5a39-9f0e-0b1f6f7f2d11")


@dataclass(frozen=True, order=True, slots=True)
class PciAddress:
    """A PCI function's address (BDF with its domain), as sysfs writes it: ``0000:3b:00.0``."""

    domain: int
    bus: int
    device: int
    function: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``0000:3b:00.0``.

        Raises:
            ValueError: ``text`` is not a full address.
        """
        found = re.fullmatch(
            r"([0-9a-fA-F]{4,8}):([0-9a-fA-F]{2}):([01][0-9a-fA-F])\.([0-7])", text
        )
        if found is None:
            raise ValueError(f"{text!r} is not a PCI address such as 0000:3b:00.0")
        return cls(*(int(part, 16) for part in found.groups()))

    @property
    def slot(self) -> tuple[int, int, int]:
        """Domain, bus and device: what the functions of one card share."""
        return self.domain, self.bus, self.device

    def __str__(self) -> str:
        return f"{self.domain:04x}:{self.bus:02x}:{self.device:02x}.{self.function}"


@dataclass(frozen=True, slots=True)
class GpuType:
    """A GPU type that GPU.ai buys.

    Attributes:
        identifier: GPU.ai's canonical string; must match exactly.
        name: What people call it.
        vram_gb: Memory of one GPU, in the GB that GPU.ai's table states.
        pci_ids: PCI device ids (vendor 10de) that are this type.
    """

    identifier: str
    name: str
    vram_gb: int
    pci_ids: frozenset[int]


GPU_TYPES: Final[dict[str, GpuType]] = {
    gpu_type.identifier: gpu_type
    for gpu_type in (
        GpuType("h200_sxm", "NVIDIA H200 SXM", 141, frozenset({0x2335})),
        GpuType("h100_sxm", "NVIDIA H100 SXM", 80, frozenset({0x2330})),
        GpuType("h100_pcie", "NVIDIA H100 PCIe", 80, frozenset({0x2331})),
        GpuType("a100_80gb", "NVIDIA A100", 80, frozenset({0x20B2, 0x20B5})),
        GpuType("l40s", "NVIDIA L40S", 48, frozenset({0x26B9})),
        GpuType("rtx_4090", "NVIDIA RTX 4090", 24, frozenset({0x2684})),
        GpuType("rtx_3090", "NVIDIA RTX 3090", 24, frozenset({0x2204})),
    )
}
"""GPU.ai's type table (Supplier API, section 07.5)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of this host that could be sold.

    Attributes:
        address: Where it sits.
        gpu_type: Its GPU.ai identifier.
        stand_in: True for a development stand-in: the guest gets an emulated PCI device in its place.
        functions: Every PCI function that goes where it goes: itself, and the endpoints that share its
            IOMMU group. Empty for a stand-in.
        numa_node: The host's NUMA node it hangs on; None where the host does not tell.
        bundle: GPUs with the same bundle are only ever given out together, because they share an
            IOMMU group or a board that is sold whole; empty for a GPU that stands alone.
        nvlink: GPUs with the same name here reach each other over NVLink; empty where there is none.
    """

    address: PciAddress
    gpu_type: str
    stand_in: bool = False
    functions: tuple[PciAddress, ...] = ()
    numa_node: int | None = None
    bundle: str = ""
    nvlink: str = ""


@dataclass(frozen=True, slots=True)
class KnownCard:
    """What was last learned of the card at an address; kept, since NVML sees no card that a guest has.

    Attributes:
        ids: PCI vendor, device and subsystem: ``10de:2330 10de:16c1``.
        uuid: As NVML tells it; None where NVML never saw the card, as with the rest.
        nvlink_peers: GPUs that it reaches over NVLink directly.
        nvswitch: Whether its NVLinks lead to NVSwitches.
    """

    address: PciAddress
    ids: str
    uuid: str | None = None
    serial: str | None = None
    name: str | None = None
    vram_mib: int | None = None
    nvlink_peers: tuple[PciAddress, ...] = ()
    nvswitch: bool = False


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A card that is not sold until the operator has looked at it.

    Attributes:
        since: Seconds since the epoch.
        reason: Why, in plain words.
        by_operator: Nothing is known to be wrong with it: after a guest it is cleaned like any.
        former_drivers: The drivers that its functions go back to on release, where a guest had it.
    """

    address: PciAddress
    since: float
    reason: str
    by_operator: bool = False
    former_drivers: Mapping[PciAddress, str] = field(default_factory=dict)


class Tier(StrEnum):
    """How an instance is sold."""

    ON_DEMAND = "on_demand"
    SPOT = "spot"


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


@dataclass(frozen=True, slots=True)
class NumaNode:
    """Cores and memory of one NUMA node: what it has for guests, or what a guest takes of it.

    Attributes:
        number: As Linux numbers it (``/sys/devices/system/node/nodeN``).
    """

    number: int
    cpu_cores: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Grant:
    """What admission gives to an order, decided inside the store's transaction.

    Attributes:
        nodes: Where the shape's cores and memory come from; they add up to it.
    """

    shape: Shape
    gpus: tuple[Gpu, ...]
    address: IPv4Address | None
    image_digest: str
    cost_per_hour: Decimal
    region: str
    datacenter_location: str
    nodes: tuple[NumaNode, ...] = ()


@dataclass(frozen=True, slots=True)
class Host:
    """What this host can give to guests, after its own reserve; claims not yet taken off.

    Attributes:
        gpus: GPUs that may be sold: typed, healthy and clean.
        nodes: Cores and memory for guests, by NUMA node; a host without NUMA is one node.
        storage_gib: Disk for guests.
        addresses: Addresses for guests; None where guests need none of their own.
    """

    gpus: tuple[Gpu, ...] = ()
    nodes: tuple[NumaNode, ...] = ()
    storage_gib: int = 0
    addresses: tuple[IPv4Address, ...] | None = None

    @property
    def cpu_cores(self) -> int:
        """Cores for guests, of all nodes."""
        return sum(node.cpu_cores for node in self.nodes)

    @property
    def memory_mib(self) -> int:
        """Memory for guests, of all nodes."""
        return sum(node.memory_mib for node in self.nodes)


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
