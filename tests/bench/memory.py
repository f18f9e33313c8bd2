"""What a day's work leaves in the daemon's memory: an hour of polling, and a thousand orders."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tests.bench.core import Bench
from tests.bench.daemon import TEST_DRIVER, Running, empty_image, running
from tests.bench.process import rss_mb
from tests.bench.row import Row, Target

_POLLS = 120
"""Of one hour, one every 30 s."""
_WARM_UP = 20
_RSS_MB = 80.0


async def measure(bench: Bench) -> AsyncIterator[Row]:
    orders = bench.rounds(1000, 60)
    async with running(bench, "memory", empty_image(bench), libvirt=TEST_DRIVER) as daemon:
        _work(bench, daemon, _WARM_UP, "warm-up")
        before_mb = rss_mb(daemon.pid)
        _work(bench, daemon, orders, "order")
        after_mb = rss_mb(daemon.pid)
    what = f"RSS after an hour's polls and {orders:,} orders"
    yield Row(what, f"after {_WARM_UP} orders", "MB", [after_mb], [before_mb], Target(1.05))
    yield Row(what, "80 MB", "MB", [after_mb], [_RSS_MB], Target(1))


def _work(bench: Bench, daemon: Running, orders: int, name: str) -> None:
    client = daemon.client
    for number in range(orders):
        if number % 100 == 0:
            bench.say(f"memory: {name} {number} of {orders}, {rss_mb(daemon.pid):.1f} MB")
        accepted = client.order(f"{name}-{number}", startup_script="#!/bin/sh\n")
        for _ in range(-(-_POLLS // orders)):
            client.available()
            client.status(accepted["upstream_id"])
        client.delete(accepted["upstream_id"])
        client.wait_terminated(accepted["upstream_id"], available=1)
