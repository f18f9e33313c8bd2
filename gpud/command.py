"""The one door to other programs: an argument list in, bounded output back, nothing left running.

No shell, no inherited environment, no prompt on standard input. A program that does not end in its
time is killed with everything it started.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError

DEBIAN_PACKAGE: Final = {
    "debugfs": "e2fsprogs",
    "e2fsck": "e2fsprogs",
    "mcopy": "mtools",
    "qemu-img": "qemu-utils",
    "sfdisk": "fdisk",
}
"""Where the programs that gpud calls come from."""

_ENVIRONMENT: Final = {
    "LC_ALL": "C",  # messages and numbers in one known form
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}
_MAX_STDOUT_BYTES: Final = 4 * 2**20
_STDERR_TAIL_BYTES: Final = 4096
_READ_BYTES: Final = 65536
_KILL_GRACE_S: Final = 2.0
_EXHAUSTED: Final = {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM}
"""The host has no more of something at the moment: descriptors, processes, memory."""


@dataclass(frozen=True, slots=True)
class Completed:
    """How a program ended.

    Attributes:
        stdout: All it wrote to standard output, less surrounding white space.
        stderr: The tail of what it wrote to standard error, likewise.
        exit_code: Its exit status, one of those the caller declared good.
        raw: Standard output as it came, for programs that do not write text.
    """

    stdout: str
    stderr: str
    exit_code: int
    raw: bytes = field(default=b"", repr=False, compare=False)


async def run(
    *argv: str | Path,
    timeout_s: float,
    ok: Collection[int] = (0,),
    input: bytes | None = None,  # noqa: A002 - the name that subprocess.run gives it
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Completed:
    """Run a program to its end and hand back what it said.

    Args:
        argv: Program and arguments. Arguments are never logged nor repeated in an error.
        timeout_s: Seconds until the program and its process group are killed.
        ok: Exit statuses that are no failure.
        input: Bytes for standard input; without them it reads end-of-file.
        env: Variables on top of the minimal environment (``LC_ALL=C`` and ``PATH``).
        cwd: Directory to run in.

    Raises:
        GpudError: ``host_command_failed``: the program is missing, could not be started, was killed
            for time or for endless output, or ended with another status.
    """
    program = os.fspath(argv[0])
    name = Path(program).name
    environment = _ENVIRONMENT | dict(env or {})
    executable = shutil.which(program, path=environment["PATH"])
    if executable is None:
        raise _failed(f"the program {name} is not installed", hint=_install_hint(name))
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            executable,
            *(os.fspath(argument) for argument in argv[1:]),
            stdin=asyncio.subprocess.DEVNULL if input is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # its own process group, so that all of it can be killed
        )
    )
    try:
        process = await _started(starting)
    except OSError as error:
        detail = f"{name} could not be started: {error.strerror}"
        raise _failed(detail, transient=error.errno in _EXHAUSTED) from error
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr, exit_code = await _converse(process, input)
    except TimeoutError as error:
        detail = f"{name} did not end within {timeout_s:g} s and was killed"
        if not await _kill(process):
            detail += "; it has not gone away yet (stuck inside the kernel?)"
        raise _failed(detail) from error
    except BaseException:  # cancellation above all: whatever happens, nothing is left running
        await _kill(process)
        raise
    if len(stdout) > _MAX_STDOUT_BYTES:
        raise _failed(f"{name} wrote more than {_MAX_STDOUT_BYTES} bytes")
    completed = Completed(_text(stdout), _text(stderr), exit_code, stdout)
    if exit_code not in ok:
        raise _failed(f"{name} {_ending(exit_code)}: {completed.stderr or 'it said nothing'}")
    return completed


async def _started(
    starting: asyncio.Future[asyncio.subprocess.Process],
) -> asyncio.subprocess.Process:
    """Wait for the start to be over, cancelled or not.

    asyncio itself, cancelled between the fork and the connection of the pipes, kills the program but
    none of its children, and may wait for them for good.
    """
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        await asyncio.wait([starting])
        if starting.exception() is None:
            await _kill(starting.result())
        raise


async def _converse(
    process: asyncio.subprocess.Process, stdin: bytes | None
) -> tuple[bytes, bytes, int]:
    assert process.stdout is not None  # noqa: S101 - both were asked for as pipes
    assert process.stderr is not None  # noqa: S101
    _, stdout, stderr = await asyncio.gather(
        _feed(process.stdin, stdin),
        # One byte more than allowed is kept, to know that there was more.
        _read_to_end(process.stdout, slice(0, _MAX_STDOUT_BYTES + 1)),
        _read_to_end(process.stderr, slice(-_STDERR_TAIL_BYTES, None)),
    )
    return stdout, stderr, await process.wait()


async def _feed(stream: asyncio.StreamWriter | None, data: bytes | None) -> None:
    if stream is None or data is None:
        return
    # A program may end without reading all of its input; its exit status tells whether that is bad.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stream.write(data)
        await stream.drain()
    stream.close()


async def _read_to_end(stream: asyncio.StreamReader, kept: slice) -> bytes:
    """Drain ``stream`` so that its writer never blocks, holding no more than ``kept`` of it."""
    data = b""
    while chunk := await stream.read(_READ_BYTES):
        data = (data + chunk)[kept]
    return data


async def _kill(process: asyncio.subprocess.Process) -> bool:
    """Kill the whole process group; False when its leader does not go away."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_KILL_GRACE_S):
            await process.wait()
    except TimeoutError:
        return False
    return True


def _failed(detail: str, hint: str = "", *, transient: bool = False) -> GpudError:
    return GpudError(Code.HOST_COMMAND_FAILED, detail, hint=hint, transient=transient)


def _install_hint(name: str) -> str:
    package = DEBIAN_PACKAGE.get(name)
    return (
        f"apt install {package}" if package else f"install it, or add it to {_ENVIRONMENT['PATH']}"
    )


def _ending(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with status {exit_code}"
    return f"was killed by {signal.Signals(-exit_code).name}"


def _text(data: bytes) -> str:
    return data.decode(errors="replace").strip()
