"""Prometheus' page over real parts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from structlog.testing import capture_logs

from gpud import __version__
from gpud.guest.image import ImageStore
from gpud.lifecycle.cards import start_time_limit_s
from gpud.model import Step
from gpud.telemetry import Metrics
from gpud.watch import families
from gpud.watch.health import Health
from gpud.watch.page import Page
from tests.unit.service import Clock, make_running, order
from tests.unit.watch.conftest import CERTIFICATE_EXPIRES_AT, Watched


async def test_names_and_units_keep_prometheus_conventions(watched: Watched) -> None:
    kinds = dict(
        line.split()[2:4]
        for line in (await watched.page.render()).decode().splitlines()
        if line.startswith("# TYPE ")
    )
    assert all(name.startswith("gpud_") for name in kinds)
    assert not [name for name in kinds if name.endswith("_created")]
    counters = {name for name, kind in kinds.items() if kind == "counter"}
    assert counters == {name for name in kinds if name.endswith("_total")}
    histograms = {name for name, kind in kinds.items() if kind == "histogram"}
    assert all(name.endswith("_seconds") for name in histograms)
    for unit in ("_ms", "_mib", "_gib", "_minutes", "_percent"):
        assert not [name for name in kinds if unit in name]


async def test_the_page_tells_the_build_and_what_gpud_depends_on(watched: Watched) -> None:
    ((build, one),) = (await watched.samples())["gpud_build_info"]
    assert (build["version"], one) == (__version__, 1)
    for name in ("gpud_libvirt_up", "gpud_auth_ready", "gpud_host_readable"):
        assert await watched.value(name) == 1
    watched.libvirt.available, watched.libvirt.calls_in_thread = False, 3
    watched.keys.ready = False
    watched.service.inventory.problem = "cannot be read"
    assert await watched.value("gpud_libvirt_calls_pending") == 3
    for name in ("gpud_libvirt_up", "gpud_auth_ready", "gpud_host_readable"):
        assert await watched.value(name) == 0
    expiry = await watched.value("gpud_tls_certificate_expiry_timestamp_seconds")
    assert expiry == CERTIFICATE_EXPIRES_AT


async def test_without_tls_no_certificate_expires(watched: Watched) -> None:
    watched.page._certificate_expires_at = lambda: None
    assert "gpud_tls_certificate_expiry_timestamp_seconds" not in await watched.samples()


async def test_an_order_is_seen_in_cards_instances_and_offers(watched: Watched) -> None:
    service = watched.service
    kinds = {"gpu_type": "h100_sxm", "state": "available"}
    one_spot = {"gpu_type": "h100_sxm", "gpu_count": "1", "tier": "spot"}
    assert await watched.value("gpud_gpus", **kinds) == 2
    assert await watched.value("gpud_offers_available", **one_spot) == 2
    instance = (await service.desk.order(order())).instance
    await service.desk.order(order())
    assert await watched.value("gpud_gpus", **kinds) == 1
    assert await watched.value("gpud_gpus", **{**kinds, "state": "in_use"}) == 1
    assert await watched.value("gpud_gpus", **{**kinds, "state": "quarantined"}) == 0
    assert await watched.value("gpud_offers_available", **one_spot) == 1
    assert await watched.value("gpud_instances", status="creating") == 1
    await make_running(service, instance.upstream_id)
    assert await watched.value("gpud_instances", status="creating") == 0
    assert await watched.value("gpud_instances", status="running") == 1
    claims = await watched.value("gpud_gpu_claims_total", gpu_type="h100_sxm", tier="on_demand")
    assert claims == 1, "the repeat of the order claims nothing"


async def test_a_quarantine_is_told_by_card_and_reason(watched: Watched) -> None:
    assert "gpud_gpu_not_sold" not in await watched.samples()
    card = watched.service.inventory.cards[0]
    await watched.service.store.quarantine(card.address, "smells")
    told = await watched.samples()
    assert told["gpud_gpu_not_sold"] == [({"gpu": str(card.address), "reason": "quarantined"}, 1)]
    assert len(told["gpud_gpu_info"]) == 2


async def test_a_drain_is_told_of_the_server_and_of_its_cards(watched: Watched) -> None:
    drained = {"gpu_type": "h100_sxm", "state": "drained"}
    service = watched.service
    first, second = (card.address for card in service.inventory.cards)
    await service.store.drain(first)
    assert await watched.value("gpud_drained") == 0
    assert await watched.value("gpud_gpus", **drained) == 1
    await service.store.drain(None)
    assert await watched.value("gpud_drained") == 1
    assert await watched.value("gpud_gpus", **drained) == 2
    assert await watched.value("gpud_gpu_not_sold", gpu=str(second), reason="drained") == 1
    one_spot = {"gpu_type": "h100_sxm", "gpu_count": "1", "tier": "spot"}
    assert await watched.value("gpud_offers_available", **one_spot) == 0
    assert await Health(watched.sources).ready() == {}, "it is as its operator wants it"


async def test_an_instance_is_overdue_after_its_steps_deadline(
    watched: Watched, clock: Clock
) -> None:
    instance = (await watched.service.desk.order(order())).instance
    step = instance.step
    deadline_s = watched.service.config.deadlines.of(step)
    assert deadline_s is not None
    clock.advance(deadline_s)
    assert await watched.value("gpud_instances_overdue", step=step.value) == 0
    clock.advance(1)
    assert await watched.value("gpud_instances_overdue", step=step.value) == 1
    await make_running(watched.service, instance.upstream_id)
    clock.advance(10**6)
    overdue = (await watched.samples())["gpud_instances_overdue"]
    assert sum(number for _, number in overdue) == 0, "a running instance is never late"
    assert {labels["step"] for labels, _ in overdue}.isdisjoint({"running", "ended"})


async def test_a_start_may_take_as_long_as_the_worker_gives_it(watched: Watched) -> None:
    """Pinning a large guest's memory takes time, which the deadline alone does not know."""
    config, now = watched.service.config, watched.service.clock()
    instance = (await watched.service.desk.order(order())).instance
    for step in (Step.CLONE_DISK, Step.WRITE_SEED, Step.CHECK_GPUS, Step.BIND_GPUS,
                 Step.START_DOMAIN):  # fmt: skip
        instance = await watched.service.store.move(instance, step)
    shape = replace(instance.grant.shape, memory_mib=2**20)
    gpus = tuple(replace(gpu, functions=(gpu.address,)) for gpu in instance.grant.gpus)
    large = replace(instance, grant=replace(instance.grant, shape=shape, gpus=gpus))
    limit_s = start_time_limit_s(config.deadlines.start_domain_s, large.grant)
    assert limit_s > config.deadlines.start_domain_s

    def overdue_after(seconds: float) -> float:
        _, family = families.of_instances([large], config.deadlines, now + seconds)
        (late,) = [one.value for one in family.samples if one.labels["step"] == "start_domain"]
        return late

    assert overdue_after(limit_s) == 0
    assert overdue_after(limit_s + 1) == 1


