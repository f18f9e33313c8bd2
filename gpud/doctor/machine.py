"""Where a server is looked at; a test has a directory in its place."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from gpud.host.sysfs import Sysfs


@dataclass(frozen=True)
class Machine:
    """The places.

    Attributes:
        uid: Of who looks.
    """

    sysfs: Sysfs = field(default_factory=Sysfs)
    proc: Path = Path("/proc")
    dev: Path = Path("/dev")
    uid: int = field(default_factory=os.geteuid)

    @property
    def is_root(self) -> bool:
        """Whether who looks may see all."""
        return self.uid == 0

    def text(self, path: str) -> str:
        """A file of procfs; empty where it cannot be read."""
        try:
            return (self.proc / path).read_text(errors="replace")
        except OSError:
            return ""
