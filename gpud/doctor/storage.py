"""Checks of where the record, the images and guests' disks are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gpud.doctor.check import Check, Group, Verdict
from gpud.doctor.record import read_record
from gpud.errors import GpudError
from gpud.inventory.facts import Record
from gpud.statefile import STATE_FILE

_DIRECTORY: Final = Check(Group.STORAGE, "state_dir")
_SYSTEM: Final = Check(Group.STORAGE, "file system")
_SPACE: Final = Check(Group.STORAGE, "free space")
_RECORD: Final = Check(Group.STORAGE, "record")
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_REMOTE: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs"})
_OCTAL: Final = re.compile(r"\\([0-7]{3})")
"""How the kernel writes white space in a path."""
_LITTLE: Final = 0.05
_LEAST_GIB: Final = 5
"""Below this the record itself may find no room soon."""


def nearest(directory: Path) -> Path:
    """The directory, or what of the way to it is there."""
    return next(one for one in (directory, *directory.parents) if one.exists())


def storage(state_dir: Path, mountinfo: str) -> Iterator[Verdict]:
    """Whether the state directory can keep what is entrusted to it.

    Args:
        state_dir: The directory.
        mountinfo: Content of ``/proc/self/mountinfo``.
    """
    here = nearest(state_dir)
    if here != state_dir:
        yield _DIRECTORY.fault(
            f"{state_dir} is not there",
            f"systemctl start gpud makes it, else: install -d -o gpud -g gpud -m 0711 {state_dir}",
        )
    elif not here.stat().st_mode & 0o001:
        yield _DIRECTORY.fault(
            f"QEMU's user may not pass through {state_dir}", f"chmod 0711 {state_dir}"
        )
    else:
        yield _DIRECTORY.ok(str(state_dir))
    yield from file_system(file_system_of(here, mountinfo))
    yield from free_space(os.statvfs(here))


def file_system(name: str) -> Iterator[Verdict]:
    """Whether a file system keeps what is written, and locks it, through a crash of the server."""
    elsewhere = "state_dir: a directory on a disk of this server (ext4, XFS, btrfs, ZFS)"
    if name in _IN_MEMORY:
        yield _SYSTEM.fault(f"{name} forgets every order when the server goes down", elsewhere)
    elif name in _REMOTE or name.startswith("fuse."):
        yield _SYSTEM.fault(f"{name} does not hold the record's locks for sure", elsewhere)
    elif name == "overlay":
        yield _SYSTEM.warning("overlay goes away with its container", elsewhere)
    else:
        yield _SYSTEM.ok(name or "not known")


def file_system_of(path: Path, mountinfo: str) -> str:
    """The type of the file system that ``path`` is on (proc_pid_mountinfo(5)); empty where not told."""
    found = (0, "")
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        point = Path(_OCTAL.sub(lambda found: chr(int(found[1], 8)), before.split()[4]))
        if (
            path.is_relative_to(point) and len(point.parts) >= found[0]
        ):  # the last one covers others
            found = len(point.parts), after.split()[0]
    return found[1]


def free_space(found: os.statvfs_result) -> Iterator[Verdict]:
    """Whether there is room now. What is sold is held against it by the offers' check."""
    free, size = (blocks * found.f_frsize / 2**30 for blocks in (found.f_bavail, found.f_blocks))
    told = f"{free:.0f} of {size:.0f} GiB"
    mend = "gpud image rm NAME for images not in use; du -xh STATE_DIR | sort -h shows the rest"
    if free < _LEAST_GIB:
        yield _SPACE.fault(told, mend)
    elif free < size * _LITTLE:
        yield _SPACE.warning(told, mend)
    else:
        yield _SPACE.ok(told)


def record(state_dir: Path) -> tuple[Record, Verdict]:
    """Read the record of cards; it is empty where it cannot be read, and the verdict says why."""
    file = state_dir / STATE_FILE
    if not file.exists():
        return Record(), _RECORD.note("none yet: no daemon has run here")
    if not os.access(file, os.R_OK):
        return Record(), _RECORD.note("cannot be read by who asks", "sudo gpud doctor")
    try:
        found = read_record(state_dir)
    except GpudError as error:
        return Record(), _RECORD.failed(error)
    return found, _RECORD.ok(f"sound, {len(found.claims)} GPUs are in use by its instances")
