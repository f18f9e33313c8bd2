"""What systemd's watchdog is told, and when it is told nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gpud.watch import watchdog as watchdog_module
from gpud.watch.health import Health
from gpud.watch.watchdog import CALLS_STUCK_S, Watchdog
from tests.unit.service import Clock
from tests.unit.test_systemd import listener
from tests.unit.watch.conftest import Watched


@pytest.fixture
def fed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What systemd was sent so far; looked at when the test asks."""
    path = str(tmp_path / "notify")
    monkeypatch.setenv("NOTIFY_SOCKET", path)

    class Heard(list[bytes]):
        def __len__(self) -> int:
            while True:
                try:
                    self.append(receiver.recv(100))
                except BlockingIOError:
                    return super().__len__()

    with listener(path) as receiver:
        receiver.setblocking(False)
        yield Heard()


def watchdog_of(watched: Watched, clock: Clock) -> Watchdog:
    health = Health(watched.sources, time_limit_s=0.02)
    return Watchdog(health, watched.libvirt, most_calls=8, monotonic=clock)


async def test_all_well(watched: Watched, clock: Clock, fed: list[bytes]) -> None:
    assert await watchdog_of(watched, clock).feed()
    assert len(fed) == 1
    assert fed == [b"WATCHDOG=1"]


async def test_libvirt_being_away_is_no_reason(
    watched: Watched, clock: Clock, fed: list[bytes]
) -> None:
    watched.libvirt.available = False
    watched.keys.ready = False
    watched.libvirt.calls_in_thread = 1  # the one that connects
    watchdog = watchdog_of(watched, clock)
    for _ in range(5):
        clock.advance(3600)
        assert await watchdog.feed()
    assert len(fed) == 5


async def test_a_record_that_hangs_is_one(watched: Watched, clock: Clock, fed: list[bytes]) -> None:
    go_on = threading.Event()
    watched.service.store._thread.submit(go_on.wait)
    watchdog = watchdog_of(watched, clock)
    try:
        with capture_logs() as logs:
            assert not await watchdog.feed()
            assert not await watchdog.feed()
        assert [log["problems"].keys() for log in logs] == [{"store"}], "told once"
        assert len(fed) == 0
    finally:
        go_on.set()
    async with asyncio.timeout(5):
        while not await watchdog.feed():
            await asyncio.sleep(0.001)


async def test_calls_that_hang_for_long_are_one(
    watched: Watched, clock: Clock, fed: list[bytes]
) -> None:
    watchdog = watchdog_of(watched, clock)
    watched.libvirt.calls_in_thread = 8  # as many as may be waited for
    assert await watchdog.feed()
    clock.advance(CALLS_STUCK_S)
    assert await watchdog.feed()
    watched.libvirt.calls_in_thread = 9
    assert await watchdog.feed()
    clock.advance(CALLS_STUCK_S - 1)
    assert await watchdog.feed()
    clock.advance(1)
    with capture_logs() as logs:
        assert not await watchdog.feed()
    assert "9 have not returned for 600 s" in str(logs)
    watched.libvirt.calls_in_thread = 0
    assert await watchdog.feed()
    watched.libvirt.calls_in_thread = 9
    assert await watchdog.feed(), "counted anew"
    assert len(fed) == 6


async def test_it_is_fed_twice_in_each_period(
    watched: Watched, clock: Clock, fed: list[bytes]
) -> None:
    running = asyncio.create_task(watchdog_of(watched, clock).run(0.02))
    async with asyncio.timeout(5):
        while len(fed) < 3:
            await asyncio.sleep(0.001)
    running.cancel()


async def test_after_a_failure_it_is_looked_at_again_soon(
    watched: Watched, clock: Clock, fed: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog_module, "_AGAIN_S", 0.005)
    watchdog = watchdog_of(watched, clock)
    watched.libvirt.calls_in_thread = 9
    await watchdog.feed()
    clock.advance(CALLS_STUCK_S)
    running = asyncio.create_task(watchdog.run(3600))
    await asyncio.sleep(0.01)
    watched.libvirt.calls_in_thread = 0
    async with asyncio.timeout(5):
        while len(fed) < 2:
            await asyncio.sleep(0.001)
    running.cancel()


async def test_where_nobody_watches_nothing_is_done(watched: Watched, clock: Clock) -> None:
    await watchdog_of(watched, clock).run(None)
