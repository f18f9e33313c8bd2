"""The edges of gpud's process, where it can be made to die, or a disk to fail.

A process that was killed does nothing more: not the handlers of its exceptions, nor what its threads had
still to do. In one process with its tests gpud cannot be killed, so its edges are: from its death on
every act on a file, on libvirt and on the kernel is refused, until the next life begins.

Acts on files are seen by an audit hook (PEP 578), hence those of libraries too; SQLite's are not, and
need not be, since a transaction is done or not done.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import ConnectionHandle, LibvirtDaemon, lost

T = TypeVar("T")

_CHANGES = {"os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Killed(BaseException):
    """Raised wherever a dead process tries to act."""


class Edges:
    """Where one gpud acts.

    Attributes:
        dead: Whether the process has been killed, and the next not yet begun.
        acts: How many acts there were so far.
        changes: How many of them changed a file.
    """

    def __init__(self, state_dir: Path) -> None:
        self.dead = False
        self.acts = 0
        self.changes = 0
        self._own = tuple(f"{state_dir}/{name}" for name in ("images", "instances", "console"))
        self._acts_left: int | None = None
        self._disk_faults: list[int] = []
        self._lock = threading.Lock()

    @property
    def armed(self) -> bool:
        """Whether a death or a failure that was prepared has not come yet."""
        return self._acts_left is not None or any(self._disk_faults)

    def die_at(self, act: int) -> None:
        """Kill the process right before that act, counted from now; 1 is the next."""
        self._acts_left = act

    def disarm(self) -> bool:
        """Take :meth:`die_at` back; True when the process is dead already."""
        with self._lock:
            self._acts_left = None
            return self.dead

    def die(self) -> None:
        self.dead = True

    def live(self) -> None:
        """Begin the next life."""
        self.dead = False

    def fail_writes(self, number: int, times: int) -> None:
        """Refuse the next changes of files with this ``errno``."""
        self._disk_faults = [number] * times

    def fail_change_at(self, change: int, number: int) -> None:
        """Refuse one change of a file with this ``errno``, counted from now; 1 is the next."""
        self._disk_faults = [number, *[0] * (change - 1)]

    def heal(self) -> None:
        self._disk_faults = []

    def act(self) -> None:
        """Come to an act.

        Raises:
            Killed: The process is dead, or dies here.
        """
        with self._lock:
            if self.dead:
                raise Killed
            self.acts += 1
            if self._acts_left is None:
                return
            self._acts_left -= 1
            if self._acts_left <= 0:
                self.dead, self._acts_left = True, None
                raise Killed

    def sees(self, event: str, args: tuple[Any, ...]) -> None:
        """Judge an audit event."""
        path = _changed(event, args)
        if path is None or not path.startswith(self._own):
            return
        self.act()
        with self._lock:
            self.changes += 1
            number = self._disk_faults.pop() if self._disk_faults else 0
        if number:
            raise OSError(number, os.strerror(number), path)


class MortalLibvirtd(LibvirtDaemon):
    """A libvirtd whose client may die before a call, or between it and its answer.

    Attributes:
        answered: How many calls there were so far.
    """

    def __init__(self, edges: Edges) -> None:
        super().__init__()
        self.answered = 0
        self._edges = edges
        self._fails_at: int | None = None
        self._fails_with: Callable[[], Exception] = lost
        self._fails_after = False

    @property
    def armed(self) -> bool:
        """Whether a call that is to fail has not come yet."""
        return self._fails_at is not None and self.answered < self._fails_at

    def fail_call_at(self, call: int, raises: Callable[[], Exception], *, after: bool) -> None:
        """Let one call fail, counted from now, 1 being the next; ``after`` it was done, if so wanted."""
        self._fails_at, self._fails_with = self.answered + call, raises
        self._fails_after = after

    def heal(self) -> None:
        super().heal()
        self._fails_at = None

    def open(self, uri: str) -> ConnectionHandle:
        self._edges.act()
        return super().open(uri)

    def answer(self, call: str, connection: ConnectionHandle, act: Callable[[], T]) -> T:
        self._edges.act()
        self.answered += 1
        fails = self.answered == self._fails_at
        if fails and not self._fails_after:
            raise self._fails_with()
        answer = super().answer(call, connection, act)
        self._edges.act()
        if fails:
            raise self._fails_with()
        return answer


def make_mortal(kernel: FakeKernel, edges: Edges) -> None:
    """Let the process die before its writes to sysfs, too. The kernel finishes what it was told."""
    write = kernel.write

    async def mortal(file: Path, text: str, timeout_s: float) -> None:
        edges.act()
        await write(file, text, timeout_s)

    kernel.write = mortal  # type: ignore[method-assign]


def watch(edges: Edges | None) -> None:
    """Have the files' edge watched for one gpud; None ends that."""
    _HOOK.edges = edges


class _Hook:
    """An audit hook cannot be removed, hence one for the whole run, and a switch."""

    def __init__(self) -> None:
        self.edges: Edges | None = None
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if self.edges is not None and (event in _CHANGES or event == "open"):
            self.edges.sees(event, args)


_HOOK = _Hook()


def _changed(event: str, args: tuple[Any, ...]) -> str | None:
    """The path that an audit event is about to change."""
    if event == "open" and not (isinstance(args[2], int) and args[2] & _WRITES):
        return None
    path = args[1] if event in {"os.link", "os.rename"} else args[0]
    if isinstance(path, int):
        return None
    text = os.fsdecode(path)
    if event in {"os.remove", "os.rmdir"} and args[1] != -1:
        return f"{Path(f'/proc/self/fd/{args[1]}').readlink()}/{text}"
    return text
