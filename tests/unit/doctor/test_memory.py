"""Memory that is locked, and huge pages."""

from __future__ import annotations

import resource
from typing import Any

import pytest

from gpud.doctor.check import Level
from gpud.doctor.memory import huge_pages, memory_lock
from gpud.model import NumaNode
from tests.unit.doctor.parts import REAL, make_config, only

SESSION = {**REAL, "libvirt": {"uri": "qemu:///session"}}
MOUNTED = "hugetlbfs /dev/hugepages1G hugetlbfs rw,relatime,pagesize=1024M 0 0\n"
PAGES = make_config(guest={"hugepages": "1G"})


@pytest.mark.parametrize("changes", [{}, REAL])
def test_a_small_limit_is_no_matter_where_libvirt_raises_it_or_nothing_is_locked(
    changes: dict[str, Any],
) -> None:
    assert only(memory_lock(make_config(**changes), 8 * 2**20))[0] is Level.OK


def test_a_sessions_limit_must_hold_the_largest_guest() -> None:
    config = make_config(**SESSION)  # two GPUs come with 32 GiB
    enough = 33 * 2**30
    assert only(memory_lock(config, resource.RLIM_INFINITY))[0] is Level.OK
    assert only(memory_lock(config, enough))[0] is Level.OK
    level, what, mend = only(memory_lock(config, enough - 1))
    assert (level, "a guest has 32768 MiB" in what) == (Level.FAULT, True)
    assert mend.startswith("libvirt.uri: qemu:///system")


def test_ordinary_pages_need_nothing() -> None:
    assert only(huge_pages(make_config(), (), ""))[0] is Level.OK


def test_huge_pages_that_are_there_and_mounted_are_well() -> None:
    nodes = (NumaNode(0, 8, 64 * 1024), NumaNode(1, 8, 32 * 1024))
    found = only(huge_pages(PAGES, nodes, "proc /proc proc rw 0 0\n" + MOUNTED))
    assert found[:2] == (Level.OK, "of 1G, node 0: 64 GiB, node 1: 32 GiB")


def test_huge_pages_that_nobody_set_aside_are_a_fault() -> None:
    found = only(huge_pages(PAGES, (NumaNode(0, 8, 0),), MOUNTED))
    assert found[0] is Level.FAULT
    assert found[2].startswith("gpud setup counts ")


def test_huge_pages_without_a_mount_of_their_size_are_a_fault() -> None:
    other = "hugetlbfs /dev/hugepages hugetlbfs rw,pagesize=2M 0 0\n"
    found = only(huge_pages(PAGES, (NumaNode(0, 8, 4096),), other))
    assert found[0] is Level.FAULT
    assert "gpud setup has it mounted" in found[2]
