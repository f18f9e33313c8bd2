"""From an order to a running QEMU, and from a DELETE to a GPU that can be sold again."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

from gpud.guest.image import Image, ImageStore
from gpud.model import Shape
from tests.bench.byhand import ByHand, forget_pools
from tests.bench.core import Bench
from tests.bench.daemon import Running, running
from tests.bench.history import example
from tests.bench.row import Row, Target
from tests.bench.virtual import Starts, watched_starts
from tests.machine.server import test_image

SHAPE = Shape("h100_sxm", 1, 1, 1024, 4)
_SCRIPT = "#!/bin/sh\nexit 0\n"
_RUN_S = 1.0
"""How long a guest runs before it is ended."""


async def measure(bench: Bench) -> AsyncIterator[Row]:
    async with (
        watched_starts() as starts,
        running(bench, "guests", test_image(), memory_gib=SHAPE.memory_mib / 1024) as daemon,
    ):
        image = ImageStore(daemon.server.state_dir / "images").resolve("demo")
        race = Race(bench, daemon, starts, image)
        sides = (race.gpud, race.virt_install, race.by_hand)
        try:
            await bench.take_turns("order to QEMU", bench.rounds(10, 3), *sides)
        finally:
            await forget_pools(daemon.server.config["libvirt"]["uri"], bench.directory)
    what = "order → QEMU running"
    yield Row(what, "virt-install --import", "s", race.gpud_s, race.virt_install_s, Target(0.5))
    yield Row(what, "qemu-img and virsh create", "s", race.gpud_s, race.by_hand_s, Target(1.3))
    yield Row(
        "DELETE → offered again", "virsh destroy, undefine, rm", "s", race.released_s,
        race.removed_s, Target(1.5),
    )  # fmt: skip


class Race:
    """The sides, and how long each took: from the order, and from its end."""

    def __init__(self, bench: Bench, daemon: Running, starts: Starts, image: Image) -> None:
        self._directory = bench.directory / "by-hand"
        self._daemon = daemon
        self._starts = starts
        self._image = image
        self.gpud_s: list[float] = []
        self.virt_install_s: list[float] = []
        self.by_hand_s: list[float] = []
        self.released_s: list[float] = []
        self.removed_s: list[float] = []

    async def gpud(self) -> float:
        """From the request that orders, to the start that libvirt tells of."""
        client = self._daemon.client
        began = time.perf_counter()
        accepted = client.order(secrets.token_hex(8), startup_script=_SCRIPT)
        started = await self._starts.of(domain_uuid(accepted["upstream_id"]))
        self.gpud_s.append(started - began)
        await asyncio.sleep(_RUN_S)
        began = time.perf_counter()
        client.delete(accepted["upstream_id"])
        client.wait_terminated(accepted["upstream_id"], available=1)
        self.released_s.append(time.perf_counter() - began)
        return self.gpud_s[-1]

    async def virt_install(self) -> float:
        guest = self._guest()
        began = time.perf_counter()
        await guest.virt_install()
        self.virt_install_s.append(await self._starts.of(guest.uuid) - began)
        await asyncio.sleep(_RUN_S)
        began = time.perf_counter()
        await guest.remove()
        self.removed_s.append(time.perf_counter() - began)
        return self.virt_install_s[-1]

    async def by_hand(self) -> float:
        """With the seed and the XML there already."""
        guest = self._guest()
        await guest.write_seed(guest.seed())
        xml = guest.write_xml()
        began = time.perf_counter()
        await guest.create(xml)
        self.by_hand_s.append(await self._starts.of(guest.uuid) - began)
        await asyncio.sleep(_RUN_S)
        await guest.remove()
        return self.by_hand_s[-1]

    def _guest(self) -> ByHand:
        return ByHand(self._directory, self._image, SHAPE, self._starts.domain_type, _SCRIPT)


def domain_uuid(upstream_id: str) -> uuid.UUID:
    """The domain's UUID, which gpud derives."""
    return replace(example(SHAPE, ""), upstream_id=upstream_id).domain_uuid
