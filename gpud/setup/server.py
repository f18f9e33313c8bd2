"""Where a server is looked at and changed; a test has a directory in its place."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError
from gpud.host.sysfs import Sysfs

LOCK: Final = "/run/gpud-setup.lock"


@dataclass(frozen=True)
class Server:
    """The places.

    Attributes:
        root: What ``/`` is.
        sysfs: ``/sys``.
        uid: Of who asks.
    """

    root: Path = Path("/")
    sysfs: Sysfs = field(default_factory=Sysfs)
    uid: int = field(default_factory=os.geteuid)

    @property
    def is_root(self) -> bool:
        """Whether who asks may change the host."""
        return self.uid == 0

    def at(self, path: str) -> Path:
        """Where the file of that absolute path is."""
        return self.root / path.removeprefix("/")

    def text(self, path: str) -> str:
        """A file's content; empty where it cannot be read."""
        try:
            return self.at(path).read_text(errors="replace")
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or directory."""
        return self.at(path).exists()

    def names(self, directory: str) -> list[str]:
        """What is in a directory, sorted; nothing where there is none."""
        try:
            return sorted(one.name for one in self.at(directory).iterdir())
        except OSError:
            return []

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Change it while nobody else's ``gpud setup`` does.

        Raises:
            GpudError: Another one is at it.
        """
        path = self.at(LOCK)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise GpudError(
                    Code.HOST_COMMAND_FAILED,
                    "another gpud setup is changing this server",
                    hint="wait until it has ended",
                ) from None
            yield
