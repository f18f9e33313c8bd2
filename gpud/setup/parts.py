"""What changes are made of: files, memberships and enabled units. Each can be made, and taken back."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest.durable import replacing, sync
from gpud.setup.server import Server

_COMMAND_S: Final = 60.0
_ANY_STATUS: Final = range(-64, 256)
_USERS: Final = 3
"""The field of ``/etc/group`` that lists its users (``man 5 group``)."""


class Part(Protocol):
    """One thing that a change makes."""

    @property
    def key(self) -> str:
        """What it is, in the record and to the operator: ``file /etc/x``."""
        ...

    @property
    def act(self) -> str:
        """What making it is, in words."""
        ...

    @property
    def fingerprint(self) -> str:
        """What tells a later state of it from the one that was made; empty where there is one only."""
        ...

    def in_the_way(self, server: Server, fingerprints: Collection[str]) -> str:
        """What keeps it from being made or taken back, seeing which states of it were made before."""
        ...

    async def holds(self, server: Server) -> bool:
        """Whether it is there, as it should be."""
        ...

    async def make(self, server: Server) -> None:
        """Make it. Can be repeated."""
        ...

    async def unmake(self, server: Server) -> None:
        """Take it back. Can be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class TextFile:
    """A file of gpud's own: it is written whole, and never a file of somebody else."""

    path: str
    content: str = ""
    mode: int = 0o644

    @property
    def key(self) -> str:
        """See :class:`Part`, as for all below."""
        return f"file {self.path}"

    @property
    def act(self) -> str:
        """In words."""
        return f"writes {self.path}"

    @property
    def fingerprint(self) -> str:
        """Of its content."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def in_the_way(self, server: Server, fingerprints: Collection[str]) -> str:
        """Whether somebody else made it, or changed it since."""
        path = server.at(self.path)
        if not path.is_symlink() and not path.exists():
            return ""
        found = _digest(path)
        if found in {self.fingerprint, *fingerprints}:
            return ""
        return f"{self.path} {'was changed since' if fingerprints else 'is not of gpud'}"

    async def holds(self, server: Server) -> bool:
        """Whether it has this content."""
        return _digest(server.at(self.path)) == self.fingerprint

    async def make(self, server: Server) -> None:
        """Write it, complete or not at all."""
        path = server.at(self.path)
        try:
            _make_directory(path.parent)
            with replacing(path, mode=self.mode) as stream:
                stream.write(self.content.encode())
        except OSError as error:
            raise _refused(f"{self.path} cannot be written", error) from error

    async def unmake(self, server: Server) -> None:
        """Remove it."""
        path = server.at(self.path)
        try:
            path.unlink(missing_ok=True)
            if path.parent.is_dir():
                sync(path.parent)
        except OSError as error:
            raise _refused(f"{self.path} cannot be removed", error) from error


class _OfOneState:
    """What a part has that is there or is not: nothing of another shape can be where it goes."""

    __slots__ = ()

    @property
    def fingerprint(self) -> str:
        """There is one state only."""
        return ""

    def in_the_way(self, server: Server, fingerprints: Collection[str]) -> str:  # noqa: ARG002
        """Nothing can be."""
        return ""


@dataclass(frozen=True, slots=True)
class Member(_OfOneState):
    """A user's membership in a group."""

    user: str
    group: str

    @property
    def key(self) -> str:
        """See :class:`Part`."""
        return f"member {self.user} {self.group}"

    @property
    def act(self) -> str:
        """In words."""
        return f"adds {self.user} to the group {self.group}"

    async def holds(self, server: Server) -> bool:
        """Whether the group lists the user."""
        for line in server.text("/etc/group").splitlines():
            name, *fields = line.split(":")
            if name == self.group and len(fields) == _USERS:
                return self.user in fields[-1].split(",")
        return False

    async def make(self, server: Server) -> None:  # noqa: ARG002
        """Add the user to the group."""
        await command.run("usermod", "-aG", self.group, self.user, timeout_s=_COMMAND_S)

    async def unmake(self, server: Server) -> None:
        """Take the user out of the group."""
        if await self.holds(server):
            await command.run("gpasswd", "-d", self.user, self.group, timeout_s=_COMMAND_S)


@dataclass(frozen=True, slots=True)
class Unit(_OfOneState):
    """A systemd unit that is started, now and at each boot."""

    name: str

    @property
    def key(self) -> str:
        """See :class:`Part`."""
        return f"unit {self.name}"

    @property
    def act(self) -> str:
        """In words."""
        return f"enables and starts {self.name}"

    async def holds(self, server: Server) -> bool:  # noqa: ARG002
        """Whether it is started at boot."""
        return await unit_state(self.name) == "enabled"

    async def make(self, server: Server) -> None:  # noqa: ARG002
        """Enable and start it."""
        await command.run("systemctl", "enable", "--now", self.name, timeout_s=_COMMAND_S)

    async def unmake(self, server: Server) -> None:
        """Start it no more at boot; what runs is left running."""
        if await self.holds(server):
            await command.run("systemctl", "disable", self.name, timeout_s=_COMMAND_S)


async def unit_state(name: str) -> str:
    """What ``systemctl is-enabled`` says of a unit; empty where there is none, or no systemd."""
    try:
        said = await command.run(
            "systemctl", "is-enabled", name, timeout_s=_COMMAND_S, ok=_ANY_STATUS
        )
    except GpudError:
        return ""
    return "" if said.stdout == "not-found" else said.stdout


def part_of(key: str) -> Part:
    """The part that a key of the record stands for, as far as taking it back needs it.

    Raises:
        ValueError: It stands for none.
    """
    match key.split(" "):
        case ["file", path] if path.startswith("/"):
            return TextFile(path)
        case ["member", user, group]:
            return Member(user, group)
        case ["unit", name]:
            return Unit(name)
    raise ValueError(f"{key!r} is no part of a change")


def _digest(path: Path) -> str:
    """Of a file's content; that of a link, a directory or an unreadable file is nobody's."""
    try:
        return "" if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir()
        directory.chmod(0o755)  # not left to the umask
        sync(directory.parent)


def _refused(what: str, error: OSError) -> GpudError:
    return GpudError(Code.STATE_UNUSABLE, f"{what}: {error.strerror}")
