"""What GPU.ai does all day: it asks what is for sale, and how an instance is.

Server and client have a core each, and it is the server's time on its core that is counted: what else
runs on the machine takes time from both, and is in neither. The floor is a handler of the same library
that returns the same bytes and does nothing else: no token, no routes, no metrics.
"""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.bench.core import Bench, Side
from tests.bench.daemon import (
    CLIENT_CORE,
    SERVER_CORE,
    TEST_DRIVER,
    Running,
    empty_image,
    on_core,
    running,
)
from tests.bench.process import cpu_s
from tests.bench.row import FLAT_RATE, Row, Target
from tests.machine.processes import Program, free_port, output_of

_CONNECTIONS = 8
_REQUESTS = re.compile(r"^\s*(\d+) requests in ", re.MULTILINE)
_UNIT = "/core-s"
_FAILURES = re.compile(r"^\s*(Non-2xx|Socket errors).*$", re.MULTILINE)
_MANY_ENDED = 100_000
_STARTS = 5
"""Programs that are alike run up to a sixth apart, for as long as they live."""
_OFFERS = "GET /v1/gpu/available"
_INSTANCE = "GET /v1/instances/{id}"


async def measure(bench: Bench) -> AsyncIterator[Row]:
    image = empty_image(bench)
    ended = _MANY_ENDED // 50 if bench.quick else _MANY_ENDED
    offers: list[tuple[float, ...]] = []
    instance: list[tuple[float, ...]] = []
    for number in range(bench.rounds(_STARTS, 1)):
        async with started(bench, image, number, ended) as daemons:
            offers += await _rates(bench, daemons, ["/v1/gpu/available"] * 3, _OFFERS)
            found = [daemon.client.order("polled")["upstream_id"] for daemon in daemons]
            paths = [f"/v1/instances/{upstream_id}" for upstream_id in found]
            instance += await _rates(bench, daemons, paths, _INSTANCE)
    for row in (*_rows(offers, _OFFERS, 0.7, ended), *_rows(instance, _INSTANCE, 0.6, ended)):
        yield row


@asynccontextmanager
async def started(
    bench: Bench, image: Path, number: int, ended: int
) -> AsyncIterator[list[Running]]:
    """Of one start: a daemon with one GPU, one with sixteen, and one with a past."""
    kinds = (("one", 1, 0), ("sixteen", 16, 0), ("old", 1, ended))
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                running(
                    bench, f"{name}-{number}", image, gpus=gpus, ended=past,
                    prefix=on_core(SERVER_CORE), libvirt=TEST_DRIVER,
                )
            )
            for name, gpus, past in kinds
        ]  # fmt: skip


async def _rates(
    bench: Bench, daemons: list[Running], paths: list[str], what: str
) -> list[tuple[float, ...]]:
    """Each round's rates: of a daemon with one GPU, one with sixteen, one with a past, and the floor."""
    seconds = 1 if bench.quick else 3
    asked = [
        load(daemon.server.url + path, daemon.pid, daemon.token, seconds)
        for daemon, path in zip(daemons, paths, strict=True)
    ]
    async with bare(bench, daemons[0], paths[0]) as floor:
        url, pid = floor
        sides = [*asked, load(url, pid, daemons[0].token, seconds)]
        rates = await bench.take_turns(what, bench.rounds(2, 3), *sides)
    return list(zip(*rates, strict=True))


def _rows(rates: list[tuple[float, ...]], what: str, limit: float, ended: int) -> list[Row]:
    one, sixteen, old, bare_rates = zip(*rates, strict=True)
    floor_is, at_least = "a bare aiohttp handler, same bytes", Target(limit, at_least=True)
    return [
        Row(what, floor_is, _UNIT, one, bare_rates, at_least),
        Row(f"{what}, 16 GPUs", "1 GPU", _UNIT, sixteen, one, FLAT_RATE),
        Row(f"{what}, {ended:,} ended instances", "none", _UNIT, old, one, FLAT_RATE),
    ]


@asynccontextmanager
async def bare(bench: Bench, daemon: Running, path: str) -> AsyncIterator[tuple[str, int]]:
    """The floor, up, with what the daemon answers: its URL and its process."""
    status, answer = daemon.client.ask(path)
    assert status == 200, answer
    file = bench.directory / "answer.json"
    file.write_bytes(answer)
    port = free_port()
    argv = [*on_core(SERVER_CORE), sys.executable, "-m", "tests.bench.bare", str(port), str(file)]
    program = Program("bare", argv, bench.directory / "bare.log", {})
    program.start()
    try:
        await program.listening(port)
        yield f"http://127.0.0.1:{port}/", program.pid
    finally:
        program.stop()


def load(url: str, pid: int, token: str, seconds: int) -> Side:
    """Answers for each second on the core, all connections kept alive and always busy."""

    async def once() -> float:
        before_s = cpu_s(pid)
        report = await output_of(
            *on_core(CLIENT_CORE), "wrk", "--threads", "1", "--connections", str(_CONNECTIONS),
            "--duration", f"{seconds}s", "--header", f"Authorization: Bearer {token}", url,
        )  # fmt: skip
        took_s = cpu_s(pid) - before_s
        failures, answers = _FAILURES.search(report), _REQUESTS.search(report)
        assert failures is None, report
        assert answers is not None, report
        return int(answers[1]) / took_s

    return once
