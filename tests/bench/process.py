"""What the kernel says of a process (``man 5 proc``)."""

from __future__ import annotations

import re
from pathlib import Path

_RSS = re.compile(r"^VmRSS:\s+(\d+) kB$", re.MULTILINE)


def cpu_s(pid: int) -> float:
    """Time that all of its threads have been on a processor so far, in seconds."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


def rss_mb(pid: int) -> float:
    """Its resident memory, libraries that others use too included, in MB."""
    found = _RSS.search(Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6
