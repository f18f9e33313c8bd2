"""Cards, buses and records to merge, each with what a healthy one has unless told otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpud.config import Gpus
from gpud.host.iommu import IommuFacts
from gpud.host.nvml import NvmlGpu
from gpud.host.pci import PciFunction, PciTree
from gpud.inventory import Card
from gpud.inventory.facts import Claim, Facts, NvmlView, Record
from gpud.inventory.merge import merge
from gpud.model import KnownCard, PciAddress, Quarantine

SAFE = IommuFacts(
    present=True, interrupt_remapping=True, unsafe_interrupts_allowed=False, acs_override=False
)
NO_IOMMU = IommuFacts(
    present=False, interrupt_remapping=False, unsafe_interrupts_allowed=False, acs_override=False
)

H100, A100_PCIE, A100_SXM, RTX_4090, T4 = 0x2330, 0x20B5, 0x20B2, 0x2684, 0x1EB8
VGA, GPU_3D, AUDIO, NVSWITCH, NVME, ETHERNET, HOST_BRIDGE, PCI_BRIDGE = (
    0x030000,
    0x030200,
    0x040300,
    0x068000,
    0x010802,
    0x020000,
    0x060000,
    0x060400,
)


def at(short: str) -> PciAddress:
    """An address by its bus, or by all but the domain: ``3b`` is ``0000:3b:00.0``."""
    return PciAddress.parse(f"0000:{short}" if ":" in short else f"0000:{short}:00.0")


def pci(where: str, device: int, class_code: int, **fields: Any) -> PciFunction:
    """A PCI function that answers; NVIDIA's unless told otherwise."""
    vendor = fields.pop("vendor", 0x10DE)
    header = vendor.to_bytes(2, "little") + device.to_bytes(2, "little") + bytes(60)
    usual: dict[str, Any] = {
        "subsystem_vendor": 0x10DE,
        "subsystem_device": 0x16C1,
        "iommu_group": int(where[:2], 16),
        "numa_node": 0,
        "config_header": header,
        "reset_methods": ("flr", "bus"),
    }
    return PciFunction(at(where), vendor, device, class_code=class_code, **{**usual, **fields})


def gpu(where: str, device: int = RTX_4090, **fields: Any) -> PciFunction:
    """A GPU with NVIDIA's driver, in an IOMMU group of its own."""
    return pci(where, device, VGA, **{"driver": "nvidia", **fields})


def audio(where: str, **fields: Any) -> PciFunction:
    """The audio function of a GPU."""
    return pci(where, 0x22BA, AUDIO, **{"driver": "snd_hda_intel", **fields})


def nvswitch(where: str, **fields: Any) -> PciFunction:
    """An NVSwitch."""
    return pci(where, 0x22A3, NVSWITCH, **{"driver": "nvidia-nvswitch", **fields})


def virtual(where: str, device: int = A100_PCIE) -> PciFunction:
    """A virtual function: its config space has no ids."""
    header = b"\xff\xff\xff\xff\x06\x04\x10\x00" + bytes(56)
    return gpu(where, device, config_header=header)


def nvml(where: str, **fields: Any) -> NvmlGpu:
    """What NVML says of a 4090 without a fault."""
    address = at(where)
    usual: dict[str, Any] = {
        "name": "NVIDIA GeForce RTX 4090",
        "uuid": f"GPU-{address.bus:08x}",
        "vram_mib": 24564,
        "pci_ids": "10de:2684",
        "subsystem_ids": "10de:16c1",
    }
    return NvmlGpu(address, **{**usual, **fields})


def known(where: str, **fields: Any) -> KnownCard:
    """What is remembered of the 4090 that ``nvml`` tells of."""
    address = at(where)
    usual: dict[str, Any] = {
        "ids": "10de:2684 10de:16c1",
        "uuid": f"GPU-{address.bus:08x}",
        "name": "NVIDIA GeForce RTX 4090",
        "vram_mib": 24564,
    }
    return KnownCard(address, **{**usual, **fields})


def tree(*functions: PciFunction) -> PciTree:
    return PciTree({one.address: one for one in sorted(functions, key=lambda one: one.address)})


def facts(
    *functions: PciFunction,
    seen: tuple[NvmlGpu, ...] = (),
    silent: tuple[str, ...] = (),
    unplaced: tuple[str, ...] = (),
    awaited: bool = False,
    iommu: IommuFacts = SAFE,
    domains: Mapping[PciAddress, str] | None = None,
) -> Facts:
    view = NvmlView(
        {one.address: one for one in seen}, frozenset(map(at, silent)), unplaced, awaited
    )
    return Facts(tree(*functions), iommu, view, domains or {})


def record(
    *cards: KnownCard,
    quarantined: Mapping[str, str] | None = None,
    claimed: Mapping[str, str] | None = None,
    releasing: bool = False,
) -> Record:
    quarantines = (Quarantine(at(where), 0, why) for where, why in (quarantined or {}).items())
    return Record(
        {one.address: one for one in cards},
        {one.address: one for one in quarantines},
        {at(where): Claim(name, releasing) for where, name in (claimed or {}).items()},
    )


def merged(told: Facts, remembered: Record = Record(), **gpus: Any) -> dict[PciAddress, Card]:  # noqa: B008
    """The cards by address; keywords are settings of the config's ``gpus``."""
    return {card.address: card for card in merge(told, remembered, Gpus(**gpus))}


def only(told: Facts, remembered: Record = Record(), **gpus: Any) -> Card:  # noqa: B008
    """The one card that there is."""
    (card,) = merged(told, remembered, **gpus).values()
    return card
