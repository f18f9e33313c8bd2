"""How much of this host there is for guests: cores, memory, disk. Pure reading, cheap to repeat.

Cores and memory are told by NUMA node (kernel: Documentation/ABI/stable/sysfs-devices-node). A node
may have cores and no memory, or memory and no cores (a CXL expander, HBM).
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError
from gpud.model import NumaNode

_CPU_LINE: Final = re.compile(r"^cpu\d+ ", re.MULTILINE)
_MEM_TOTAL: Final = re.compile(r"^(?:Node \d+ )?MemTotal:\s+(\d+) kB$", re.MULTILINE)
_POOL: Final = re.compile(r"hugepages-(\d+)kB")
_NODES: Final = "devices/system/node"
_INSTANCES: Final = "instances"
_BLOCK_BYTES: Final = 512
"""Unit of ``st_blocks``, whatever the file system's own block size (``man 3 stat``)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What guests could have if there were none, the operator's reserve still in it.

    Attributes:
        nodes: CPUs that are online, as the kernel counts them (hardware threads), and memory.
        storage_gib: Disk space that is free or taken by instances already.
    """

    nodes: tuple[NumaNode, ...]
    storage_gib: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system of the state directory.

    Attributes:
        size_bytes: All of it.
        free_bytes: What gpud and guests may still write.
        instances_bytes: What instances' files take up.
    """

    size_bytes: int
    free_bytes: int
    instances_bytes: int


def measure(
    state_dir: Path,
    hugepage_kib: int | None = None,
    *,
    proc: Path = Path("/proc"),
    sysfs: Path = Path("/sys"),
) -> Capacity:
    """Read the host's capacity. A host without NUMA is one node, number 0.

    Args:
        state_dir: Where the instances' files are; its file system is the one that counts.
        hugepage_kib: Size of the huge pages that guests' memory is made of: their pool is what
            counts. None for ordinary pages: all memory counts that is in no pool.
        proc: Where procfs is.
        sysfs: Where sysfs is.

    Raises:
        GpudError: ``state_unusable`` when the host cannot be read.
    """
    try:
        return Capacity(
            nodes=_numa_nodes(sysfs, hugepage_kib) or (_whole_host(proc, sysfs, hugepage_kib),),
            storage_gib=(_free_bytes(state_dir) + _instances_bytes(state_dir)) // 2**30,
        )
    except (OSError, ValueError) as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"the capacity of this host cannot be read: {error}"
        ) from error


def disk(state_dir: Path) -> Disk:
    """Read how full the file system of the state directory is.

    Raises:
        OSError: It cannot be read.
    """
    found = os.statvfs(state_dir)
    size_bytes = found.f_blocks * found.f_frsize
    return Disk(size_bytes, _free_bytes(state_dir), _instances_bytes(state_dir))


def cpus(node: int, sysfs: Path = Path("/sys")) -> str:
    """The CPUs of a node that are online, as the kernel lists them: ``0-31,64-95``; maybe none.

    Raises:
        GpudError: ``state_unusable`` when the host has no such node.
    """
    try:
        if not _numbered(sysfs) and node == 0:
            return (sysfs / "devices/system/cpu/online").read_text().strip()
        return (sysfs / _NODES / f"node{node}" / "cpulist").read_text().strip()
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"the CPUs of NUMA node {node} cannot be read: {error}"
        ) from error


def reserve(nodes: Sequence[NumaNode], cpu_cores: int, memory_mib: int) -> tuple[NumaNode, ...]:
    """Take off what the host keeps for itself, from all nodes alike as far as they have it.

    Args:
        nodes: As measured.
        cpu_cores: To keep, in all.
        memory_mib: To keep, in all; 0 where guests live in huge pages, which the host does not use.
    """
    cores = _even_parts(cpu_cores, [node.cpu_cores for node in nodes])
    memory = _even_parts(memory_mib, [node.memory_mib for node in nodes])
    return tuple(
        NumaNode(node.number, node.cpu_cores - kept_cores, node.memory_mib - kept_memory)
        for node, kept_cores, kept_memory in zip(nodes, cores, memory, strict=True)
    )


def _even_parts(amount: int, sources: Sequence[int]) -> list[int]:
    """Equal parts of ``amount``, one more of the first; where a source has less, others give more."""
    parts = [0] * len(sources)
    smallest_first = sorted(range(len(sources)), key=lambda number: (sources[number], -number))
    for done, number in enumerate(smallest_first):
        parts[number] = min(sources[number], amount // (len(sources) - done))
        amount -= parts[number]
    return parts


def _numbered(sysfs: Path) -> list[tuple[int, Path]]:
    """The nodes' directories by number; none where the kernel knows no NUMA."""
    found = (sysfs / _NODES).glob("node[0-9]*")
    return sorted((int(directory.name.removeprefix("node")), directory) for directory in found)


def _numa_nodes(sysfs: Path, hugepage_kib: int | None) -> tuple[NumaNode, ...]:
    return tuple(
        NumaNode(
            number,
            _count((node / "cpulist").read_text()),
            _memory_mib(node / "meminfo", node / "hugepages", hugepage_kib),
        )
        for number, node in _numbered(sysfs)
    )


def _whole_host(proc: Path, sysfs: Path, hugepage_kib: int | None) -> NumaNode:
    return NumaNode(
        0,
        len(_CPU_LINE.findall((proc / "stat").read_text())),
        _memory_mib(proc / "meminfo", sysfs / "kernel/mm/hugepages", hugepage_kib),
    )


def _count(cpulist: str) -> int:
    """CPUs in a list such as ``0-31,64-95``."""
    spans = (span.split("-") for span in cpulist.strip().split(",") if span)
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def _memory_mib(meminfo: Path, pools: Path, hugepage_kib: int | None) -> int:
    """What the pool of the size holds; without a size, what is left beside all pools."""
    pools_kib = {
        int(found[1]): int(found[1]) * int((pool / "nr_hugepages").read_text())
        for pool in pools.glob("hugepages-*kB")
        if (found := _POOL.fullmatch(pool.name))
    }
    if hugepage_kib is not None:
        return pools_kib.get(hugepage_kib, 0) // 1024
    total = _MEM_TOTAL.search(meminfo.read_text())
    if total is None:
        raise ValueError(f"{meminfo} has no MemTotal")
    return max(0, int(total[1]) - sum(pools_kib.values())) // 1024


def _free_bytes(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize  # less what is kept for root: neither gpud nor QEMU is


def _instances_bytes(state_dir: Path) -> int:
    """Space that comes back when all instances end.

    A file with a second link is a base image: it belongs to the image store and stays.
    """
    total = 0
    for file in state_dir.glob(f"{_INSTANCES}/*/*"):
        try:
            found = file.lstat()
        except FileNotFoundError:  # an instance ended meanwhile
            continue
        if found.st_nlink == 1:
            total += found.st_blocks * _BLOCK_BYTES
    return total
