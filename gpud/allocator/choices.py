"""The ways in which an order can be served."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice
from typing import Final

from gpud.allocator.holdings import split
from gpud.allocator.stacks import Stack, ways
from gpud.model import Gpu, Host, NumaNode, Shape

_MOST: Final = 1000
"""Choices looked at: far more than a real server has, and some 50 ms of work."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to serve an order.

    Attributes:
        taken: How many bundles of which stack.
        drawn: What cores and memory come from which node.
    """

    taken: Mapping[Stack, int]
    drawn: tuple[NumaNode, ...]

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs, by address."""
        return tuple(sorted(_first(self.taken), key=lambda gpu: gpu.address))


def _first(taken: Mapping[Stack, int]) -> Iterator[Gpu]:
    return (gpu for stack, count in taken.items() for gpu in chain(*stack.bundles[:count]))


def all_nodes(free: Host, stacks: Iterable[Stack]) -> list[NumaNode]:
    """The host's nodes; one that only GPUs are on has neither cores nor memory to give."""
    known = {node.number for node in free.nodes}
    bare = {number for stack in stacks for number in stack.nodes} - known
    nodes = [*free.nodes, *(NumaNode(number, 0, 0) for number in bare)]
    return sorted(nodes, key=lambda node: node.number)


def choices(shape: Shape, stacks: Sequence[Stack], nodes: Sequence[NumaNode]) -> list[Choice]:
    """Every way to serve an order from as few nodes as can serve it."""
    for count in range(len(nodes) + 1):
        if found := list(islice(_choices_from(count, shape, stacks, nodes), _MOST)):
            return found
    return []


def _choices_from(
    count: int, shape: Shape, stacks: Sequence[Stack], nodes: Sequence[NumaNode]
) -> Iterator[Choice]:
    for within in _node_sets(count, shape, stacks, nodes):
        numbers = {node.number for node in within}
        usable = [stack for stack in stacks if numbers.issuperset(stack.nodes)]
        for way in ways(usable, shape.gpu_count):
            taken = {stack: some for stack, some in zip(usable, way, strict=True) if some}
            yield Choice(taken, _drawn(shape, taken, within))


def _node_sets(
    count: int, shape: Shape, stacks: Sequence[Stack], nodes: Sequence[NumaNode]
) -> Iterator[tuple[NumaNode, ...]]:
    """Every set of so many nodes with cores and memory enough; of mirror images the lowest only."""

    def kind(node: NumaNode) -> tuple[object, ...]:
        own = tuple(stack.kind[1:] for stack in stacks if stack.nodes == (node.number,))
        shared = any(node.number in stack.nodes for stack in stacks if len(stack.nodes) > 1)
        return node.cpu_cores, node.memory_mib, own, node.number if shared else -1

    kinds = {node.number: kind(node) for node in nodes}
    seen = set()
    for within in combinations(nodes, count):
        if sum(node.cpu_cores for node in within) < shape.cpu_cores:
            continue
        if sum(node.memory_mib for node in within) < shape.memory_mib:
            continue
        mirror = frozenset(Counter(kinds[node.number] for node in within).items())
        if mirror not in seen:
            seen.add(mirror)
            yield within


def _drawn(
    shape: Shape, taken: Mapping[Stack, int], within: Iterable[NumaNode]
) -> tuple[NumaNode, ...]:
    """Each GPU's part of the cores and memory from its own node, what is short from the others."""
    gpus = Counter(gpu.numa_node for gpu in _first(taken))
    nodes = sorted(within, key=lambda node: (node.number not in gpus, node.number))

    def draw(amount: int, has: Callable[[NumaNode], int]) -> list[int]:
        return split(
            amount,
            [(has(node), amount * gpus[node.number] // shape.gpu_count) for node in nodes],
        )

    cores = draw(shape.cpu_cores, lambda node: node.cpu_cores)
    memory = draw(shape.memory_mib, lambda node: node.memory_mib)
    drawn = [
        NumaNode(node.number, *parts)
        for node, *parts in zip(nodes, cores, memory, strict=True)
        if any(parts)
    ]
    return tuple(sorted(drawn, key=lambda node: node.number))
