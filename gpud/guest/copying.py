"""Copying a large file while hashing it: the digest is that of the bytes that were really written."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Final

from gpud.errors import Code, GpudError

Progress = Callable[[int, int], object]
"""Told of bytes done and bytes in all, on the event loop."""

_CHUNK_BYTES: Final = 2**20
_FICLONE: Final = 0x40049409
"""ioctl that shares another file's blocks (``man 2 ioctl_ficlone``); XFS and Btrfs have it."""


class _AbandonedError(Exception):
    """Nobody waits for the digest any more."""


async def copy(source: Path, target: Path, progress: Progress | None = None) -> str:
    """Copy ``source`` to a new file ``target``, flushed to disk; holes stay holes.

    Returns:
        SHA-256 (hex) of the bytes in ``target``.

    Raises:
        GpudError: ``image_invalid`` when ``source`` cannot be read or is no regular file.
        OSError: ``target`` cannot be written.
    """
    return await _in_thread(lambda report: _copy(source, target, report), progress)


async def sha256(path: Path, progress: Progress | None = None) -> str:
    """Read a file to its end and return its SHA-256 (hex).

    Raises:
        GpudError: ``image_invalid`` when ``path`` cannot be read or is no regular file.
    """
    return await _in_thread(lambda report: _sha256(path, report), progress)


async def _in_thread(work: Callable[[Progress], str], progress: Progress | None) -> str:
    loop = asyncio.get_running_loop()
    abandoned = threading.Event()

    def report(done: int, total: int) -> None:
        if abandoned.is_set():
            raise _AbandonedError
        if progress is not None:
            loop.call_soon_threadsafe(progress, done, total)

    try:
        return await asyncio.to_thread(work, report)
    finally:
        abandoned.set()  # a thread cannot be cancelled: it stops at its next chunk


def _copy(source: Path, target: Path, report: Progress) -> str:
    with _regular_file(source) as reader, target.open("xb+") as writer:
        if _share_blocks(reader, writer):
            return _digest(writer, None, report)
        digest = _digest(reader, writer, report)
        writer.flush()
        os.fsync(writer.fileno())
        return digest


def _sha256(path: Path, report: Progress) -> str:
    with _regular_file(path) as reader:
        return _digest(reader, None, report)


@contextlib.contextmanager
def _regular_file(path: Path) -> Iterator[IO[bytes]]:
    try:
        # A FIFO in its place must not stop us at open().
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise GpudError(Code.IMAGE_INVALID, f"{path} cannot be read: {error.strerror}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise GpudError(Code.IMAGE_INVALID, f"{path} is not a regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            yield stream
    finally:
        os.close(descriptor)


def _share_blocks(reader: IO[bytes], writer: IO[bytes]) -> bool:
    try:
        fcntl.ioctl(writer.fileno(), _FICLONE, reader.fileno())
    except OSError:  # another file system, or one that cannot
        return False
    os.fsync(writer.fileno())
    return True


def _digest(reader: IO[bytes], writer: IO[bytes] | None, report: Progress) -> str:
    total = os.fstat(reader.fileno()).st_size
    digest = hashlib.sha256()
    done = 0
    while chunk := reader.read(_CHUNK_BYTES):
        digest.update(chunk)
        if writer is not None:
            _write_or_leave_hole(writer, chunk)
        done += len(chunk)
        report(done, total)
    if writer is not None:
        writer.truncate(done)  # a hole at the end is not there yet
    return digest.hexdigest()


def _write_or_leave_hole(writer: IO[bytes], chunk: bytes) -> None:
    if chunk == bytes(len(chunk)):
        writer.seek(len(chunk), os.SEEK_CUR)
    else:
        writer.write(chunk)
