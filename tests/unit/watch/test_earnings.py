"""What instances have earned, over their lives and the daemon's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gpud.guest.image import ImageStore
from gpud.telemetry import Metrics
from gpud.watch.page import Page
from tests.unit.service import (
    Clock,
    config_from,
    make_ended,
    make_failed,
    make_running,
    order,
    running_service,
)
from tests.unit.watch.conftest import Watched, watch

HOUR_S = 3600
ON_DEMAND = {"gpu_type": "h100_sxm", "tier": "on_demand"}


async def earned(watched: Watched) -> float:
    return await watched.value("gpud_earnings_usd_total", **ON_DEMAND)


async def running(watched: Watched, instance_id: str = "one") -> str:
    accepted = await watched.service.desk.order(order(instance_id))
    await make_running(watched.service, accepted.instance.upstream_id)
    return accepted.instance.upstream_id


async def test_an_instance_earns_from_when_it_runs(watched: Watched, clock: Clock) -> None:
    accepted = await watched.service.desk.order(order())
    clock.advance(HOUR_S)
    assert await earned(watched) == 0
    await make_running(watched.service, accepted.instance.upstream_id)
    clock.advance(2 * HOUR_S)
    assert await earned(watched) == pytest.approx(2 * 3.49)
    assert await watched.value("gpud_earnings_usd_total", gpu_type="h100_sxm", tier="spot") == 0


async def test_it_earns_until_the_caller_asks_to_terminate_it(
    watched: Watched, clock: Clock
) -> None:
    upstream_id = await running(watched)
    clock.advance(HOUR_S)
    await watched.service.store.request_delete(upstream_id)
    clock.advance(HOUR_S)
    assert await earned(watched) == pytest.approx(3.49)
    await make_ended(watched.service, upstream_id)
    clock.advance(HOUR_S)
    assert await earned(watched) == pytest.approx(3.49)


async def test_a_failed_one_that_is_deleted_later_is_not_counted_again(
    watched: Watched, clock: Clock
) -> None:
    upstream_id = await running(watched)
    clock.advance(HOUR_S)
    await make_failed(watched.service, upstream_id, "its guest ended")
    await make_ended(watched.service, upstream_id)
    assert await earned(watched) == pytest.approx(3.49)
    clock.advance(HOUR_S)
    await watched.service.store.request_delete(upstream_id)
    assert await earned(watched) == pytest.approx(3.49)


async def test_a_clock_that_goes_back_takes_nothing_back(watched: Watched, clock: Clock) -> None:
    await running(watched)
    clock.advance(2 * HOUR_S)
    before = await earned(watched)
    clock.advance(-HOUR_S)
    assert await earned(watched) == before
    clock.advance(2 * HOUR_S)
    assert await earned(watched) == pytest.approx(3 * 3.49)


async def test_a_restart_neither_loses_nor_doubles(
    tmp_path: Path, images: ImageStore, clock: Clock
) -> None:
    config = config_from(tmp_path)
    async with running_service(config, images, clock) as service:
        watched = await watch(service, clock)
        ended = await running(watched, "ended")
        clock.advance(1234.5)
        await service.store.request_delete(ended)
        await make_ended(service, ended)
        await running(watched, "lives on")
        clock.advance(777)
        before = await earned(watched)
    async with running_service(config, images, clock) as service:
        again = await watch(service, clock)
        assert await earned(again) == before
        clock.advance(HOUR_S)
        assert await earned(again) == pytest.approx(before + 3.49)


async def test_nothing_is_shown_before_the_sum_is_whole(watched: Watched, clock: Clock) -> None:
    """A part of the sum, and then all of it, would look as if the difference had just been earned."""
    await make_ended(watched.service, await running(watched))
    page = Page(watched.service.config, Metrics(), watched.sources, clock=clock)
    scrape = asyncio.create_task(page.render())
    await asyncio.sleep(0.05)
    assert not scrape.done()
    adding = asyncio.create_task(page.add_up())
    assert b"gpud_earnings_usd_total" in await scrape
    await adding


async def test_an_end_while_the_sum_is_made_counts_once(watched: Watched, clock: Clock) -> None:
    upstream_id = await running(watched)
    clock.advance(HOUR_S)
    page = Page(watched.service.config, Metrics(), watched.sources, clock=clock)
    adding = asyncio.create_task(page.add_up())
    await make_ended(watched.service, upstream_id)
    await adding
    shown = (await page.render()).decode().splitlines()
    wanted = 'gpud_earnings_usd_total{gpu_type="h100_sxm",tier="on_demand"} 3.49'
    assert wanted in shown


async def test_many_restarts_never_show_less(
    tmp_path: Path, images: ImageStore, clock: Clock
) -> None:
    """A sum that came out a hair smaller would make Prometheus count everything once more."""
    config = config_from(tmp_path)
    shown = 0.0
    for number in range(3):
        async with running_service(config, images, clock) as service:
            watched = await watch(service, clock)
            assert await earned(watched) == shown
            upstream_id = await running(watched, f"order-{number}")
            for _ in range(7):
                clock.advance(333.3)
                await earned(watched)
            await service.store.request_delete(upstream_id)
            await make_ended(service, upstream_id)
            shown = await earned(watched)
