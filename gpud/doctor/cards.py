"""Checks of the cards: what the inventory has against each, and what it lets pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from gpud.doctor.cardview import CardView
from gpud.doctor.check import Check, Group, Level, Verdict
from gpud.host import iommu
from gpud.host.bars import Placement
from gpud.host.pci import PciFunction
from gpud.host.sysfs import Sysfs
from gpud.inventory.card import Reason, Why
from gpud.model import PciAddress

_CARDS: Final = Check(Group.CARDS, "cards")
_GROUPS: Final = Check(Group.CARDS, "IOMMU groups")
_DRIVERS: Final = Check(Group.CARDS, "drivers")
_HOLDERS: Final = Check(Group.CARDS, "holders")
_RESETS: Final = Check(Group.CARDS, "resets")
_HANDOVER: Final = Check(Group.CARDS, "hand-over")
_HEALTH: Final = Check(Group.CARDS, "health")
_NVML: Final = Check(Group.CARDS, "NVML")
_POWER: Final = Check(Group.CARDS, "power saving")
_BARS: Final = Check(Group.CARDS, "BARs")

REASONS: Final[Mapping[Check, tuple[frozenset[Why], str]]] = {
    _CARDS: (
        frozenset(
            {
                Why.GONE,
                Why.NO_ANSWER,
                Why.CHANGED,
                Why.VIRTUAL,
                Why.NOT_A_TYPE,
                Why.MEMORY,
                Why.DRAINED,
            }
        ),
        "",
    ),
    _GROUPS: (
        frozenset({Why.IOMMU, Why.FOREIGN_DEVICE, Why.BOARD, Why.PARTNER}),
        "no card shares one with a device of the host",
    ),
    _DRIVERS: (frozenset({Why.NO_DRIVER, Why.NVML}), ""),
    _HOLDERS: (frozenset({Why.HELD}), "nobody but guests has a card"),
    _RESETS: (frozenset({Why.NO_RESET}), ""),
    _HANDOVER: (frozenset({Why.HAND_OVER}), "nothing is in its way"),
    _HEALTH: (
        frozenset({Why.SETTING, Why.UNHEALTHY, Why.QUARANTINED}),
        "nothing is known against one",
    ),
}
"""Which of the inventory's reasons belong to which check, and what is said when there is none."""

_LEVELS: Final = {
    Why.NOT_A_TYPE: Level.NOTE,
    Why.DRAINED: Level.NOTE,
    Why.QUARANTINED: Level.WARNING,
    Why.PARTNER: Level.WARNING,
}
"""Of reasons that are no fault: other cards may well be sold."""

_WEAK: Final = ("pm",)


def cards(view: CardView, sysfs: Sysfs, *, is_root: bool) -> Iterator[Verdict]:
    """All that can be said of the cards.

    Args:
        view: The cards.
        sysfs: The tree they were read from.
        is_root: Who looks sees every process.
    """
    if any(card.stand_in for card in view.cards):
        yield _CARDS.note(f"{len(view.cards)} emulated stand-ins; real cards are left alone")
        return
    if not view.cards:
        yield _CARDS.fault(
            "no GPU is on the PCI bus",
            "lspci -d 10de: shows NVIDIA's; see to its seat and power, and the firmware's slots",
        )
        return
    functions = view.facts.tree.functions
    present = [functions[card.address] for card in view.cards if card.address in functions]
    said = {
        _CARDS: _counted([card.name or card.gpu_type or card.ids for card in view.cards]),
        _DRIVERS: _counted([one.driver or "" for one in present]),
        _RESETS: _counted([" ".join(one.reset_methods) for one in present]),
    }
    for check, (kinds, well) in REASONS.items():
        found = list(_speaking(check, kinds, view))
        yield from found or (check.ok(said.get(check, well)),)
    yield from (*_nvml(view), *_unseen(is_root=is_root))
    yield from (*resets(present), *power(present), *bars(present, sysfs))


def _speaking(check: Check, kinds: Iterable[Why], view: CardView) -> Iterator[Verdict]:
    """The reasons of these kinds, each once, with the cards that have it."""
    told = {one.what for one in iommu.obstacles(view.facts.iommu)}  # of the server, not of a card
    by_reason: dict[Reason, list[PciAddress]] = {}
    for card in view.cards:
        for reason in card.reasons:
            if reason.why in kinds and reason.what not in told:
                by_reason.setdefault(reason, []).append(card.address)
    for reason, addresses in by_reason.items():
        level = _LEVELS.get(reason.why, Level.FAULT)
        yield check.at(level, f"{_named(addresses)}: {reason.what}", reason.mend)


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _nvml(view: CardView) -> Iterator[Verdict]:
    if view.nvml_problem is not None:
        yield _NVML.note(
            view.nvml_problem,
            "cards on vfio-pci need none; else install NVIDIA's driver, or set gpus.nvml: false",
        )


def _unseen(*, is_root: bool) -> Iterator[Verdict]:
    if not is_root:
        yield _HOLDERS.note("the processes of other users cannot be seen", "sudo gpud doctor")


def resets(present: Sequence[PciFunction]) -> Iterator[Verdict]:
    """Whether resets prove something: D3hot and back leaves open what it clears."""
    weak = [one.address for one in present if one.reset_methods == _WEAK]
    if weak:
        yield _RESETS.warning(
            f"{_named(weak)}: only by power management (pm), which may leave memory as it was",
            f"a kernel or firmware with FLR; see /sys/bus/pci/devices/{weak[0]}/reset_method",
        )


def power(present: Sequence[PciFunction]) -> Iterator[Verdict]:
    """Whether cards sleep without power, which not all wake from.

    D3hot is nothing: vfio-pci leaves idle cards in it. From their hand-over on gpud keeps them awake.
    """
    asleep = [one.address for one in present if one.power_state == "D3cold"]
    if asleep:
        control = f"/sys/bus/pci/devices/{asleep[0]}/power/control"
        yield _POWER.warning(f"{_named(asleep)}: without power (D3cold)", f"echo on > {control}")
    elif any(one.d3cold_allowed for one in present):
        yield _POWER.ok("D3cold is allowed; gpud forbids it to cards that it hands over")
    else:
        yield _POWER.ok("D3cold is forbidden")


def bars(present: Sequence[PciFunction], sysfs: Sysfs) -> Iterator[Verdict]:
    """Whether the windows into cards' memory have addresses, above 4 GiB, and their full size."""
    placed = Placement.of(present, sysfs)
    above = "turn on Above 4G Decoding (also called 64-bit MMIO) in the firmware"
    if placed.lost:
        yield _BARS.fault(f"{_named(placed.lost)}: a BAR has no address", above)
    if placed.low:
        yield _BARS.warning(f"{_named(placed.low)}: below 4 GiB, where there is little room", above)
    if placed.small:
        mend = "turn on Resizable BAR in the firmware, with Above 4G Decoding"
        yield _BARS.note(f"{_named(placed.small)}: 256 MiB, and could be larger", mend)
    if not (placed.lost or placed.low or placed.small):
        yield _BARS.ok("all have addresses, the large ones above 4 GiB")


def _named(addresses: Iterable[PciAddress]) -> str:
    return ", ".join(map(str, dict.fromkeys(addresses)))
