"""Cards: where they are, what they are, and what is remembered of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Self


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
