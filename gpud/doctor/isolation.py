"""Checks of the IOMMU as a whole; what it does to single cards is theirs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.doctor.check import Check, Group, Level, Verdict
from gpud.host import iommu
from gpud.host.iommu import IommuFacts

_IOMMU: Final = Check(Group.CARDS, "IOMMU")
_REMAPPING: Final = Check(Group.CARDS, "interrupts")
_DRIVER: Final = Check(Group.CARDS, "vfio-pci")


def isolation(facts: IommuFacts, group_count: int, *, needed: bool) -> Iterator[Verdict]:
    """Whether a card can be confined to its guest.

    Args:
        facts: What the IOMMU does.
        group_count: How many groups it keeps devices in.
        needed: Real cards are sold.
    """
    worst = Level.FAULT if needed else Level.NOTE
    check = _REMAPPING if facts.present else _IOMMU
    if facts.present:
        yield _IOMMU.ok(f"on, {group_count} groups")
    found = list(iommu.obstacles(facts))
    for one in found:
        yield check.at(worst, one.what, one.mend)
    if facts.present and not found:
        yield _REMAPPING.ok("remapped, so none can be forged")
    if facts.unsafe_interrupts_allowed:
        yield _REMAPPING.warning(
            "VFIO is told to do without remapping (allow_unsafe_interrupts)",
            "take it out of /etc/modprobe.d and off the kernel command line",
        )


def driver(*, loaded: bool, needed: bool) -> Iterator[Verdict]:
    """Whether the driver that gives functions to guests is there."""
    if loaded:
        yield _DRIVER.ok("loaded")
    else:
        yield _DRIVER.at(
            Level.FAULT if needed else Level.NOTE,
            "not loaded",
            "gpud setup has it loaded, now and at each boot",
        )
