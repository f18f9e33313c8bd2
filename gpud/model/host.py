"""What the host has for guests, and what of it an instance was granted."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from ipaddress import IPv4Address

from gpud.model.card import Gpu
from gpud.model.order import Shape


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
