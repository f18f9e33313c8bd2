"""What guests print on their serial consoles, kept up to a limit.

A console may show whatever the tenant prints, so the files are readable by the daemon's user alone.
They outlive a failed instance, for the person who has to find out why, until it is deleted.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpud.model import UPSTREAM_ID


class ConsoleLogs:
    """One log for each guest, as two files that take turns: the newer half and the older half.

    Args:
        directory: Where the files are; made on first use.
        limit_bytes: How much of one guest's output is kept at most.
    """

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._half_bytes = limit_bytes // 2

    def append(self, upstream_id: str, output: bytes) -> None:
        """Add what a guest has printed."""
        newer, older = self._files(upstream_id)
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        output = output[-self._half_bytes :]
        if newer.exists() and newer.stat().st_size + len(output) > self._half_bytes:
            newer.replace(older)
        descriptor = os.open(newer, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "ab") as log:  # noqa: PTH123 - a descriptor, not a path
            log.write(output)

    def read(self, upstream_id: str) -> bytes:
        """All that is kept of a guest's output; empty when there is none."""
        newer, older = self._files(upstream_id)
        return b"".join(file.read_bytes() for file in (older, newer) if file.exists())

    def size(self, upstream_id: str) -> int:
        """Bytes kept of a guest's output."""
        return sum(file.stat().st_size for file in self._files(upstream_id) if file.exists())

    def remove(self, upstream_id: str) -> None:
        """Forget a guest's output."""
        for file in self._files(upstream_id):
            file.unlink(missing_ok=True)

    def kept(self) -> set[str]:
        """The guests of which there is output."""
        if not self._directory.is_dir():
            return set()
        names = {file.name.partition(".")[0] for file in self._directory.iterdir()}
        return {name for name in names if UPSTREAM_ID.fullmatch(name)}

    def _files(self, upstream_id: str) -> tuple[Path, Path]:
        if UPSTREAM_ID.fullmatch(upstream_id) is None:
            raise ValueError(f"{upstream_id!r} is not an upstream_id")
        return self._directory / f"{upstream_id}.log", self._directory / f"{upstream_id}.log.1"
