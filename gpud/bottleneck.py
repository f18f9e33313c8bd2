"""Why an offering is not available, in words for the operator: what it would take, and where that is.

The answer is made of what admission itself goes by: the same cards, the same room, the same allocator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from gpud.allocator import Placement, Shortage, place, remaining
from gpud.config import Offer
from gpud.inventory import Card, CardState
from gpud.model import Grant, Host, Shape

_TAKEN: Final = {
    CardState.IN_USE: "in use",
    CardState.CLEANING: "being cleaned",
    CardState.DRAINED: "drained",
    CardState.QUARANTINED: "quarantined",
    CardState.UNAVAILABLE: "unavailable (see gpud gpus)",
}
_MIB: Final = 1024


def bottleneck(
    offer: Offer, shape: Shape, host: Host, grants: Sequence[Grant], cards: Sequence[Card]
) -> str:
    """What there is too little of for one more instance of a shape; empty if it can be had.

    Args:
        offer: What the shape is sold under.
        shape: What would be ordered.
        host: What this server has for guests.
        grants: What live instances have of it.
        cards: Every card, sellable or not.
    """
    free = remaining(host, grants)
    short = place(shape, free, offer.gpu_counts)
    if isinstance(short, Placement):
        return ""
    if short is Shortage.GPUS:
        return _gpus(shape, free, cards)
    return {
        Shortage.CPU_CORES: f"{shape.cpu_cores} CPU cores needed, {free.cpu_cores} of"
        f" {host.cpu_cores} free",
        Shortage.MEMORY: f"{_gib(shape.memory_mib)} GiB of memory needed,"
        f" {_gib(free.memory_mib)} of {_gib(host.memory_mib)} free",
        Shortage.STORAGE: f"{shape.storage_gib} GiB of disk needed, {free.storage_gib} of"
        f" {host.storage_gib} free",
        Shortage.ADDRESSES: f"no guest address free, all {len(host.addresses or ())} are in use",
    }[short]


def _gpus(shape: Shape, free: Host, cards: Sequence[Card]) -> str:
    """How many cards there are of the type, and where those are that are not free."""
    states = Counter(card.state for card in cards if card.gpu_type == shape.gpu_type)
    have = states.total()
    if not have:
        return "no card of this type is in this server"
    needed = f"{shape.gpu_count} GPU{'s' * (shape.gpu_count > 1)} needed"
    if have < shape.gpu_count:
        return f"{needed}, this server has {have}"
    idle = sum(gpu.gpu_type == shape.gpu_type for gpu in free.gpus)
    if idle >= shape.gpu_count:
        return f"{needed}, and the {idle} free ones only go together in sets that do not make it up"
    where = ", ".join(f"{states[state]} {word}" for state, word in _TAKEN.items() if states[state])
    return f"{needed}, {idle} of {have} free: {where}"


def _gib(mib: int) -> int:
    return mib // _MIB
