"""What a machine that ran leaves on its disk, and every clone of it would share or show.

One table for both sides: what is looked for is what sealing removes.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Final

from gpud.doctor.check import Level
from gpud.golden.ext4 import Entry, Ext4

_HOME: Final = "~"
_EVERYTHING_BELOW: Final = "/**"
_PLAIN_PATH: Final = re.compile(r"(/[A-Za-z0-9._@-]+)+")
_FIRST_PERSON_UID: Final = 1000  # login.defs(5), UID_MIN as Debian and Ubuntu have it


@dataclass(frozen=True, slots=True)
class Trace:
    """One kind of thing that is left behind.

    Attributes:
        name: What it is.
        level: How bad it is in an image that is cloned.
        why: What becomes of it in the clones.
        where: Paths: a last part with wildcards, or ``/**`` for everything below a directory; ``~`` for
            each home directory.
        whole: Directories go too; without it they stay, since services expect theirs.
    """

    name: str
    level: Level
    why: str
    where: tuple[str, ...]
    whole: bool = False


TRACES: Final = (
    Trace(
        "machine-id of D-Bus", Level.FAULT, "every guest would have it", ("/var/lib/dbus/machine-id",)
    ),
    Trace(
        "SSH host keys", Level.FAULT, "every guest would prove to be the same machine",
        ("/etc/ssh/ssh_host_*",),
    ),
    Trace(
        "cloud-init state", Level.FAULT,
        "cloud-init takes the guest for one that was set up already, or reads a seed that is not gpud's",
        ("/var/lib/cloud/**",), whole=True,
    ),
    Trace(
        "random seed", Level.FAULT, "guests would start from the same randomness, or share a secret",
        ("/var/lib/systemd/random-seed", "/var/lib/systemd/credential.secret",
         "/var/lib/urandom/random-seed"),
    ),
    Trace(
        "keys of users", Level.FAULT,
        "whoever built the image could log in to every guest, or left a key of their own in it",
        (f"{_HOME}/.ssh/**",),
    ),
    Trace(
        "shell histories", Level.WARNING, "every customer can read what was typed",
        tuple(f"{_HOME}/{name}" for name in (".*_history", ".lesshst", ".viminfo", ".wget-hsts")),
    ),
    Trace(
        "DHCP leases", Level.WARNING, "guests may ask for one and the same address",
        ("/var/lib/dhcp/**", "/var/lib/dhcpcd/**", "/var/lib/NetworkManager/**"),
    ),
    Trace(
        "network of the build", Level.WARNING, "it may stand beside the one that gpud sets up",
        ("/etc/netplan/50-cloud-init.yaml", "/etc/network/interfaces.d/50-cloud-init",
         "/etc/systemd/network/10-cloud-init-*", "/etc/udev/rules.d/70-persistent-net.rules"),
    ),
    Trace("logs", Level.WARNING, "every customer can read them", ("/var/log/**",)),
    Trace(
        "package caches", Level.NOTE, "they take space in the image",
        ("/var/lib/apt/lists/**", "/var/cache/apt/**"),
    ),
    Trace(
        "temporary files", Level.NOTE, "they take space in the image",
        ("/tmp/**", "/var/tmp/**"),  # noqa: S108 - the image's
    ),
)  # fmt: skip


def places(homes: Iterable[str]) -> tuple[str, ...]:
    """The directories in which the traces are, or below which."""
    homes = tuple(homes)
    return tuple(
        (start + place.removeprefix(_HOME)).rpartition("/")[0]
        for trace in TRACES
        for place in trace.where
        for start in (homes if place.startswith(_HOME) else [""])
    )


async def find(root: Ext4, trace: Trace, homes: Iterable[str]) -> tuple[Entry, ...]:
    """What there is of a trace: files with content, and all but empty directories where it goes whole."""
    return tuple([one async for one in _entries(root, trace, homes) if _tells(one, trace)])


async def removable(root: Ext4, trace: Trace, homes: Iterable[str]) -> tuple[Entry, ...]:
    """What sealing removes of it, what is in a directory before the directory itself."""
    return tuple(
        [
            one
            async for one in _entries(root, trace, homes)
            if _tells(one, trace) or (trace.whole and one.kind == "directory")
        ]
    )


def homes(passwd: str) -> tuple[str, ...]:
    """Where people's files are: the home directories of root and of ordinary users (``passwd(5)``)."""
    found = {"/root"}
    for line in passwd.splitlines():
        match line.split(":"):
            case [_, _, uid, _, _, home, _] if uid.isdecimal() and _PLAIN_PATH.fullmatch(home):
                if int(uid) == 0 or int(uid) >= _FIRST_PERSON_UID:
                    found.add(home)
            case _:
                pass
    return tuple(sorted(found))


def _tells(entry: Entry, trace: Trace) -> bool:
    if entry.kind == "file":
        return trace.whole or entry.size_bytes > 0
    return trace.whole and entry.kind != "directory"


async def _entries(root: Ext4, trace: Trace, homes: Iterable[str]) -> AsyncIterator[Entry]:
    for place in trace.where:
        starts = homes if place.startswith(_HOME) else [""]
        for start in starts:
            path = start + place.removeprefix(_HOME)
            if path.endswith(_EVERYTHING_BELOW):
                for entry in await root.walk(path.removesuffix(_EVERYTHING_BELOW)):
                    yield entry
            else:
                for entry in await root.match(path):
                    yield entry
