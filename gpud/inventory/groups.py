"""Which PCI functions belong together: by slot, by IOMMU group, and by links between cards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from gpud.host.pci import PciFunction, PciTree
from gpud.model import PciAddress

_NO_ID: Final = b"\xff\xff"


def is_virtual(function: PciFunction) -> bool:
    """Whether a function is an SR-IOV virtual one, as vGPU makes them.

    Its config space has no ids, all else in it is there (PCI Express Base Specification, "VF Vendor
    ID"); the kernel gives it the ids of its card.
    """
    header = function.config_header
    return header.startswith(_NO_ID) and bool(header.strip(b"\xff"))


class Groups:
    """A PCI tree by slots and by IOMMU groups."""

    def __init__(self, tree: PciTree) -> None:
        self._slots: defaultdict[tuple[int, int, int], list[PciFunction]] = defaultdict(list)
        self._groups: defaultdict[int, list[PciFunction]] = defaultdict(list)
        for function in tree.functions.values():
            if function.iommu_group is not None:
                self._groups[function.iommu_group].append(function)
            if not (function.is_bridge or is_virtual(function)):
                self._slots[function.address.slot].append(function)
        self.switches = tuple(one for one in tree.functions.values() if one.is_nvswitch)

    def slot(self, address: PciAddress) -> tuple[PciFunction, ...]:
        """The functions that one card has; bridges and virtual functions are none of them."""
        return tuple(self._slots.get(address.slot, ()))

    def around(self, functions: Iterable[PciFunction]) -> tuple[PciFunction, ...]:
        """Everything in the IOMMU groups of ``functions``, themselves included."""
        numbers = {one.iommu_group for one in functions if one.iommu_group is not None}
        return tuple(one for number in sorted(numbers) for one in self._groups[number])


def components(pairs: Iterable[tuple[PciAddress, PciAddress]]) -> dict[PciAddress, str]:
    """Name the sets of addresses that ``pairs`` connect, each by its lowest member."""
    sets: list[frozenset[PciAddress]] = []
    for pair in pairs:
        touched = [one for one in sets if not one.isdisjoint(pair)]
        sets = [one for one in sets if one not in touched]
        sets.append(frozenset(pair).union(*touched))
    return {member: str(min(one)) for one in sets if len(one) > 1 for member in one}
