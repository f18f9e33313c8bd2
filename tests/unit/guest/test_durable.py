from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from gpud.guest.durable import commit, replacing, sync, temporary


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_file_appears_complete_with_its_mode_whatever_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "file"
    before = os.umask(0o077)
    try:
        with replacing(path, mode=0o644) as stream:
            stream.write(b"new")
            assert names(tmp_path) == ["file.new"]
    finally:
        os.umask(before)

    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert names(tmp_path) == ["file"]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    with replacing(tmp_path / "secret", mode=0o600):
        unfinished = temporary(tmp_path / "secret")
        assert stat.S_IMODE(unfinished.stat().st_mode) == 0o600


def test_failure_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with replacing(path, mode=0o600) as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()

    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_a_crash_left_behind_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"untouched")
    temporary(tmp_path / "file").symlink_to(victim)

    with replacing(tmp_path / "file", mode=0o600) as stream:
        stream.write(b"new")

    assert victim.read_bytes() == b"untouched"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_data_reaches_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acts: list[str] = []
    really_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        acts.append(f"{'names' if is_directory else 'data'}: {names(tmp_path)}")
        really_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)

    with replacing(tmp_path / "file", mode=0o600) as stream:
        stream.write(b"x")

    assert acts == ["data: ['file.new']", "names: ['file']"]


def test_sync_and_commit_need_what_they_are_given(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        commit(tmp_path / "gone", tmp_path / "file")
