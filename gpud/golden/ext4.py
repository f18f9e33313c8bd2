"""A look into an ext4 file system inside a raw file, and changes to it, through ``debugfs``.

Paths are those of the file system itself; symbolic links on the way are followed inside it and nowhere
else, so an image cannot make us read or remove a file of this server.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud import command
from gpud.errors import Code, GpudError

_LIMIT_S: Final = 300.0
_CHECK_S: Final = 1800.0
_FILE_LIMIT_BYTES: Final = 64 * 2**20
_LISTED: Final = re.compile(r"/\d+/(\d{6})/\d+/\d+/([^/]+)/(\d*)/")
"""A line of ``ls -p``: inode, mode, owner, group, name, size (none for a directory); ``debugfs(8)``."""
_CONTROL: Final = re.compile(rb"[\x00-\x1f\x7f]")
_KINDS: Final = {"04": "directory", "10": "file", "12": "link"}
_REQUEST_BYTES: Final = 8190
"""debugfs reads a script in pieces of 8,191 bytes: what is beyond would be a request of its own."""
_MENDED: Final = (0, 1, 2)
"""Exit statuses of ``e2fsck(8)`` after which the file system is sound."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a directory lists.

    Attributes:
        path: From the file system's root.
        kind: ``file``, ``directory``, ``link`` or ``other``.
        size_bytes: Of a file.
    """

    path: str
    kind: str
    size_bytes: int = 0

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rpartition("/")[2]


class Ext4:
    """One file system.

    Args:
        disk: A raw file, or one with the file system alone.
        start_bytes: Where in it the file system begins.
    """

    def __init__(self, disk: Path, start_bytes: int = 0) -> None:
        self._device = f"{disk}?offset={start_bytes}"  # e2fsprogs' own way to say so
        self._scratch = disk.parent
        self._listed: dict[str, tuple[Entry, ...]] = {}

    async def mend(self) -> None:
        """Replay its journal, as a first mount would: the machine may have been cut off.

        Raises:
            GpudError: ``image_invalid``: it is damaged.
        """
        await self._check("-p")

    async def wipe_free_space(self) -> None:
        """Make holes of what no file holds, so that what was removed cannot be read back."""
        await self._check("-y", "-E", "discard")

    async def entries(self, directory: str) -> tuple[Entry, ...]:
        """What is in a directory; nothing where there is no such directory."""
        await self.learn([directory])
        return self._listed[directory]

    async def learn(self, directories: Iterable[str]) -> None:
        """List many directories at the cost of one, for those who ask for them later."""
        asked = [one for one in dict.fromkeys(directories) if one not in self._listed]
        if not asked:
            return
        listed = await self._run([f"ls -p {_quoted(one)}" for one in asked])
        # Each request is repeated before its answer. A name cannot look like one: these have slashes.
        headings = {f"debugfs: ls -p {_quoted(one)}": one for one in asked}
        found: dict[str, list[Entry]] = {one: [] for one in asked}
        directory = ""
        for line in listed.split("\n"):
            if line in headings:
                directory = headings[line]
            elif listing := _LISTED.fullmatch(line):
                if listing[2] not in {".", ".."}:
                    found[directory].append(_entry(directory, listing))
            elif line:  # a name with a line break or a slash: skipped, a seal would leave it behind
                raise GpudError(
                    Code.IMAGE_INVALID,
                    f"it holds a name in {directory!r} that cannot be made out: {line[:80]!r}",
                    hint="remove it inside the image's guest; or take another image",
                )
        self._listed |= {one: tuple(entries) for one, entries in found.items()}

    async def find(self, path: str) -> Entry | None:
        """The entry at a path, whose last part is not followed; None where there is none."""
        parent, _, name = path.rpartition("/")
        listed = await self.entries(parent or "/")
        return next((one for one in listed if one.name == name), None)

    async def match(self, pattern: str) -> tuple[Entry, ...]:
        """The entries whose last part, the only one that may hold wildcards, fits."""
        parent, _, name = pattern.rpartition("/")
        listed = await self.entries(parent or "/")
        return tuple(one for one in listed if fnmatch.fnmatchcase(one.name, name))

    async def walk(self, directory: str) -> tuple[Entry, ...]:
        """Everything below a directory, what is in a directory before the directory itself."""
        found: list[Entry] = []
        below = [directory]
        while below:
            await self.learn(below)
            level = [entry for one in below for entry in self._listed[one]]
            found = level + found
            below = [entry.path for entry in level if entry.kind == "directory"]
        return tuple(found)

    async def read(self, path: str) -> bytes | None:
        """A file's content; None where there is no such file, or a link, or more than 64 MiB."""
        entry = await self.find(path)
        if entry is None or entry.kind != "file" or entry.size_bytes > _FILE_LIMIT_BYTES:
            return None
        copy = self._scratch / "read"
        copy.unlink(missing_ok=True)
        await self._run([f"dump {_quoted(path)} {_quoted(str(copy))}"])
        try:
            return copy.read_bytes()
        finally:
            copy.unlink(missing_ok=True)

    async def remove(self, entries: Iterable[Entry]) -> None:
        """Remove files, links and empty directories, in this order."""
        await self._change(
            f"{'rmdir' if entry.kind == 'directory' else 'rm'} {_quoted(entry.path)}"
            for entry in entries
        )

    async def empty(self, path: str) -> None:
        """Put an empty file, root's and readable by all, in the place of what is at ``path``."""
        parent, _, name = path.rpartition("/")
        nothing = self._scratch / "nothing"
        nothing.touch()
        nothing.chmod(0o644)  # debugfs takes over the mode
        await self._change(
            [
                f"rm {_quoted(path)}",
                f"cd {_quoted(parent)}",  # debugfs writes into its own directory only
                f"write {_quoted(str(nothing))} {_quoted(name)}",
            ]
        )
        nothing.unlink()

    async def _change(self, requests: Iterable[str]) -> None:
        self._listed.clear()
        await self._run(list(requests), "-w")

    async def _run(self, requests: list[str], *options: str) -> str:
        script = [_line(request) for request in requests]
        done = await command.run(
            "debugfs", *options, "-f", "-", self._device,
            timeout_s=_LIMIT_S, ok=(0, 1), input=b"".join(script),
        )  # fmt: skip
        if done.exit_code:
            raise GpudError(Code.IMAGE_INVALID, f"its file system cannot be read: {done.stderr}")
        return done.raw.decode(errors="surrogateescape")

    async def _check(self, *options: str) -> None:
        done = await command.run(
            "e2fsck", "-f", *options, self._device, timeout_s=_CHECK_S, ok=range(256)
        )
        if done.exit_code not in _MENDED:
            last = (done.stdout or done.stderr).splitlines()[-1:] or ["no reason given"]
            raise GpudError(
                Code.IMAGE_INVALID,
                f"its file system is damaged, or newer than this server's e2fsck: {last[0]}",
            )


def _entry(directory: str, listing: re.Match[str]) -> Entry:
    mode, name, size_bytes = listing.groups()
    path = f"{directory.rstrip('/')}/{name}"
    return Entry(path, _KINDS.get(mode[:2], "other"), int(size_bytes or 0))


def _line(request: str) -> bytes:
    """A request as a line of debugfs' script, which holds nothing else.

    Raises:
        GpudError: ``image_invalid``: it holds a path that would end the line before its end, and so could
            have debugfs do anything with the files of this server.
    """
    line = request.encode(errors="surrogateescape")
    if len(line) >= _REQUEST_BYTES or _CONTROL.search(line):
        raise GpudError(
            Code.IMAGE_INVALID,
            f"it holds a path that cannot be asked for safely: {request[:80]!r}",
            hint="nobody names files like this in good faith: take another image",
        )
    return line + b"\n"


def _quoted(path: str) -> str:
    """A path as debugfs takes it; a quote in it is doubled (libss, ``parse.c``)."""
    doubled = path.replace('"', '""')
    return f'"{doubled}"'
