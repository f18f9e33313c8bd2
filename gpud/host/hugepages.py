"""Where huge pages are reached."""

from __future__ import annotations


def mounted(mounts: str, size_kib: int) -> bool:
    """Whether there is a hugetlbfs of a page size, where libvirt looks for it (virFileFindHugeTLBFS).

    Args:
        mounts: Content of ``/proc/mounts``; such a mount says ``pagesize=1024M``.
        size_kib: Size of the pages.
    """
    return any(_is_of(line.split(), size_kib) for line in mounts.splitlines())


def _is_of(fields: list[str], size_kib: int) -> bool:
    return fields[2:3] == ["hugetlbfs"] and f"pagesize={size_kib // 1024}M" in fields[3].split(",")
