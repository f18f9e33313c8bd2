from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from gpud.errors import Code, GpudError
from gpud.guest import copying

MIB = 2**20


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Data, a hole of 8 MiB, data, and a hole at the end."""
    path = tmp_path / "source"
    with path.open("wb") as stream:
        stream.write(b"head")
        stream.seek(9 * MIB)
        stream.write(b"tail")
        stream.truncate(20 * MIB)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_copy_is_equal_hashed_and_as_sparse(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    digest = await copying.copy(source, target)

    assert sha256(target) == sha256(source)
    assert digest == sha256(source)
    assert os.stat(target).st_blocks * 512 <= 3 * MIB  # noqa: PTH116


async def test_progress_is_told_on_the_event_loop(source: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    threads: set[threading.Thread] = set()

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        threads.add(threading.current_thread())

    await copying.copy(source, tmp_path / "target", progress)

    assert told == [(done * MIB, 20 * MIB) for done in range(1, 21)]
    assert threads == {threading.main_thread()}


async def test_blocks_are_shared_where_the_file_system_can(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(target: int, request: int, origin: int) -> int:
        assert request == 0x40049409
        os.pwrite(target, os.pread(origin, 100 * MIB, 0), 0)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", share)  # what XFS and Btrfs do
    monkeypatch.setattr(copying, "_write_or_leave_hole", lambda *_: pytest.fail("copied again"))

    digest = await copying.copy(source, tmp_path / "target")

    assert digest == sha256(source) == sha256(tmp_path / "target")


async def test_cancelled_copy_stops_at_its_next_chunk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, go_on, left = threading.Event(), threading.Event(), threading.Event()
    really_write, really_copy = copying._write_or_leave_hole, copying._copy
    chunks: list[int] = []

    def write(writer: Any, chunk: bytes) -> None:
        really_write(writer, chunk)
        chunks.append(len(chunk))
        copied.set()
        go_on.wait(5)

    def copy(*args: Any) -> str:
        try:
            return really_copy(*args)
        finally:
            left.set()

    monkeypatch.setattr(copying, "_write_or_leave_hole", write)
    monkeypatch.setattr(copying, "_copy", copy)
    task = asyncio.create_task(copying.copy(source, tmp_path / "target"))
    await asyncio.to_thread(copied.wait, 5)

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()

    assert await asyncio.to_thread(left.wait, 5)
    assert chunks == [MIB]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, Path.exists])
async def test_only_a_readable_regular_file_is_read(make: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd"
    make(path)

    with pytest.raises(GpudError, match=str(path)) as caught:
        await copying.sha256(path)

    assert caught.value.code is Code.IMAGE_INVALID


async def test_an_existing_target_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").write_bytes(b"precious")

    with pytest.raises(FileExistsError):
        await copying.copy(source, tmp_path / "target")

    assert (tmp_path / "target").read_bytes() == b"precious"
