"""What one order gets, and how many such orders there is room for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address
from typing import Final

from gpud.allocator.aftermath import Aftermath
from gpud.allocator.choices import all_nodes, choices
from gpud.allocator.holdings import less
from gpud.allocator.stacks import stacked, ways
from gpud.model import Gpu, Host, NumaNode, Shape

COUNTS: Final = (16, 8, 4, 2, 1)
"""In what GPU counts servers of this kind are usually sold."""


class Shortage(StrEnum):
    """What the host has too little of."""

    GPUS = "gpus"
    CPU_CORES = "cpu_cores"
    MEMORY = "memory"
    STORAGE = "storage"
    ADDRESSES = "addresses"


@dataclass(frozen=True, slots=True)
class Placement:
    """What one instance gets.

    Attributes:
        nodes: Where its cores and memory come from, by number; they add up to the shape.
    """

    gpus: tuple[Gpu, ...]
    address: IPv4Address | None
    nodes: tuple[NumaNode, ...] = ()


def place(
    shape: Shape,
    free: Host,
    counts: Collection[int] = COUNTS,
    last_address: IPv4Address | None = None,
) -> Placement | Shortage:
    """Choose what an order of ``shape`` gets of what is free, or say what is short.

    Args:
        shape: What was ordered.
        free: What :func:`remaining` has left.
        counts: The GPU counts in which this type is sold; the bigger ones are kept possible.
        last_address: The address that was given last of all.
    """
    stacks = stacked(free.gpus, shape.gpu_type)
    checks = (
        (any(ways(stacks, shape.gpu_count)), Shortage.GPUS),
        (free.cpu_cores >= shape.cpu_cores, Shortage.CPU_CORES),
        (free.memory_mib >= shape.memory_mib, Shortage.MEMORY),
        (free.storage_gib >= shape.storage_gib, Shortage.STORAGE),
        (free.addresses is None or bool(free.addresses), Shortage.ADDRESSES),
    )
    for enough, shortage in checks:
        if not enough:
            return shortage
    nodes = all_nodes(free, stacks)
    after = Aftermath(shape, stacks, nodes, sorted(counts, reverse=True))
    best = min(choices(shape, stacks, nodes), key=after.cost)
    return Placement(best.gpus, _next(last_address, free.addresses or ()), best.drawn)


def _next(last: IPv4Address | None, free: Collection[IPv4Address]) -> IPv4Address | None:
    """The next above the last, and then from the lowest again.

    So an address rests for as long as there are others. What is still on its way to the guest that had it
    (connections that the host translates, a peer that goes on sending) would reach the next that has it.
    """
    above = [one for one in free if last is not None and one > last]
    return min(above or free, default=None)


def how_many(shape: Shape, free: Host, counts: Collection[int] = COUNTS) -> int:
    """How many instances of ``shape`` could be placed one after another."""
    count = 0
    while isinstance(given := place(shape, free, counts), Placement):
        free = less(free, [shape], given.gpus, given.nodes, {given.address})
        count += 1
    return count
