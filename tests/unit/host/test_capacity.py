from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.errors import Code, GpudError
from gpud.guest.disk import InstanceFiles
from gpud.host.capacity import Capacity, cpus, measure, reserve
from gpud.model import NumaNode

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


NODE_MEMINFO = """\
Node {0} MemTotal:       {1} kB
Node {0} MemFree:        100 kB
Node {0} HugePages_Total:     0
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    directory = tmp_path / "proc"
    directory.mkdir()
    (directory / "stat").write_text(STAT)
    (directory / "meminfo").write_text(MEMINFO)
    return directory


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Of a kernel without NUMA, until a test adds nodes."""
    directory = tmp_path / "sys"
    (directory / "devices/system/cpu").mkdir(parents=True)
    (directory / "devices/system/cpu/online").write_text("0,2,11\n")
    return directory


def add_pool(directory: Path, page_kib: int, pages: int) -> None:
    pool = directory / f"hugepages-{page_kib}kB"
    pool.mkdir(parents=True)
    (pool / "nr_hugepages").write_text(f"{pages}\n")


def add_node(sysfs: Path, number: int, cpulist: str, memory_gib: int, huge_gib: int = 0) -> None:
    """A node, a part of its memory in a pool of huge pages of 1 GiB."""
    node = sysfs / f"devices/system/node/node{number}"
    node.mkdir(parents=True)
    (node / "cpulist").write_text(f"{cpulist}\n")
    (node / "meminfo").write_text(NODE_MEMINFO.format(number, memory_gib * 2**20))
    add_pool(node / "hugepages", 1048576, huge_gib)
    add_pool(node / "hugepages", 2048, 0)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir()
    return directory


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A file system of which 100 GiB are free for ordinary users, and 5 more for root."""
    found = SimpleNamespace(f_frsize=4096, f_bavail=100 * GIB // 4096, f_bfree=105 * GIB // 4096)
    monkeypatch.setattr(os, "statvfs", lambda path: path.stat() and found)
    return found


@pytest.fixture
def measured(state_dir: Path, proc: Path, sysfs: Path) -> Callable[..., Capacity]:
    return lambda hugepage_kib=None: measure(state_dir, hugepage_kib, proc=proc, sysfs=sysfs)


Measured = Callable[..., Capacity]


def test_without_numa_the_host_is_one_node_of_online_cpus_and_all_memory(
    measured: Measured,
) -> None:
    assert measured() == Capacity((NumaNode(0, 3, 65843976 // 1024),), storage_gib=100)


def test_without_numa_memory_is_in_a_pool_or_not(measured: Measured, sysfs: Path) -> None:
    add_pool(sysfs / "kernel/mm/hugepages", 1048576, 16)
    add_pool(sysfs / "kernel/mm/hugepages", 2048, 1024)
    assert measured().nodes[0].memory_mib == 65843976 // 1024 - 18 * 1024
    assert measured(1048576).nodes[0].memory_mib == 16 * 1024
    assert measured(2048).nodes[0].memory_mib == 2048


def test_each_node_has_its_online_cpus_and_its_memory(measured: Measured, sysfs: Path) -> None:
    add_node(sysfs, 0, "0-31,64-95", 256)
    add_node(sysfs, 10, "63", 128)
    add_node(sysfs, 1, "32-61,96", 512)
    assert measured().nodes == (
        NumaNode(0, 64, 256 * 1024),
        NumaNode(1, 31, 512 * 1024),
        NumaNode(10, 1, 128 * 1024),
    )


def test_nodes_may_have_no_cpus_or_no_memory(measured: Measured, sysfs: Path) -> None:
    add_node(sysfs, 0, "0-3", 0)
    add_node(sysfs, 1, "", 64)
    for pool in (sysfs / "devices/system/node/node0/hugepages").iterdir():
        (pool / "nr_hugepages").unlink()
        pool.rmdir()
    assert measured().nodes == (NumaNode(0, 4, 0), NumaNode(1, 0, 64 * 1024))
    assert measured(2048).nodes == (NumaNode(0, 4, 0), NumaNode(1, 0, 0))


def test_huge_pages_serve_those_who_ask_for_their_size_and_nobody_else(
    measured: Measured, sysfs: Path
) -> None:
    add_node(sysfs, 0, "0-3", 256, huge_gib=200)
    add_node(sysfs, 1, "4-7", 256, huge_gib=248)
    assert [node.memory_mib for node in measured().nodes] == [56 * 1024, 8 * 1024]
    assert [node.memory_mib for node in measured(1048576).nodes] == [200 * 1024, 248 * 1024]
    assert [node.memory_mib for node in measured(2048).nodes] == [0, 0]


def test_a_nodes_cpus_are_told_as_the_kernel_lists_them(sysfs: Path) -> None:
    assert cpus(0, sysfs) == "0,2,11"
    add_node(sysfs, 0, "0-31,64-95", 256)
    add_node(sysfs, 1, "", 256)
    assert (cpus(0, sysfs), cpus(1, sysfs)) == ("0-31,64-95", "")


@pytest.mark.parametrize("numa", [True, False])
def test_a_node_that_is_not_there_is_told(sysfs: Path, numa: bool) -> None:
    if numa:
        add_node(sysfs, 0, "0-3", 256)
    with pytest.raises(GpudError, match="NUMA node 3") as caught:
        cpus(3, sysfs)
    assert caught.value.code is Code.STATE_UNUSABLE


NODES = (NumaNode(0, 32, 1000), NumaNode(1, 32, 1000))


@pytest.mark.parametrize(
    ("nodes", "kept", "left"),
    [
        (NODES, (4, 100), [(30, 950), (30, 950)]),
        (NODES, (3, 101), [(30, 949), (31, 950)]),
        (NODES, (0, 0), [(32, 1000), (32, 1000)]),
        (NODES, (99, 9999), [(0, 0), (0, 0)]),
        ((*NODES, NumaNode(2, 0, 10)), (4, 100), [(30, 955), (30, 955), (0, 0)]),
        ((), (4, 100), []),
    ],
    ids=["even", "odd", "nothing", "all", "a small node", "no node"],
)
def test_the_reserve_is_spread_over_the_nodes(
    nodes: tuple[NumaNode, ...], kept: tuple[int, int], left: list[tuple[int, int]]
) -> None:
    found = reserve(nodes, *kept)
    assert [(node.cpu_cores, node.memory_mib) for node in found] == left
    assert [node.number for node in found] == [node.number for node in nodes]


amounts = st.integers(0, 50)
nodes = st.lists(st.builds(NumaNode, st.integers(0, 9), amounts, amounts), max_size=5)


@given(nodes=nodes, cpu_cores=st.integers(0, 150), memory_mib=st.integers(0, 150))
def test_the_reserve_is_taken_exactly_and_as_evenly_as_it_goes(
    nodes: list[NumaNode], cpu_cores: int, memory_mib: int
) -> None:
    found = reserve(nodes, cpu_cores, memory_mib)
    for what, amount in (("cpu_cores", cpu_cores), ("memory_mib", memory_mib)):
        had = [getattr(node, what) for node in nodes]
        left = [getattr(node, what) for node in found]
        assert sum(left) == max(0, sum(had) - amount)
        kept = [before - after for before, after in zip(had, left, strict=True)]
        assert all(0 <= part <= before for part, before in zip(kept, had, strict=True))
        for part, after in zip(kept, left, strict=True):
            assert after == 0 or part >= max(kept) - 1


def test_disk_taken_by_instances_counts_but_not_their_base_image(
    state_dir: Path, measured: Measured, free: Any
) -> None:
    free.f_bavail = 10 * GIB // 4096 - 512  # 2 MiB short of 10 GiB
    files = InstanceFiles.of(state_dir, "i-0123456789abcdef")
    files.directory.mkdir(parents=True)
    image = state_dir / "image"
    image.write_bytes(b"x" * 8 * 2**20)
    files.base.hardlink_to(image)
    assert measured().storage_gib == 9

    files.disk.write_bytes(b"x" * 2 * 2**20)

    assert measured().storage_gib == 10


def test_instance_that_ends_meanwhile_is_left_out(
    state_dir: Path, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {state_dir: [state_dir / "instances" / "gone" / "disk"]}
    monkeypatch.setattr(Path, "glob", lambda path, _: iter(found.get(path, [])))

    assert measured().storage_gib == 100


@pytest.mark.parametrize("broken", ["no proc", "no state_dir", "no MemTotal"])
def test_an_unreadable_host_is_told(state_dir: Path, proc: Path, sysfs: Path, broken: str) -> None:
    if broken == "no MemTotal":
        (proc / "meminfo").write_text("")

    with pytest.raises(GpudError, match="capacity of this host") as caught:
        measure(
            state_dir / "gone" if broken == "no state_dir" else state_dir,
            proc=proc / "gone" if broken == "no proc" else proc,
            sysfs=sysfs,
        )

    assert caught.value.code is Code.STATE_UNUSABLE


def test_this_very_machine_has_something(tmp_path: Path) -> None:
    found = measure(tmp_path)

    assert sum(node.cpu_cores for node in found.nodes) >= 1
    assert sum(node.memory_mib for node in found.nodes) > 0
    assert cpus(0)
