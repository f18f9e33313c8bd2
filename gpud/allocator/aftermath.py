"""How good a choice is: by what it gives, and by what it leaves for later orders."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpud.allocator.choices import Choice
from gpud.allocator.holdings import undrawn
from gpud.allocator.stacks import Stack
from gpud.model import NumaNode, Shape

_Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What the choices for an order of ``shape`` are judged by.

    Attributes:
        stacks: All that is free of the type.
        nodes: What is free of the nodes.
        counts: The GPU counts on sale, biggest first.
    """

    shape: Shape
    stacks: Sequence[Stack]
    nodes: Sequence[NumaNode]
    counts: Sequence[int]

    def cost(self, choice: Choice) -> tuple[object, ...]:
        """The criteria that the package lists, in that order; less is better."""
        gpus = choice.gpus
        links = {gpu.nvlink for gpu in gpus} - {""}
        left = {stack: len(stack.bundles) - choice.taken.get(stack, 0) for stack in self.stacks}
        linked_still = {name for stack, count in left.items() if count for name in stack.links}
        on_nodes = _sizes((stack.nodes, stack.size, count) for stack, count in left.items())
        in_links = _sizes(
            (stack.links[0], stack.size, count)
            for stack, count in left.items()
            if set(stack.links) == {stack.links[0]} - {""}
        )
        nodes = undrawn(self.nodes, choice.drawn, self.shape.cpu_cores, self.shape.memory_mib)
        return (
            len({gpu.numa_node for gpu in gpus} - {None}),
            sum(choice.taken.values()),
            len(links) + sum(not gpu.nvlink for gpu in gpus),
            len(links & linked_still),
            [
                (
                    -self._orders_on_one_node(count, on_nodes, nodes),
                    -sum(_full_sets(sizes, count) for sizes in in_links.values()),
                )
                for count in self.counts
            ],
            sorted(-sum(sizes) for sizes in on_nodes.values()),
            sorted(-sum(sizes) for sizes in in_links.values()),
            [gpu.address for gpu in gpus],
        )

    def _orders_on_one_node(
        self, gpu_count: int, on_nodes: Mapping[object, _Sizes], nodes: Iterable[NumaNode]
    ) -> int:
        """How many orders of so many GPUs would find all they need on one node."""
        cpu_cores = max(1, -(-self.shape.cpu_cores * gpu_count // self.shape.gpu_count))
        memory_mib = max(1, -(-self.shape.memory_mib * gpu_count // self.shape.gpu_count))
        return sum(
            min(
                _full_sets(on_nodes.get((node.number,), ()), gpu_count),
                node.cpu_cores // cpu_cores,
                node.memory_mib // memory_mib,
            )
            for node in nodes
        )


def _sizes(parts: Iterable[tuple[object, int, int]]) -> dict[object, _Sizes]:
    """The sizes of the bundles at each place, from (place, size, how many)."""
    sizes = defaultdict[object, _Sizes](tuple)
    for place, size, count in parts:
        sizes[place] += (size,) * count
    return sizes


@lru_cache(maxsize=4096)
def _full_sets(sizes: _Sizes, gpu_count: int) -> int:
    """How many sets of exactly ``gpu_count`` GPUs bundles of these sizes make (first fit)."""
    missing: list[int] = []
    for size in sorted(sizes, reverse=True):
        place = next((n for n, room in enumerate(missing) if size <= room), None)
        if place is not None:
            missing[place] -= size
        elif size <= gpu_count:
            missing.append(gpu_count - size)
    return missing.count(0)
