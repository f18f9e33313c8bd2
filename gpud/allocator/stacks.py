"""GPUs as they can be given out: in bundles, and equal bundles in stacks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpud.model import Gpu

Bundle = tuple[Gpu, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Bundles that differ in nothing but their addresses, in their order.

    Attributes:
        nodes: The NUMA nodes of each bundle's GPUs, as far as known.
        links: The NVLink set of each GPU of a bundle; empty for one without.
        kind: Of two stacks of the same kind, one is the mirror image of the other.
    """

    bundles: tuple[Bundle, ...]
    nodes: tuple[int, ...]
    links: tuple[str, ...]
    kind: tuple[tuple[int, ...], int, int, bool, tuple[str, ...]]

    @property
    def size(self) -> int:
        """GPUs in each bundle."""
        return len(self.links)


def stacked(gpus: Iterable[Gpu], gpu_type: str) -> list[Stack]:
    """What can be given of a type: equal bundles together, stacks of the same kind side by side."""
    equal = defaultdict[tuple[tuple[int, ...], tuple[str, ...]], list[Bundle]](list)
    for bundle in _bundles(gpus, gpu_type):
        nodes = sorted({gpu.numa_node for gpu in bundle if gpu.numa_node is not None})
        equal[tuple(nodes), tuple(sorted(gpu.nvlink for gpu in bundle))].append(bundle)
    stacks_with = Counter(name for _, links in equal for name in set(links))
    stacks = []
    for (nodes_of, links), members in equal.items():
        # Where a stack is an NVLink set and no more, the set's name makes no difference.
        whole_set = set(links) == {links[0]} - {""} and stacks_with[links[0]] == 1
        kind = (nodes_of, len(links), len(members), whole_set, () if whole_set else links)
        stacks.append(Stack(tuple(members), nodes_of, links, kind))
    return sorted(stacks, key=lambda stack: (stack.kind, stack.bundles[0][0].address))


def _bundles(gpus: Iterable[Gpu], gpu_type: str) -> list[Bundle]:
    """The bundles of a type, by address; one with another type in it is of no use."""
    bundles = defaultdict[object, list[Gpu]](list)
    for gpu in sorted(gpus, key=lambda gpu: gpu.address):
        bundles[gpu.bundle or gpu.address].append(gpu)
    return [
        tuple(bundle)
        for bundle in bundles.values()
        if all(gpu.gpu_type == gpu_type for gpu in bundle)
    ]


def ways(
    stacks: Sequence[Stack], gpu_count: int, former: tuple[object, int] = (None, 0)
) -> Iterator[tuple[int, ...]]:
    """Every way to take so many GPUs: how many bundles of each stack.

    Mirror images are left out: of stacks of the same kind, none gives more than the one before it
    (``former``: its kind, and what it gave).
    """
    if not stacks:
        if gpu_count == 0:
            yield ()
        return
    if sum(stack.size * len(stack.bundles) for stack in stacks) < gpu_count:
        return
    first, others = stacks[0], stacks[1:]
    most = min(len(first.bundles), gpu_count // first.size)
    if former[0] == first.kind:
        most = min(most, former[1])
    for taken in range(most, -1, -1):
        for rest in ways(others, gpu_count - taken * first.size, (first.kind, taken)):
            yield taken, *rest
