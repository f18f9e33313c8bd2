"""What the daemon costs when nothing happens: guests run, nobody asks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from tests.bench.core import Bench
from tests.bench.daemon import running
from tests.bench.process import cpu_s
from tests.bench.row import Row, Target
from tests.machine.small_guest import small_guest

_GUESTS = 8
_BOOT_TIMEOUT_S = 600


async def measure(bench: Bench) -> AsyncIterator[Row]:
    image = await small_guest()
    guest = {"firmware": "bios"}
    async with running(bench, "idle", image, gpus=_GUESTS, guest=guest) as daemon:
        found = [daemon.client.order(f"guest-{n}")["upstream_id"] for n in range(_GUESTS)]
        deadline = time.monotonic() + _BOOT_TIMEOUT_S
        while {daemon.client.status(one) for one in found} != {"running"}:
            assert time.monotonic() < deadline, "the guests did not come up"
            await asyncio.sleep(1)
        bench.say(f"{_GUESTS} guests run; watching an idle daemon")
        seconds = 20 if bench.quick else 60
        shares = [await cpu_share(daemon.pid, seconds) for _ in range(bench.rounds(3, 1))]
    what = f"idle CPU with {_GUESTS} running guests"
    yield Row(what, "one core", "cores", shares, [1.0] * len(shares), Target(0.005))


async def cpu_share(pid: int, seconds: float) -> float:
    """Processor time of a process, as a share of one core."""
    before_s, began = cpu_s(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (cpu_s(pid) - before_s) / (time.monotonic() - began)
