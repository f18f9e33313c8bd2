"""Who has a GPU open: the processes that would keep its driver from letting go of it.

``/proc/PID/fd`` shows an ordinary user only that user's own processes, so what is found here is
certain and what is not found proves nothing. For the daemons that are known to keep every NVIDIA GPU
open, their running is taken as proof; NVML's list of processes tells of the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from gpud.host.sysfs import DEVICES, Sysfs
from gpud.model import PciAddress

_KEEPERS: Final = frozenset(
    name[:15]  # all the kernel keeps of a name
    for name in ("nvidia-persistenced", "nv-hostengine", "dcgm-exporter")
)
_MINOR: Final = re.compile(r"^Device Minor:\s*(\d+)", re.MULTILINE)


class Process(Protocol):
    """A process that uses a GPU, whoever found it."""

    @property
    def pid(self) -> int:
        """Its number on the host."""
        ...

    @property
    def name(self) -> str:
        """What it is called."""
        ...


@dataclass(frozen=True, slots=True, order=True)
class Holder:
    """A process that holds a PCI function's device node open."""

    pid: int
    name: str


def nodes(sysfs: Sysfs, proc: Path, address: PciAddress, group: int | None) -> frozenset[str]:
    """The device nodes through which a function is used.

    Returns:
        Paths where they are known (``/dev/nvidia0``, ``/dev/vfio/12``), else a node's bare name
        (``nvme0n1``, ``card1``), which is that of its directory in sysfs.
    """
    found = set(_names_below(sysfs.root / DEVICES / str(address)))
    told = _text(proc / "driver/nvidia/gpus" / str(address) / "information")
    if minor := _MINOR.search(told):
        found.add(f"/dev/nvidia{minor[1]}")
    if group is not None:
        found.add(f"/dev/vfio/{group}")
    return frozenset(found)


def holders(proc: Path, wanted: frozenset[str], *, nvidia: bool) -> tuple[Holder, ...]:
    """The processes that have one of the nodes open, this one and its children left out.

    Args:
        proc: Where procfs is.
        wanted: What ``nodes`` found.
        nvidia: Whether NVIDIA's driver has the function, so that its daemons hold it.
    """
    return tuple(sorted(_holders(proc, wanted, nvidia=nvidia)))


def _holders(proc: Path, wanted: frozenset[str], *, nvidia: bool) -> Iterator[Holder]:
    own = os.getpid()
    for process in proc.iterdir():
        if not process.name.isdecimal() or own in {int(process.name), _parent(process)}:
            continue
        name = _text(process / "comm").strip()
        opened = _opened(process)
        keeps = opened is None and nvidia and name in _KEEPERS
        if keeps or _any_wanted(opened or (), wanted):
            yield Holder(int(process.name), name)


def _parent(process: Path) -> int | None:
    """The parent's number: the second field after the name, which may hold anything in brackets."""
    fields = _text(process / "stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 else None


def _opened(process: Path) -> list[str] | None:
    """What a process has open; None if that is not for this user to know."""
    try:
        return [_target(link) for link in (process / "fd").iterdir()]
    except FileNotFoundError:  # it has ended
        return []
    except OSError:
        return None


def _any_wanted(opened: Iterable[str], wanted: frozenset[str]) -> bool:
    return any(
        path in wanted or path.rpartition("/")[2] in wanted
        for path in opened
        if path.startswith("/dev/")
    )


def _target(link: Path) -> str:
    """Where a link points. Only its text is read: following it could wait on somebody's dead NFS."""
    try:
        return os.fspath(link.readlink())
    except OSError:
        return ""


def _names_below(function: Path) -> Iterator[str]:
    """Names of the directories below a function that stand for device nodes: they hold a ``dev``."""
    for directory, _, files in os.walk(function.resolve()):
        if "dev" in files:
            yield Path(directory).name


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
