"""Files that are either complete or absent, whatever moment the power fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

TEMPORARY_SUFFIX: Final = ".new"


def temporary(path: Path) -> Path:
    """Where ``path`` grows until it is complete: beside it, for a rename never leaves a file system."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextmanager
def replacing(path: Path, *, mode: int) -> Iterator[BinaryIO]:
    """Write a file that appears under its name at once and complete, or not at all.

    Args:
        path: Its name; what was there before is replaced.
        mode: Permissions, set before the first byte is written.
    """
    unfinished = temporary(path)
    unfinished.unlink(missing_ok=True)
    # Opened for reading too, since the ISO writer reads back what it wrote.
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            os.fchmod(descriptor, mode)  # not left to the umask
            yield stream
            stream.flush()
            os.fsync(descriptor)
        commit(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def commit(unfinished: Path, path: Path) -> None:
    """Give a finished file its name. Its data must be on disk already (``sync``)."""
    unfinished.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Force a file's data, or a directory's names, to disk (``fsync(2)``)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
