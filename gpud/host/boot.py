"""Which boot of the server this is."""

from __future__ import annotations

from pathlib import Path


def boot_id(proc: Path = Path("/proc")) -> str:
    """The kernel's random id of the present boot (``man 4 random``)."""
    return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
