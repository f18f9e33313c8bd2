"""From an order to the startup script, which is what opens the customer's way in.

The script of every side says so itself: it connects to a port of the host, as GPU.ai's opens its tunnel.
Same image, same virtual machine, same network configuration, user and key.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpud.guest.image import Image, ImageStore
from gpud.model import Shape
from tests.bench.byhand import KEY, ByHand, plain
from tests.bench.core import Bench
from tests.bench.daemon import Running, running
from tests.bench.row import Row, Target
from tests.bench.virtual import Starts, watched_starts
from tests.machine.server import test_image

_SHAPE = Shape("h100_sxm", 1, 2, 1024, 4)
_TIMEOUT_S = 900.0


async def measure(bench: Bench) -> AsyncIterator[Row]:
    async with (
        watched_starts() as starts,
        beacon() as heard,
        running(
            bench, "boot", test_image(), cores=_SHAPE.cpu_cores, memory_gib=_SHAPE.memory_mib / 1024
        ) as daemon,
    ):
        image = ImageStore(daemon.server.state_dir / "images").resolve("demo")
        race = Race(bench, daemon, starts, image, heard)
        sides = [race.gpud, race.runcmd, race.own_seed]
        ours, runcmd, floor = await bench.take_turns("boot", bench.rounds(3, 1), *sides)
    what = "order → startup script started"
    yield Row(what, "the script in a plain runcmd seed", "s", ours, runcmd, Target(0.55))
    yield Row(what, "QEMU by hand with gpud's own seed and disk", "s", ours, floor, Target(1.05))


class Beacon:
    """Hears from startup scripts."""

    def __init__(self) -> None:
        self.port = 0
        self._said: dict[str, asyncio.Future[float]] = {}

    def script(self, word: str) -> str:
        """A startup script that says ``word``."""
        return f"#!/bin/bash\nexec 3<>/dev/tcp/10.0.2.2/{self.port} && echo {word} >&3\n"

    async def said(self, word: str) -> float:
        """When it was said first, by ``time.perf_counter``."""
        async with asyncio.timeout(_TIMEOUT_S):
            return await self._future(word)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        now = time.perf_counter()
        said = self._future((await reader.readline()).decode().strip())
        if not said.done():
            said.set_result(now)
        writer.close()

    def _future(self, word: str) -> asyncio.Future[float]:
        return self._said.setdefault(word, asyncio.get_running_loop().create_future())


@asynccontextmanager
async def beacon() -> AsyncIterator[Beacon]:
    heard = Beacon()
    server = await asyncio.start_server(heard.serve, "127.0.0.1")
    heard.port = server.sockets[0].getsockname()[1]
    try:
        yield heard
    finally:
        server.close()


class Race:
    """The sides; all in seconds."""

    def __init__(
        self, bench: Bench, daemon: Running, starts: Starts, image: Image, heard: Beacon
    ) -> None:
        self._bench = bench
        self._daemon = daemon
        self._starts = starts
        self._image = image
        self._heard = heard

    async def gpud(self) -> float:
        word, client = secrets.token_hex(8), self._daemon.client
        script = self._heard.script(word)
        began = time.perf_counter()
        accepted = client.order(word, startup_script=script, ssh_public_keys=[KEY])
        try:
            took_s = await self._heard.said(word) - began
        finally:
            client.delete(accepted["upstream_id"])
            client.wait_terminated(accepted["upstream_id"], available=1)
        return self._tell("gpud", took_s)

    async def runcmd(self) -> float:
        return self._tell("runcmd", await self._by_hand(ours=False))

    async def own_seed(self) -> float:
        return self._tell("by hand", await self._by_hand(ours=True))

    async def _by_hand(self, *, ours: bool) -> float:
        """``qemu-img`` and ``virsh``, with the seed there already."""
        word = secrets.token_hex(8)
        script = self._heard.script(word)
        directory = self._bench.directory / "by-hand"
        guest = ByHand(directory, self._image, _SHAPE, self._starts.domain_type, script)
        seed = guest.seed()
        await guest.write_seed(seed if ours else plain(seed, script))
        xml = guest.write_xml()
        began = time.perf_counter()
        await guest.create(xml)
        try:
            return await self._heard.said(word) - began
        finally:
            await guest.remove()

    def _tell(self, side: str, took_s: float) -> float:
        self._bench.say(f"boot: {side} {took_s:.1f} s")
        return took_s
