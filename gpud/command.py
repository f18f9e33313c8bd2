"""The one door to other programs: an argument list in, bounded output back, nothing left running.

No shell, no inherited environment, no prompt on standard input. A program that does not end in its
time is killed with everything it started.

Programs are started with :mod:`subprocess` and not with asyncio's own, which never ends where a loop
that is being closed cancels it between the fork and the connection of the pipes: it waits for pipes that
nobody connects any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

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
_FIRST_PAUSE_S: Final = 0.0005
_LONGEST_PAUSE_S: Final = 0.05
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


class StuckError(GpudError):
    """A program was killed and does not go away: something inside the kernel holds it up.

    Attributes:
        process: The program. Its ``returncode`` is set once the kernel has let go of it.
    """

    def __init__(self, detail: str, process: subprocess.Popen[bytes]) -> None:
        super().__init__(Code.HOST_COMMAND_FAILED, detail)
        self.process = process


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
            for time or for endless output, or ended with another status. A :class:`StuckError` where
            it was killed for time and did not go away.
    """
    program = os.fspath(argv[0])
    name = Path(program).name
    environment = _ENVIRONMENT | dict(env or {})
    executable = shutil.which(program, path=environment["PATH"])
    if executable is None:
        raise _failed(f"the program {name} is not installed", hint=_install_hint(name))
    try:
        process = _start([executable, *argv[1:]], input, environment, cwd)
    except OSError as error:
        detail = f"{name} could not be started: {error.strerror}"
        raise _failed(detail, transient=error.errno in _EXHAUSTED) from error
    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr, exit_code = await _heard_out(process)
    except TimeoutError as error:
        detail = f"{name} did not end within {timeout_s:g} s and was killed"
        if await _kill(process):
            raise _failed(detail) from error
        detail += "; it has not gone away yet (stuck inside the kernel?)"
        raise StuckError(detail, process) from error
    except BaseException:  # cancellation above all: whatever happens, nothing is left running
        await _kill(process)
        raise
    finally:
        for pipe in _pipes(process):
            pipe.close()
    if len(stdout) > _MAX_STDOUT_BYTES:
        raise _failed(f"{name} wrote more than {_MAX_STDOUT_BYTES} bytes")
    completed = Completed(_text(stdout), _text(stderr), exit_code, stdout)
    if exit_code not in ok:
        raise _failed(f"{name} {_ending(exit_code)}: {completed.stderr or 'it said nothing'}")
    return completed


def _start(
    argv: list[str | Path], data: bytes | None, environment: Mapping[str, str], cwd: Path | None
) -> subprocess.Popen[bytes]:
    """Fork; the loop stands still for it, as it would for asyncio's own."""
    with _standard_input(data) as stdin:
        return subprocess.Popen(
            argv,
            bufsize=0,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=cwd,
            start_new_session=True,  # its own process group, so that all of it can be killed
        )


@contextlib.contextmanager
def _standard_input(data: bytes | None) -> Iterator[int]:
    """A descriptor to read ``data`` from; out of memory, so that nobody has to feed the program."""
    if data is None:
        yield subprocess.DEVNULL
        return
    with open(os.memfd_create("input"), "w+b") as file:  # noqa: PTH123 - it has no path
        file.write(data)
        file.seek(0)
        yield file.fileno()


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdout is not None  # noqa: S101 - both were asked for as pipes
    assert process.stderr is not None  # noqa: S101
    return process.stdout, process.stderr


async def _heard_out(process: subprocess.Popen[bytes]) -> tuple[bytes, bytes, int]:
    """What a program writes until it and all that have its pipes are done, and its exit status."""
    stdout, stderr = _pipes(process)
    async with asyncio.TaskGroup() as group:
        # One byte more than allowed is kept, to know that there was more.
        out = group.create_task(_read_to_end(stdout, slice(0, _MAX_STDOUT_BYTES + 1)))
        err = group.create_task(_read_to_end(stderr, slice(-_STDERR_TAIL_BYTES, None)))
    return out.result(), err.result(), await _exit_code(process)


async def _read_to_end(pipe: IO[bytes], kept: slice) -> bytes:
    """Drain ``pipe`` so that its writer never blocks, holding no more than ``kept`` of it."""
    stream = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(stream), pipe
    )
    data = b""
    try:
        while chunk := await stream.read(_READ_BYTES):
            data = (data + chunk)[kept]
    finally:
        transport.close()
    return data


async def _exit_code(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a program that was killed, or whose pipes are at theirs: seldom for long."""
    pause_s = _FIRST_PAUSE_S
    while (exit_code := process.poll()) is None:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return exit_code


async def _kill(process: subprocess.Popen[bytes]) -> bool:
    """Kill the whole process group; False when its leader does not go away."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with asyncio.timeout(_KILL_GRACE_S):
            await _exit_code(process)
    except TimeoutError:
        return False
    finally:
        if process.returncode is None:  # whenever it does go, it must not stay behind as a zombie
            name = f"waitpid-{process.pid}"
            threading.Thread(target=process.wait, name=name, daemon=True).start()
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
