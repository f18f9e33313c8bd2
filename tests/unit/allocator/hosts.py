"""Hosts of all kinds for the allocator's tests, and a judge that looks at every way to serve an order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache
from ipaddress import IPv4Address
from itertools import combinations

from hypothesis import strategies as st

from gpud.allocator import Placement
from gpud.model import Gpu, Grant, Host, NumaNode, PciAddress, Shape

COUNTS = (8, 4, 2, 1)
ADDRESSES = tuple(IPv4Address(f"10.0.0.{number}") for number in range(2, 6))

Bundle = tuple[Gpu, ...]


def gpu(
    number: int,
    node: int | None = 0,
    *,
    bundle: str = "",
    nvlink: str = "",
    gpu_type: str = "h100_sxm",
) -> Gpu:
    """The GPU at bus ``number``, with a companion function."""
    functions = (PciAddress(0, number, 0, 0), PciAddress(0, number, 0, 1))
    return Gpu(
        functions[0], gpu_type, functions=functions, numa_node=node, bundle=bundle, nvlink=nvlink
    )


ROOMY = (NumaNode(0, 128, 4096), NumaNode(1, 128, 4096))


def host(gpus: Sequence[Gpu], nodes: Sequence[NumaNode] = ROOMY, storage_gib: int = 1000) -> Host:
    """A host with more than enough beside its GPUs."""
    return Host(tuple(gpus), tuple(nodes), storage_gib)


def shape(
    gpu_count: int = 1, cpu_cores: int = 4, memory_mib: int = 64, storage_gib: int = 9
) -> Shape:
    """So much for each GPU."""
    return Shape(
        "h100_sxm", gpu_count, *(gpu_count * one for one in (cpu_cores, memory_mib, storage_gib))
    )


def grant(of: Shape, placement: Placement) -> Grant:
    return Grant(
        of,
        placement.gpus,
        placement.address,
        "sha256:x",
        Decimal(1),
        "US",
        "here",
        nodes=placement.nodes,
    )


def buses(placement: object) -> list[int]:
    """The buses of the GPUs that were given."""
    assert isinstance(placement, Placement), placement
    return [one.address.bus for one in placement.gpus]


shapes = st.builds(
    shape, st.sampled_from((1, 1, 2, 2, 3, 4)), st.integers(1, 4), st.integers(1, 4), st.just(1)
)
_amounts = st.sampled_from((0, 5, 9, 16, 32, 32))
_Part = tuple[int, tuple[int | None, ...], tuple[str, ...]]


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    """Up to three nodes, and up to eight GPUs on them: bundled, linked, of two types, in any mix."""
    count = draw(st.integers(1, 3))
    places: list[int | None] = [*range(count)]
    if draw(st.booleans()):
        places += [7, None]  # a node with neither cores nor memory, and a host that does not tell
    return Host(
        gpus=draw(_gpus(tuple(places), draw(st.booleans()), draw(st.booleans()))),
        nodes=tuple(NumaNode(n, draw(_amounts), draw(_amounts)) for n in range(count)),
        storage_gib=draw(st.sampled_from((3, 9, 9))),
        addresses=draw(st.sampled_from((None, None, ADDRESSES, ADDRESSES[:2]))),
    )


@cache
def _gpus(
    places: tuple[int | None, ...], bundled: bool, linked: bool
) -> st.SearchStrategy[tuple[Gpu, ...]]:
    """Bundles of 1, 2 or 4, so that first fit fills sets as full as can be."""
    links = ("", "a", "b") if linked else ("",)
    one = [((place,), (link,)) for place in places for link in links]
    two = [((a, b), names) for a in places for b in places for names in combinations(links, 2)]
    kinds: list[_Part] = [(1, *part) for part in one * 3]
    if bundled:
        kinds += [(size, *part) for size in (2, 4) for part in (*one, *two)]
    listed = st.lists(st.sampled_from(kinds), min_size=3, max_size=8)
    return st.builds(_laid_out, listed, st.sampled_from((-1, -1, 0, 3)))


def _laid_out(parts: Sequence[_Part], other: int) -> tuple[Gpu, ...]:
    """Eight GPUs at most, bundle by bundle; the one numbered ``other`` is of another type."""
    gpus: list[Gpu] = []
    for size, nodes, links in parts:
        if len(gpus) + size <= 8:
            first = len(gpus)
            gpus += [
                gpu(
                    number,
                    nodes[number % len(nodes)],
                    bundle=f"group-{first}" if size > 1 else "",
                    nvlink=links[number % len(links)],
                    gpu_type="l40s" if number == other else "h100_sxm",
                )
                for number in range(first, first + size)
            ]
    return tuple(gpus)


@st.composite
def servers(draw: st.DrawFn) -> Host:
    """Two nodes of up to four GPUs, some sold already: single, in NVLink pairs, or all linked."""
    links = draw(st.sampled_from(("........", "aabbccdd", "aaaaaaaa", "aaaabbbb", "aaaa....")))
    free = draw(st.sets(st.integers(0, 7), min_size=3))
    return host(
        [gpu(n, n // 4, nvlink=links[n].strip(".")) for n in sorted(free)],
        nodes=tuple(NumaNode(n, draw(st.integers(7, 17)), 1024) for n in range(2)),
    )


def bundles(free: Host, gpu_type: str = "h100_sxm") -> list[Bundle]:
    names = dict.fromkeys(one.bundle or str(one.address) for one in free.gpus)
    found = [
        tuple(one for one in free.gpus if (one.bundle or str(one.address)) == name)
        for name in names
    ]
    return [bundle for bundle in found if {one.gpu_type for one in bundle} == {gpu_type}]


def all_ways(of: Shape, free: Host) -> list[tuple[tuple[NumaNode, ...], tuple[Bundle, ...]]]:
    """Every set of nodes and bundles that could serve an order, from as few nodes as possible."""
    known = {node.number for node in free.nodes}
    bare = {one.numa_node for one in free.gpus if one.numa_node is not None} - known
    nodes = [*free.nodes, *(NumaNode(number, 0, 0) for number in bare)]
    for count in range(1, len(nodes) + 1):
        found = [
            (within, chosen)
            for within in combinations(nodes, count)
            if sum(node.cpu_cores for node in within) >= of.cpu_cores
            and sum(node.memory_mib for node in within) >= of.memory_mib
            for chosen in _choices(free, within, of.gpu_count)
        ]
        if found:
            return found
    return []


def _choices(
    free: Host, within: Sequence[NumaNode], gpu_count: int
) -> Iterator[tuple[Bundle, ...]]:
    numbers = {node.number for node in within} | {None}
    usable = [one for one in bundles(free) if {gpu.numa_node for gpu in one} <= numbers]
    for count in range(1, gpu_count + 1):
        for chosen in combinations(usable, count):
            if sum(map(len, chosen)) == gpu_count:
                yield chosen


def locality(chosen: Sequence[Gpu], free: Host) -> tuple[int, ...]:
    """GPU nodes, bundles, NVLink sets, and NVLink sets broken."""
    links = {one.nvlink for one in chosen if one.nvlink}
    stay = {one for bundle in bundles(free) for one in bundle} - set(chosen)
    return (
        len({one.numa_node for one in chosen if one.numa_node is not None}),
        len({one.bundle or one.address for one in chosen}),
        len(links) + len([one for one in chosen if not one.nvlink]),
        len(links & {one.nvlink for one in stay}),
    )


def orders_left(of: Shape, left: Host) -> list[tuple[int, int]]:
    """For each count, how many orders find all on one node, and how many one NVLink set."""
    return [(_on_one_node(of, count, left), _in_one_link_set(count, left)) for count in COUNTS]


def _on_one_node(of: Shape, count: int, left: Host) -> int:
    total = 0
    for node in left.nodes:
        sizes = [len(one) for one in bundles(left) if {g.numa_node for g in one} == {node.number}]
        cores = node.cpu_cores * of.gpu_count // (of.cpu_cores * count)
        memory = node.memory_mib * of.gpu_count // (of.memory_mib * count)
        total += min(most_sets(tuple(sorted(sizes)), count), cores, memory)
    return total


def _in_one_link_set(count: int, left: Host) -> int:
    sizes: dict[frozenset[str], list[int]] = {}
    for bundle in bundles(left):
        sizes.setdefault(frozenset(one.nvlink for one in bundle), []).append(len(bundle))
    return sum(
        most_sets(tuple(sorted(found)), count)
        for links, found in sizes.items()
        if len(links) == 1 and "" not in links
    )


@cache
def most_sets(sizes: tuple[int, ...], count: int) -> int:
    """The most sets of exactly ``count`` GPUs, by trying all."""
    best = 0
    for number in range(1, len(sizes) + 1):
        for chosen in combinations(range(len(sizes)), number):
            if sum(sizes[one] for one in chosen) == count:
                rest = tuple(size for one, size in enumerate(sizes) if one not in chosen)
                best = max(best, 1 + most_sets(rest, count))
    return best
