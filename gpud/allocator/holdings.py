"""What is left of a host when something is taken off it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from ipaddress import IPv4Address

from gpud.model import Gpu, Grant, Host, NumaNode, PciAddress, Shape


def remaining(host: Host, grants: Iterable[Grant]) -> Host:
    """What is left of ``host`` when every grant of a live instance is taken off; never below zero.

    Cores and memory that a grant has from no node, or from one that has not so much (any more), are
    taken from the nodes in order: they are in use somewhere, and must not be sold twice.
    """
    held = list(grants)
    return less(
        host,
        shapes=[grant.shape for grant in held],
        gpus=[gpu for grant in held for gpu in grant.gpus],
        nodes=[node for grant in held for node in grant.nodes],
        addresses={grant.address for grant in held},
    )


def less(
    host: Host,
    shapes: Sequence[Shape],
    gpus: Sequence[Gpu],
    nodes: Sequence[NumaNode],
    addresses: Collection[IPv4Address | None],
) -> Host:
    """The host without these shapes, GPUs, addresses, and without what was drawn from these nodes."""
    free = host.addresses
    return Host(
        gpus=_untouched(host.gpus, {function for gpu in gpus for function in _functions(gpu)}),
        nodes=undrawn(
            host.nodes,
            nodes,
            cpu_cores=sum(shape.cpu_cores for shape in shapes),
            memory_mib=sum(shape.memory_mib for shape in shapes),
        ),
        storage_gib=max(0, host.storage_gib - sum(shape.storage_gib for shape in shapes)),
        addresses=None if free is None else tuple(one for one in free if one not in addresses),
    )


def _functions(gpu: Gpu) -> tuple[PciAddress, ...]:
    return (gpu.address, *gpu.functions)


def _untouched(gpus: Sequence[Gpu], taken: Collection[PciAddress]) -> tuple[Gpu, ...]:
    """The GPUs of which no function is taken, nor any of another GPU in the same bundle."""
    touched = {gpu for gpu in gpus if any(function in taken for function in _functions(gpu))}
    bundles = {gpu.bundle for gpu in touched if gpu.bundle}
    return tuple(gpu for gpu in gpus if gpu not in touched and gpu.bundle not in bundles)


def undrawn(
    nodes: Sequence[NumaNode], drawn: Sequence[NumaNode], cpu_cores: int, memory_mib: int
) -> tuple[NumaNode, ...]:
    """The nodes less what was drawn from them, ``cpu_cores`` and ``memory_mib`` in all."""
    cores, memory = Counter[int](), Counter[int]()
    for node in drawn:
        cores[node.number] += node.cpu_cores
        memory[node.number] += node.memory_mib
    taken = zip(
        split(cpu_cores, [(node.cpu_cores, cores[node.number]) for node in nodes]),
        split(memory_mib, [(node.memory_mib, memory[node.number]) for node in nodes]),
        strict=True,
    )
    return tuple(
        NumaNode(node.number, node.cpu_cores - less_cores, node.memory_mib - less_memory)
        for node, (less_cores, less_memory) in zip(nodes, taken, strict=True)
    )


def split(amount: int, sources: Sequence[tuple[int, int]]) -> list[int]:
    """Take ``amount`` from sources of (what it has, its share): the shares, then the rest in order."""
    taken = [min(has, share) for has, share in sources]
    short = amount - sum(taken)
    for number, (has, _) in enumerate(sources):
        more = max(0, min(short, has - taken[number]))
        taken[number] += more
        short -= more
    return taken
