"""Programs that the demo and the machine tests run, and end again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

GPUD = (sys.executable, "-m", "gpud")


_given: set[int] = set()


def free_port() -> int:
    """A TCP port of loopback that nobody listens on at the moment; another one each time."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


class Program:
    """One program, its output in a file, in a session of its own."""

    def __init__(self, name: str, argv: list[str], log: Path, env: Mapping[str, str]) -> None:
        self.name = name
        self.argv = argv
        self.log = log
        self.env = {**os.environ, **env}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=self.env,
                start_new_session=True,
            )  # fmt: skip

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def kill(self) -> None:
        """End it the way a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 20) -> None:
        """End it politely; it must end by itself, and well."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{self.name} did not end within {timeout_s} s") from None

    async def killed(self, timeout_s: float) -> None:
        """Wait until it has ended by SIGKILL; any other end is a failure."""
        assert self.process is not None
        async with asyncio.timeout(timeout_s):
            while self.running:
                await asyncio.sleep(0.02)
        if self.process.returncode != -signal.SIGKILL:
            raise AssertionError(f"{self.name} ended by itself:\n{self.tail()}")

    async def listening(self, port: int, timeout_s: float = 30) -> None:
        """Wait until it accepts connections on ``port``."""
        async with asyncio.timeout(timeout_s):
            while True:
                if not self.running:
                    raise AssertionError(f"{self.name} ended:\n{self.tail()}")
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    return
                await asyncio.sleep(0.1)

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def qemu_pid(domain: str) -> int | None:
    """The process of a guest, found by the name that libvirt gives QEMU; None when it does not run."""
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            arguments = (directory / "cmdline").read_bytes().split(b"\0")
            if f"guest={domain},debug-threads=on".encode() in arguments:
                return int(directory.name)
    return None


async def output_of(*argv: str, timeout_s: float = 60) -> str:
    """What a command prints; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise AssertionError(f"{argv[0]} did not end within {timeout_s} s") from None
    if process.returncode != 0:
        raise AssertionError(f"{' '.join(argv)}: {err.decode(errors='replace').strip()}")
    return out.decode(errors="replace")
