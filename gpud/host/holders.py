"""Who has a GPU open: the processes that would keep its driver from letting go of it.

``/proc/PID/fd`` shows an ordinary user only that user's own processes, so what is found here is
certain and what is not found proves nothing. For the daemons that are known to keep every NVIDIA GPU
open, their running is taken as proof; NVML's list of processes tells of the others.

Of these daemons ``nvidia-persistenced`` is one only where it keeps a GPU in persistence mode: started
with ``--no-persistence-mode``, as distributions do, it has none open (its manual page).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from gpud.host.pci import NVIDIA_DRIVER, PciFunction
from gpud.host.sysfs import DEVICES, Sysfs
from gpud.model import PciAddress

_NAME_CHARS: Final = 15
"""All the kernel keeps of a process's name."""
_PERSISTENCED: Final = "nvidia-persistenced"[:_NAME_CHARS]
_KEEPERS: Final = {_PERSISTENCED, "nv-hostengine"[:_NAME_CHARS], "dcgm-exporter"[:_NAME_CHARS]}
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
    """A process that holds a PCI function open.

    Attributes:
        mend: What makes it let go.
    """

    pid: int
    name: str
    mend: str = "stop that first"


@dataclass(frozen=True, slots=True)
class _Running:
    """A process of the host.

    Attributes:
        opened: What it has open below ``/dev``; None if that is not for this user to know.
    """

    pid: int
    name: str
    parent: int
    opened: frozenset[str] | None


class Holders:
    """Who has what open at one moment: all processes are looked at once, however many cards there are.

    gpud itself and its children are left out, and theirs: NVML's readers have every GPU open.

    Args:
        proc: Where procfs is.
        used_by: What NVML says of processes that use a GPU.
        persistence_off: The GPUs of which NVML says that nothing keeps them in persistence mode.
    """

    def __init__(
        self,
        proc: Path,
        used_by: Mapping[PciAddress, Sequence[Process]],
        persistence_off: Collection[PciAddress] = (),
    ) -> None:
        self._proc = proc
        self._used_by = used_by
        self._persistence_off = frozenset(persistence_off)
        self._running = _strangers({one.pid: one for one in _processes(proc)})

    def of(self, sysfs: Sysfs, function: PciFunction) -> tuple[Holder, ...]:
        """The processes that have a function open, by their numbers."""
        wanted = nodes(sysfs, self._proc, function.address, function.iommu_group)
        keepers = self._keepers(function)
        told = self._used_by.get(function.address, ())
        found = {one.pid: Holder(one.pid, one.name) for one in told}
        for one in self._running:
            if one.opened is None and one.name in keepers:
                found[one.pid] = Holder(one.pid, one.name, _mend(one.name, function.address))
            elif _any_wanted(one.opened or (), wanted):
                found[one.pid] = Holder(one.pid, one.name)
        return tuple(sorted(found.values()))

    def _keepers(self, function: PciFunction) -> set[str]:
        """The daemons that hold a function for as long as they run."""
        if function.driver != NVIDIA_DRIVER:
            return set()
        return _KEEPERS - ({_PERSISTENCED} if function.address in self._persistence_off else set())


def nodes(sysfs: Sysfs, proc: Path, address: PciAddress, group: int | None) -> frozenset[str]:
    """The device nodes through which a function is used.

    Returns:
        Paths where they are known (``/dev/nvidia0``, ``/dev/vfio/12``), else a node's bare name
        (``nvme0n1``, ``card1``), which is that of its directory in sysfs.
    """
    found = set(node_names(sysfs, address))
    told = _text(proc / "driver/nvidia/gpus" / str(address) / "information")
    if minor := _MINOR.search(told):
        found.add(f"/dev/nvidia{minor[1]}")
    if group is not None:
        found.add(f"/dev/vfio/{group}")
    return frozenset(found)


def node_names(sysfs: Sysfs, address: PciAddress) -> Iterator[str]:
    """Names of the directories below a function that stand for device nodes: they hold a ``dev``."""
    for directory, _, files in os.walk((sysfs.root / DEVICES / str(address)).resolve()):
        if "dev" in files:
            yield Path(directory).name


def _mend(keeper: str, address: PciAddress) -> str:
    if keeper == _PERSISTENCED:
        return f"nvidia-smi -i {address} -pm 0, or stop nvidia-persistenced"
    return "stop that first"


def _strangers(running: Mapping[int, _Running]) -> tuple[_Running, ...]:
    """Those that are neither this process nor came of it."""
    return tuple(one for one in running.values() if os.getpid() not in _line(one, running))


def _line(one: _Running, running: Mapping[int, _Running]) -> list[int]:
    """The numbers of a process and of all that it came of."""
    line = [one.pid, one.parent]
    while line[-1] in running and running[line[-1]].parent not in line:
        line.append(running[line[-1]].parent)
    return line


def _processes(proc: Path) -> Iterator[_Running]:
    for directory in proc.iterdir():
        if not directory.name.isdecimal():
            continue
        # A name may hold anything, brackets too; the fields behind it hold none.
        before, _, after = _text(directory / "stat").rpartition(")")
        fields = after.split()
        if len(fields) > 1:  # else it has ended
            name = before.partition("(")[2]
            yield _Running(int(directory.name), name, int(fields[1]), _opened(directory))


def _opened(process: Path) -> frozenset[str] | None:
    try:
        links = os.listdir(process / "fd")  # noqa: PTH208 - a server has many thousands of them
    except FileNotFoundError:  # it has ended
        return frozenset()
    except OSError:
        return None
    targets = (_target(f"{process}/fd/{link}") for link in links)
    return frozenset(target for target in targets if target.startswith("/dev/"))


def _any_wanted(opened: Iterable[str], wanted: frozenset[str]) -> bool:
    return any(path in wanted or path.rpartition("/")[2] in wanted for path in opened)


def _target(link: str) -> str:
    """Where a link points. Only its text is read: following it could wait on somebody's dead NFS."""
    try:
        return os.readlink(link)  # noqa: PTH115
    except OSError:
        return ""


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