async def test_images_and_disk_are_told_in_bytes(watched: Watched, state_dir: Path) -> None:
    (image,) = watched.service.images.list()
    assert await watched.value("gpud_image_size_bytes", image="base") == image.size_bytes
    assert await watched.value("gpud_image_instances", image="base") == 0
    assert await watched.value("gpud_guest_image_usable") == 1
    files = state_dir / "instances" / "i-1"
    files.mkdir(parents=True)
    (files / "disk.qcow2").write_bytes(b"x" * 8192)
    told = await watched.samples()
    (_, size), (_, free) = told["gpud_disk_size_bytes"][0], told["gpud_disk_free_bytes"][0]
    assert 0 < free < size
    assert await watched.value("gpud_disk_instances_bytes") == 8192


async def test_a_missing_guest_image_is_told(watched: Watched, tmp_path: Path) -> None:
    empty = replace(watched.sources, images=ImageStore(tmp_path / "no images"))
    page = Page(watched.service.config, Metrics(), empty)
    await page.add_up()
    assert b"gpud_guest_image_usable 0.0" in await page.render()


async def test_a_state_directory_that_cannot_be_read_costs_its_own_numbers_only(
    watched: Watched, state_dir: Path
) -> None:
    shutil.rmtree(state_dir)
    with capture_logs() as logs:
        told = await watched.samples()
    assert "gpud_disk_free_bytes" not in told
    assert "gpud_gpus" in told
    assert logs[0]["event"] == "metrics are incomplete"
