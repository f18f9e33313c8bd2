"""Checks of what guests' memory is made of."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Final

from gpud.config import Config
from gpud.doctor.check import Check, Group, Verdict
from gpud.host.hugepages import mounted
from gpud.model import NumaNode
from gpud.offers import shapes

_LOCK: Final = Check(Group.MEMORY, "memory lock")
_PAGES: Final = Check(Group.MEMORY, "huge pages")
_BESIDE_MIB: Final = 1024
"""What libvirt lets QEMU lock beside a guest's memory, for devices (qemuDomainGetMemLockLimitBytes)."""


def memory_lock(config: Config, limit_bytes: int) -> Iterator[Verdict]:
    """Whether QEMU may lock a guest's memory, which VFIO does with all of it.

    libvirt's system daemon raises the limit for each guest; that of a session cannot raise its own.

    Args:
        config: What is sold, and through which libvirt.
        limit_bytes: The hard limit of who asks (``RLIMIT_MEMLOCK``).
    """
    largest_mib = _largest_mib(config)
    if config.gpus.stand_ins:
        yield _LOCK.ok("stand-ins lock none")
    elif config.libvirt.uri != "qemu:///session":
        yield _LOCK.ok("libvirt raises the limit for each guest")
    elif limit_bytes != resource.RLIM_INFINITY and (
        limit_bytes < (largest_mib + _BESIDE_MIB) * 2**20
    ):
        yield _LOCK.fault(
            f"{limit_bytes // 2**20} MiB may be locked, and a guest has {largest_mib} MiB",
            "libvirt.uri: qemu:///system, or LimitMEMLOCK=infinity for the user's session",
        )
    else:
        yield _LOCK.ok("enough for the largest guest")


def huge_pages(config: Config, nodes: tuple[NumaNode, ...], mounts: str) -> Iterator[Verdict]:
    """Whether the pages that guests are made of are set aside, and libvirt finds them.

    Args:
        config: Which pages, if any.
        nodes: What their pool has, by NUMA node.
        mounts: Content of ``/proc/mounts``.
    """
    size, size_kib = config.guest.hugepages, config.guest.hugepage_kib
    if size_kib is None:
        yield _PAGES.ok("not asked for (guest.hugepages)")
        return
    pool_mib = sum(node.memory_mib for node in nodes)
    if not pool_mib:
        yield _PAGES.fault(
            f"guest.hugepages is {size}, and none of that size is set aside",
            "gpud setup counts how many are needed, by NUMA node, and has them set aside",
        )
    elif not mounted(mounts, size_kib):
        yield _PAGES.fault(
            f"no hugetlbfs with pages of {size} is mounted, so libvirt does not find them",
            "gpud setup has it mounted, now and at each boot",
        )
    else:
        parts = ", ".join(f"node {node.number}: {node.memory_mib // 1024} GiB" for node in nodes)
        yield _PAGES.ok(f"of {size}, {parts}")


def _largest_mib(config: Config) -> int:
    return max((one.memory_mib for it in config.offers for one in shapes(it)), default=0)
