"""Checks of what is on offer, against what this server has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

from gpud.allocator import Placement, Shortage, place
from gpud.config import Config, Offer
from gpud.doctor.check import Check, Group, Level, Verdict
from gpud.inventory.card import Card, Why
from gpud.model import Gpu, Host
from gpud.offers import shape_of, shapes

_OFFERS: Final = Check(Group.OFFERS, "offers")
_PRICES: Final = Check(Group.OFFERS, "prices")
_RESERVE: Final = Check(Group.OFFERS, "host_reserve")
_ROOM: Final = Check(Group.OFFERS, "room")

_SHORT: Final = {
    Shortage.CPU_CORES: ("CPU cores", "offers: per_gpu.cpu_cores"),
    Shortage.MEMORY: ("memory", "offers: per_gpu.memory_gib"),
    Shortage.STORAGE: ("disk space", "offers: per_gpu.storage_gib"),
    Shortage.ADDRESSES: ("guest addresses", "network.subnet"),
}


def sales(config: Config, room: Host, cards: Sequence[Card]) -> Iterator[Verdict]:
    """Whether something is sold, at a price, that an empty server could fill.

    Args:
        config: The offers.
        room: What there is for guests beside the cards.
        cards: Every card.
    """
    if not config.offers:
        yield _OFFERS.fault("nothing is on offer", "offers: an entry for each GPU type")
    for offer in config.offers:
        yield can_be_filled(offer, room, cards)
    unsold = {card.gpu_type for card in cards if card.gpu_type} - {
        offer.gpu_type for offer in config.offers
    }
    if unsold:
        yield _OFFERS.note(f"{', '.join(sorted(unsold))} is here, and not on offer", "offers")
    yield from prices(config.offers)
    yield from reserve(room)
    yield from all_at_once(config.offers, room, cards)


def can_be_filled(offer: Offer, room: Host, cards: Sequence[Card]) -> Verdict:
    """Whether each shape of an offer could be had on this server with nobody else on it."""
    name = offer.gpu_type
    have = sum(card.gpu_type == name for card in cards)
    if not have:
        return _OFFERS.fault(
            f"{name}: no card here is one",
            "take it out of offers; a card with other PCI ids: gpus.pci_ids",
        )
    gpus = tuple(gpu for card in cards if (gpu := _undrained(card).gpu) is not None)
    empty = Host(gpus, room.nodes, room.storage_gib, room.addresses)
    short: dict[Shortage, list[int]] = {}
    for shape in shapes(offer):
        placed = place(shape, empty, offer.gpu_counts)
        if not isinstance(placed, Placement):
            short.setdefault(placed, []).append(shape.gpu_count)
    if not short:
        counts = ", ".join(map(str, offer.gpu_counts))
        return _OFFERS.ok(f"{name} x {counts}: {_sellable(name, gpus)} of {have} cards can be sold")
    shortage, lacking = next(iter(short.items()))
    none_at_all = sum(map(len, short.values())) == len(offer.gpu_counts)
    level = Level.FAULT if none_at_all else Level.WARNING
    shown = f"{name} x {', '.join(map(str, lacking))}"
    if shortage is Shortage.GPUS:
        what = f"{shown}: {_sellable(name, gpus)} of {have} cards can be sold"
        return _OFFERS.at(level, what, "see cards above, or offers: gpu_counts")
    what, key = _SHORT[shortage]
    return _OFFERS.at(level, f"{shown}: not enough {what}, even if nobody else is here", key)


def _undrained(card: Card) -> Card:
    """A card as it was without a drain, which is what the operator wants and no fault."""
    return replace(card, reasons=tuple(one for one in card.reasons if one.why is not Why.DRAINED))


def _sellable(gpu_type: str, gpus: Sequence[Gpu]) -> int:
    return sum(gpu.gpu_type == gpu_type for gpu in gpus)


def prices(offers: Sequence[Offer]) -> Iterator[Verdict]:
    """Whether anything is given away."""
    free = [
        f"{offer.gpu_type} {tier.value}"
        for offer in offers
        for tier, price in offer.price_per_gpu_hour.items()
        if not price
    ]
    if free:
        yield _PRICES.warning(f"{', '.join(free)}: costs nothing", "offers: price_per_gpu_hour")
    elif offers:
        yield _PRICES.ok("none is 0")


def reserve(room: Host) -> Iterator[Verdict]:
    """Whether the host leaves guests anything."""
    left = {
        "cpu_cores": room.cpu_cores,
        "memory_gib": room.memory_mib // 1024,
        "storage_gib": room.storage_gib,
    }
    gone = [key for key, amount in left.items() if amount <= 0]
    if gone:
        keys = ", ".join(f"host_reserve.{key}" for key in gone)
        yield _RESERVE.fault(f"leaves guests no {', no '.join(gone)}", f"{keys}: less")
    else:
        yield _RESERVE.ok(
            f"leaves guests {left['cpu_cores']} cores, {left['memory_gib']} GiB of memory,"
            f" {left['storage_gib']} GiB of disk"
        )


def all_at_once(offers: Sequence[Offer], room: Host, cards: Sequence[Card]) -> Iterator[Verdict]:
    """Whether every card could be sold at the same time."""
    need = [0, 0, 0]
    for offer in offers:
        one = shape_of(offer, sum(card.gpu_type == offer.gpu_type for card in cards))
        need = [have + more for have, more in
                zip(need, (one.cpu_cores, one.memory_mib, one.storage_gib), strict=True)]  # fmt: skip
    have = (room.cpu_cores, room.memory_mib, room.storage_gib)
    names = ("cores", "MiB of memory", "GiB of disk")
    short = [
        f"{wanted} {name}, and there are {there}"
        for wanted, there, name in zip(need, have, names, strict=True)
        if wanted > there
    ]
    if short:
        yield _ROOM.warning(f"all cards at once take {'; '.join(short)}", "offers: per_gpu")
    elif any(need):
        yield _ROOM.ok("all cards can be sold at once")
