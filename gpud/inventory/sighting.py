"""One card as all sources together see it, before it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from gpud.config import Gpus
from gpud.drains import Drain
from gpud.host.nvml import NvmlGpu
from gpud.host.pci import VFIO_PCI, PciFunction
from gpud.inventory.facts import Claim, Facts, Record
from gpud.inventory.groups import Groups, is_virtual
from gpud.model import GPU_TYPES, KnownCard, PciAddress, Quarantine

_TYPE_OF_IDS: Final = {
    f"10de:{device:04x}": gpu_type.identifier
    for gpu_type in GPU_TYPES.values()
    for device in gpu_type.pci_ids
}
_MODULES: Final = frozenset({"h100_sxm", "h200_sxm"})
_A100_MODULE: Final = "10de:20b2"
"""GPUs that come as modules for a board; for the A100 GPU.ai has one type, card or module."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What each source says of the card at an address; None where a source says nothing.

    Attributes:
        function: PCI.
        seen: NVML.
        known: The record: what was once told.
        domain: The domain of libvirt that has it.
        gpu_type: By its ids; None where GPU.ai does not buy it.
        own: The functions of its slot: itself and its companions.
        on_board: Whether it hangs on an NVSwitch board.
        switches: The NVSwitches that go where this card goes: those of a board sold whole, on one card.
        surroundings: Everything in the IOMMU groups of all these functions.
    """

    address: PciAddress
    function: PciFunction | None
    seen: NvmlGpu | None
    known: KnownCard | None
    quarantine: Quarantine | None
    claim: Claim | None
    domain: str | None
    drains: tuple[Drain, ...] = ()
    gpu_type: str | None = None
    own: tuple[PciFunction, ...] = ()
    on_board: bool = False
    switches: tuple[PciFunction, ...] = ()
    surroundings: tuple[PciFunction, ...] = ()

    @property
    def ids(self) -> str:
        """Vendor, device and subsystem: of what is there now, else of what was there last."""
        if self.function is not None:
            return full_ids(self.function)
        if self.known is not None:
            return self.known.ids
        told = (self.seen.pci_ids, self.seen.subsystem_ids) if self.seen is not None else ()
        return " ".join(one for one in told if one)

    @property
    def pci_ids(self) -> str:
        """Vendor and device, as ``gpus.pci_ids`` has them."""
        return self.ids.partition(" ")[0]

    @property
    def told(self) -> tuple[NvmlGpu | KnownCard, ...]:
        """Who tells of the card beyond its ids, the freshest first; not of another one before it."""
        once = self.known if self.known is not None and self.known.ids == self.ids else None
        return tuple(one for one in (self.seen, once) if one is not None)

    @property
    def vram_mib(self) -> int | None:
        """What NVML tells or once told."""
        return next((one.vram_mib for one in self.told if one.vram_mib), None)

    @property
    def nvlink_peers(self) -> frozenset[PciAddress]:
        """Peers that NVML tells or once told: links to a card that a guest has are down to it."""
        return frozenset(peer for one in self.told for peer in one.nvlink_peers)

    @property
    def functions(self) -> tuple[PciFunction, ...]:
        """All that goes where this card goes."""
        return self.own + self.switches


def full_ids(function: PciFunction) -> str:
    """Vendor, device and subsystem of a function: ``10de:2330 10de:16c1``."""
    return f"{function.ids} {function.subsystem_vendor:04x}:{function.subsystem_device:04x}"


def sightings(facts: Facts, record: Record, config: Gpus) -> tuple[Sighting, ...]:
    """Every card that any source knows of, in the order of their addresses."""
    groups = Groups(facts.tree)
    there = _cards_on_the_bus(facts, record, groups, config.pci_ids)
    addresses = sorted({*there, *facts.nvml.gpus, *record.known, *record.quarantines})
    found = [
        _sight(address, there.get(address), facts, record, config.pci_ids, groups)
        for address in addresses
    ]
    if config.nvswitch_board == "whole":
        _give_switches(found, groups)
    return tuple(found)


def _cards_on_the_bus(
    facts: Facts, record: Record, groups: Groups, mapped: Mapping[str, str]
) -> dict[PciAddress, PciFunction]:
    """NVIDIA's display functions, what the config maps to a type, and what was a card before.

    Of mapped functions in one slot the first is the card: the others are its companions, which in a
    device with several alike functions have the very same ids.
    """
    cards: dict[PciAddress, PciFunction] = {}
    for function in facts.tree.functions.values():
        address, known = function.address, record.known.get(function.address)
        first = cards.keys().isdisjoint(one.address for one in groups.slot(address))
        if (
            (function.is_nvidia and function.is_display)
            or (function.ids in mapped and first)
            or (known is not None and known.ids == full_ids(function))
            or address in facts.nvml.gpus
        ):
            cards[address] = function
    return cards


def _sight(
    address: PciAddress,
    function: PciFunction | None,
    facts: Facts,
    record: Record,
    mapped: Mapping[str, str],
    groups: Groups,
) -> Sighting:
    known, seen = record.known.get(address), facts.nvml.gpus.get(address)
    if function is not None and function.driver == VFIO_PCI:
        seen = None  # of what vfio-pci has, NVML can only have told before
    whole = function is not None and not is_virtual(function)
    own = groups.slot(address) if whole else ()
    sighting = Sighting(
        address=address,
        function=function,
        seen=seen,
        known=known,
        quarantine=record.quarantines.get(address),
        claim=record.claims.get(address),
        domain=next((name for one in own if (name := facts.domains.get(one.address))), None),
        drains=record.drains_of(address),
        own=own,
        surroundings=groups.around(own),
    )
    gpu_type = mapped.get(sighting.pci_ids) or _TYPE_OF_IDS.get(sighting.pci_ids)
    is_module = gpu_type in _MODULES or sighting.pci_ids == _A100_MODULE
    told = any(one.nvswitch for one in sighting.told)
    # Links that are down tell nothing of where they lead.
    on_board = told or (is_module and bool(groups.switches))
    return replace(sighting, gpu_type=gpu_type, on_board=on_board)


def _give_switches(found: list[Sighting], groups: Groups) -> None:
    """Let the NVSwitches go with the first card of their board.

    A server with two boards has one fabric as well: nothing in PCI tells them apart.
    """
    for number, sighting in enumerate(found):
        if sighting.on_board and sighting.function is not None and sighting.gpu_type is not None:
            together = (*sighting.own, *groups.switches)
            found[number] = replace(
                sighting, switches=groups.switches, surroundings=groups.around(together)
            )
            return
