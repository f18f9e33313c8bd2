"""Whom files let in: for checks that root makes on behalf of somebody else."""

from __future__ import annotations

import os
import pwd
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from gpud.host.sysfs import Sysfs

READ: Final = 4
WRITE: Final = 2


@dataclass(frozen=True, slots=True)
class Account:
    """Somebody whom files let in, or not."""

    name: str
    uid: int
    gids: frozenset[int]

    @classmethod
    def of(cls, uid: int, gid: int) -> Self:
        """The account of a process that libvirt starts as ``uid`` and ``gid``.

        It has the groups of the user's own entries beside ``gid`` (``virGetGroupList``).
        """
        try:
            user = pwd.getpwuid(uid)
        except KeyError:  # libvirt can be told to use any number
            return cls(f"uid {uid}", uid, frozenset({gid}))
        return cls(user.pw_name, uid, frozenset({gid, *os.getgrouplist(user.pw_name, user.pw_gid)}))

    @classmethod
    def owner(cls, directory: Path) -> Self | None:
        """The account that a directory belongs to; None where it is not there."""
        try:
            found = directory.stat()
        except OSError:
            return None
        return cls.of(found.st_uid, found.st_gid)

    def may(self, bits: int, file: os.stat_result) -> bool:
        """Whether a file's mode lets this account do all of ``bits``."""
        shift = 6 if self.uid == file.st_uid else 3 if file.st_gid in self.gids else 0
        return self.uid == 0 or file.st_mode >> shift & bits == bits


class SysfsOf(Sysfs):
    """A sysfs tree as somebody else may write it.

    Args:
        root: Where it is mounted.
        account: Who.
    """

    def __init__(self, root: Path, account: Account) -> None:
        super().__init__(root)
        self._account = account

    def writable(self, path: Path) -> bool:
        """Whether the account may write the file."""
        return self._account.may(WRITE, (self.root / path).stat())
