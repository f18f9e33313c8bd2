"""From the command to the word that it is ready, as systemd hears it."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator

from tests.bench.core import Bench, Side
from tests.bench.daemon import empty_image, running
from tests.bench.row import FLAT_COST, Row, Target
from tests.machine.server import GpudServer

_MANY_ENDED = 100_000
_FLOOR = 'python -c "import aiohttp, libvirt"'


async def measure(bench: Bench) -> AsyncIterator[Row]:
    image = empty_image(bench)
    ended = _MANY_ENDED // 50 if bench.quick else _MANY_ENDED
    async with (
        running(bench, "young", image) as young,
        running(bench, "aged", image, ended=ended) as aged,
    ):
        starts = [start(bench, daemon.server) for daemon in (young, aged)]
        ours, old, floor = await bench.take_turns(
            "start", bench.rounds(15, 3), *starts, import_libraries
        )
    yield Row("start of the daemon to ready", _FLOOR, "s", ours, floor, Target(3))
    yield Row(f"start with {ended:,} ended instances", "with none", "s", old, ours, FLAT_COST)


def start(bench: Bench, server: GpudServer) -> Side:
    """End the daemon, and start it again; in seconds."""

    async def once() -> float:
        server.daemon.stop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
            path = bench.directory / "notify"
            path.unlink(missing_ok=True)
            systemd.bind(str(path))
            systemd.setblocking(False)
            server.daemon.env["NOTIFY_SOCKET"] = str(path)
            began = time.perf_counter()
            server.daemon.start()
            async with asyncio.timeout(60):
                told = b""
                while b"READY=1" not in told:
                    told = await asyncio.get_running_loop().sock_recv(systemd, 4096)
            return time.perf_counter() - began

    return once


def import_libraries() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import aiohttp, libvirt"], check=True)
    return time.perf_counter() - began
