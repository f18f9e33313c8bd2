"""Writes and reads of the kernel's files that may take long or for ever, each in a child process."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Final, Protocol

from gpud import command
from gpud.errors import Code, GpudError

_ERRNO: Final = {os.strerror(number): number for number in errno.errorcode}
_ONE_WRITE_BYTES: Final = 4096
"""The kernel takes each write for a command of its own, so a text must go in one."""
_STUCK_S: Final = 86_400.0
"""How long a read that did not come back is left alone, before the same is asked once more."""


class KernelFiles(Protocol):
    """How files are written and read whose kernel side may take long, or for ever."""

    async def write(self, file: Path, text: str, timeout_s: float) -> None:
        """Give ``text`` to an existing file in one write.

        Raises:
            OSError: The kernel refused it.
            GpudError: It was not done in time.
        """
        ...

    async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
        """Read the first bytes of a file; errors as for ``write``."""
        ...

    async def read_many(self, files: Sequence[Path], size: int, timeout_s: float) -> list[bytes]:
        """Read the first bytes of many files.

        Args:
            files: What to read.
            size: How many bytes of each.
            timeout_s: Seconds for all at once and, if that is not enough, for each by itself.

        Returns:
            What was read of each; nothing where the kernel refused or did not come back in time.

        Raises:
            GpudError: Not one came back in time, which says nothing about any of them. Transient.
        """
        ...


class InChildren:
    """Each write and read in a short-lived process of coreutils: some 3 ms, and a true errno.

    ``dd`` rather than a shell's ``printf``, which tells "I/O error" whatever the kernel said.

    A child that the kernel holds up outlives being killed. What it was for is refused until it is gone:
    acts on a card are tried again for ever, and a wedged driver would be left with a process of each try.
    """

    def __init__(self) -> None:
        self._stuck: dict[tuple[Path, str], Popen[bytes]] = {}
        self._turn = asyncio.Lock()
        self._late: dict[Path, asyncio.Task[bytes | None]] = {}

    async def write(self, file: Path, text: str, timeout_s: float) -> None:
        """Write through ``dd``, which neither creates nor truncates the file here."""
        with self._none_stuck_at(file, text):
            done = await command.run(
                "dd",
                f"of={file}",
                "conv=nocreat,notrunc",
                f"bs={_ONE_WRITE_BYTES}",
                "status=none",
                timeout_s=timeout_s,
                ok=(0, 1),
                input=text.encode(),
            )
        _refuse(done)

    async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
        """Read through ``od``, whose output survives being taken for text."""
        with self._none_stuck_at(file):
            return await _octets(file, size, timeout_s)

    async def read_many(self, files: Sequence[Path], size: int, timeout_s: float) -> list[bytes]:
        """Read all through one child; only when that hangs, each through one of its own.

        A read that does not come back by itself either is left where it is, and its file is not asked
        again until it does: however long that takes, there is one such process for each file.
        """
        async with self._turn:
            found = await self._came_back(files, size, timeout_s)
        if files and not found:
            raise GpudError(
                Code.GPU_UNUSABLE,
                f"not one of {len(files)} files like {files[0]} could be read within {timeout_s:g} s",
                hint="a device holds up the kernel, or the server is overloaded: see dmesg",
                transient=True,
            )
        return [found.get(file, b"") for file in files]

    @contextmanager
    def _none_stuck_at(self, file: Path, text: str = "") -> Iterator[None]:
        """Let nobody do what a child of before is still doing; remember one that becomes stuck."""
        self._stuck = {act: one for act, one in self._stuck.items() if one.returncode is None}
        earlier = self._stuck.get((file, text))
        if earlier is not None:
            raise GpudError(
                Code.HOST_COMMAND_FAILED,
                f"process {earlier.pid}, which tried the same before, is still stuck inside the kernel",
                hint="see dmesg; where a driver lets go of nothing, a reboot does",
            )
        try:
            yield
        except command.StuckError as error:
            self._stuck[file, text] = error.process
            raise

    async def _came_back(
        self, files: Sequence[Path], size: int, timeout_s: float
    ) -> dict[Path, bytes]:
        """What was read of each file that came back in time."""
        self._late = {file: read for file, read in self._late.items() if not read.done()}
        asked = [file for file in files if file not in self._late]
        found = await _at_once(asked, size, timeout_s)
        return await self._one_by_one(asked, size, timeout_s) if found is None else found

    async def _one_by_one(
        self, files: Sequence[Path], size: int, timeout_s: float
    ) -> dict[Path, bytes]:
        reads = {file: asyncio.create_task(self._patiently(file, size)) for file in files}
        self._late |= reads
        await asyncio.wait(reads.values(), timeout=timeout_s)
        contents = {file: read.result() for file, read in reads.items() if read.done()}
        return {file: content for file, content in contents.items() if content is not None}

    async def _patiently(self, file: Path, size: int) -> bytes | None:
        """A file's first bytes, none if it cannot be read; None if nobody could so much as ask."""
        try:
            return await _octets(file, size, _STUCK_S)
        except OSError:
            return b""
        except GpudError:
            return None


async def _octets(file: Path, size: int, timeout_s: float) -> bytes:
    done = await command.run(
        "od", "-An", "-v", "-tx1", f"-N{size}", file, timeout_s=timeout_s, ok=(0, 1)
    )
    _refuse(done)
    return bytes.fromhex(done.stdout)


async def _at_once(files: Sequence[Path], size: int, timeout_s: float) -> dict[Path, bytes] | None:
    """What one child read of each file; None when it did not come to its end."""
    if not files:
        return {}
    try:
        done = await command.run(
            "head", "-v", "-c", str(size), "--", *files, timeout_s=timeout_s, ok=(0, 1)
        )
    except GpudError:
        return None
    return _contents(done.raw, files)


def _contents(output: bytes, files: Sequence[Path]) -> dict[Path, bytes]:
    """Part what ``head -v`` wrote: a title before each file it could open, an empty line between."""
    contents = dict.fromkeys(files, b"")
    end = len(output)
    for file in reversed(files):
        title = b"==> " + os.fsencode(file) + b" <==\n"
        begin = output.rfind(title, 0, end)
        if begin >= 0:
            contents[file] = output[begin + len(title) : end]
            end = max(begin - 1, 0)
    return contents


def _refuse(done: command.Completed) -> None:
    if done.exit_code != 0:
        why = done.stderr.rpartition(": ")[2]
        raise OSError(_ERRNO.get(why, errno.EIO), why)
