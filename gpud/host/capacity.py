"""How much of this host there is for guests: cores, memory, disk. Pure reading, cheap to repeat."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError

_CPU_LINE: Final = re.compile(r"^cpu\d+ ", re.MULTILINE)
_MEMINFO_LINE: Final = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_INSTANCES: Final = "instances"
_BLOCK_BYTES: Final = 512
"""Unit of ``st_blocks``, whatever the file system's own block size (``man 3 stat``)."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What guests could have if there were none, the operator's reserve still in it.

    Attributes:
        cpu_cores: CPUs that are online, as the kernel counts them (hardware threads).
        memory_mib: Memory, less what is set aside as huge pages.
        storage_gib: Disk space that is free or taken by instances already.
    """

    cpu_cores: int
    memory_mib: int
    storage_gib: int


def measure(state_dir: Path, proc: Path = Path("/proc")) -> Capacity:
    """Read the host's capacity.

    Args:
        state_dir: Where the instances' files are; its file system is the one that counts.
        proc: Where procfs is.

    Raises:
        GpudError: ``state_unusable`` when the host cannot be read.
    """
    try:
        return Capacity(
            cpu_cores=len(_CPU_LINE.findall((proc / "stat").read_text())),
            memory_mib=_memory_mib((proc / "meminfo").read_text()),
            storage_gib=(_free_bytes(state_dir) + _instances_bytes(state_dir)) // 2**30,
        )
    except (OSError, KeyError) as error:
        raise GpudError(
            Code.STATE_UNUSABLE, f"the capacity of this host cannot be read: {error}"
        ) from error


def _memory_mib(meminfo: str) -> int:
    kib = {key: int(value) for key, value in _MEMINFO_LINE.findall(meminfo)}
    # Pages of a huge page pool serve nobody who does not ask for them.
    return (kib["MemTotal"] - kib.get("Hugetlb", 0)) // 1024


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
