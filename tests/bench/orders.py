"""How long GPU.ai waits for the answer to an order, against the least it can cost to make it durable."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.bench.core import Bench, Side
from tests.bench.daemon import TEST_DRIVER, Running, empty_image, running
from tests.bench.row import Row, Target
from tests.bench.stats import quantile
from tests.machine.server import test_image

_GUESTS = 8
_PAUSE_S = 0.1
"""Before each commit of either side: orders are rare, and a disk that was idle takes longer."""
_FLOOR = "one durable SQLite commit, same disk"
_SCRIPT = "#!/bin/sh\n" + "# what opens GPU.ai's tunnel takes about this much\n" * 40


async def measure(bench: Bench) -> AsyncIterator[Row]:
    image = empty_image(bench)
    async with running(bench, "orders", image, libvirt=TEST_DRIVER) as daemon:
        for row in await _rows(bench, daemon, "idle", bench.rounds(300, 60)):
            yield row
    async with running(
        bench, "orders-booting", test_image(), gpus=_GUESTS + 1, memory_gib=0.5
    ) as daemon:
        for number in range(_GUESTS):
            daemon.client.order(f"guest-{number}")
        which = f"{_GUESTS} guests booting"
        for row in await _rows(bench, daemon, which, bench.rounds(60, 8)):
            yield row


async def _rows(bench: Bench, daemon: Running, when: str, rounds: int) -> list[Row]:
    with commits(bench.directory / "floor.sqlite") as commit:
        title = f"POST /v1/instances, {when}"
        ours, floor = await bench.take_turns(title, rounds, post(daemon), commit)
    tail_ours, tail_floor = quantile(ours, 0.99), quantile(floor, 0.99)
    return [
        Row(f"{title}, p50", f"{_FLOOR}, p50", "ms", ours, floor, Target(4)),
        Row(f"{title}, p99", f"{_FLOOR}, p99", "ms", [tail_ours], [tail_floor], None),
    ]


def post(daemon: Running) -> Side:
    """Orders the one GPU that is free, gives it back, and waits until it is free again; in ms."""
    client, number = daemon.client, 0

    def once() -> float:
        nonlocal number
        number += 1
        time.sleep(_PAUSE_S)
        accepted = client.order(f"order-{number}", startup_script=_SCRIPT)
        took_ms = client.took_s * 1000
        client.delete(accepted["upstream_id"])
        client.wait_terminated(accepted["upstream_id"], available=1)
        return took_ms

    return once


@contextmanager
def commits(path: Path) -> Iterator[Side]:
    """One row in one transaction, on disk when it returns, written as gpud's record is; in ms."""
    with closing(sqlite3.connect(path, isolation_level=None)) as floor:
        for pragma in ("journal_mode = WAL", "synchronous = FULL"):
            floor.execute(f"PRAGMA {pragma}")
        floor.execute("CREATE TABLE IF NOT EXISTS floor (row TEXT)")

        def once() -> float:
            time.sleep(_PAUSE_S)
            began = time.perf_counter()
            floor.execute("BEGIN IMMEDIATE")
            floor.execute("INSERT INTO floor VALUES (?)", (_SCRIPT,))
            floor.execute("COMMIT")
            return (time.perf_counter() - began) * 1000

        yield once
