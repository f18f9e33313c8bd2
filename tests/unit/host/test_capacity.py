from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpud.errors import Code, GpudError
from gpud.guest.disk import InstanceFiles
from gpud.host.capacity import Capacity, measure

GIB = 2**30
STAT = """\
cpu  10132153 290696 3084719 46828483 16683 0 25195 0 0 0
cpu0 1393280 32966 572056 13343292 6130 0 17875 0 0 0
cpu2 1393280 32966 572056 13343292 6130 0 17875 0 0 0
cpu11 1335498 28612 530304 13348158 5822 0 3137 0 0 0
intr 1462898 125 0 0
ctxt 115315
"""
MEMINFO = """\
MemTotal:       65843976 kB
MemFree:        61210380 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    directory = tmp_path / "proc"
    directory.mkdir()
    (directory / "stat").write_text(STAT)
    (directory / "meminfo").write_text(MEMINFO)
    return directory


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A file system of which 100 GiB are free for ordinary users, and 5 more for root."""
    found = SimpleNamespace(f_frsize=4096, f_bavail=100 * GIB // 4096, f_bfree=105 * GIB // 4096)
    monkeypatch.setattr(os, "statvfs", lambda _: found)
    return found


@pytest.mark.usefixtures("free")
def test_counts_online_cpus_and_memory_and_what_users_may_fill(state_dir: Path, proc: Path) -> None:
    assert measure(state_dir, proc) == Capacity(
        cpu_cores=3, memory_mib=65843976 // 1024, storage_gib=100
    )


@pytest.mark.usefixtures("free")
def test_memory_in_huge_pages_is_not_counted(state_dir: Path, proc: Path) -> None:
    (proc / "meminfo").write_text(MEMINFO + f"Hugetlb:        {16 * 2**20} kB\n")

    assert measure(state_dir, proc).memory_mib == 65843976 // 1024 - 16 * 1024


def test_disk_taken_by_instances_counts_but_not_their_base_image(
    state_dir: Path, proc: Path, free: Any
) -> None:
    free.f_bavail = 10 * GIB // 4096 - 512  # 2 MiB short of 10 GiB
    files = InstanceFiles.of(state_dir, "i-0123456789abcdef")
    files.directory.mkdir(parents=True)
    image = state_dir / "image"
    image.write_bytes(b"x" * 8 * 2**20)
    files.base.hardlink_to(image)
    assert measure(state_dir, proc).storage_gib == 9

    files.disk.write_bytes(b"x" * 2 * 2**20)

    assert measure(state_dir, proc).storage_gib == 10


@pytest.mark.usefixtures("free")
def test_instance_that_ends_meanwhile_is_left_out(
    state_dir: Path, proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda *_: iter([state_dir / "instances" / "gone" / "disk"]))

    assert measure(state_dir, proc).storage_gib == 100


@pytest.mark.parametrize("broken", ["no proc", "no state_dir", "no MemTotal"])
def test_an_unreadable_host_is_told(state_dir: Path, proc: Path, broken: str) -> None:
    if broken == "no MemTotal":
        (proc / "meminfo").write_text("")

    with pytest.raises(GpudError, match="capacity of this host") as caught:
        measure(
            state_dir / "gone" if broken == "no state_dir" else state_dir,
            proc / "gone" if broken == "no proc" else proc,
        )

    assert caught.value.code is Code.STATE_UNUSABLE


def test_this_very_machine_has_something(tmp_path: Path) -> None:
    found = measure(tmp_path)

    assert found.cpu_cores >= 1
    assert found.memory_mib > 0
