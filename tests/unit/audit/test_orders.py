"""Orders that do not get on, or are told of as what they are not."""

from __future__ import annotations

import pytest

from gpud.audit.facts import Kind
from gpud.model import Status, Step
from tests.unit.audit.odds import found, rewrite, the_finding
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import Clock
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, RELEASE_STEPS, Gpud, Hold

pytestmark = pytest.mark.leaves_a_mess


async def test_a_whole_life_is_as_it_has_to_be(gpud: Gpud) -> None:
    assert await gpud.findings() == []
    instance = await gpud.running()
    assert await gpud.findings() == []
    await gpud.deleted(instance)
    assert await gpud.findings() == []


@pytest.mark.parametrize("step", [*CREATE_STEPS, *RELEASE_STEPS])
@pytest.mark.parametrize("after", [False, True], ids=["before its act", "after its act"])
async def test_an_order_in_the_midst_of_any_step_is_as_it_has_to_be(
    start_gpud: StartGpud, step: Step, after: bool
) -> None:
    hold = Hold(step, after=after)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    if step in RELEASE_STEPS:
        await gpud.reach(instance, Step.RUNNING)
        await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    assert await gpud.findings() == []
    hold.open.set()


async def test_an_order_that_does_not_get_on_is_lost(
    gpud: Gpud, libvirtd: LibvirtDaemon, clock: Clock
) -> None:
    libvirtd.on_start = lambda _guest: None
    instance = await gpud.reach(await gpud.order(), Step.AWAIT_READY)
    clock.advance(900 + 80)
    assert await gpud.findings() == []
    clock.advance(20)
    finding = await the_finding(gpud)
    assert (finding.kind, finding.subject) == (Kind.LOST_ORDER, instance.upstream_id)
    assert "await_ready for longer than its 900 s" in finding.what


async def test_a_start_that_pins_much_memory_has_more_time(
    start_gpud: StartGpud, clock: Clock
) -> None:
    gpud = await start_gpud(Hold(Step.START_DOMAIN, after=False))
    await gpud.reach(await gpud.order(), Step.START_DOMAIN)
    clock.advance(180 + 95)
    assert await gpud.findings() == []
    clock.advance(180)
    assert (await the_finding(gpud)).kind is Kind.LOST_ORDER


async def test_a_step_has_its_time_from_the_start_of_the_daemon_on(
    start_gpud: StartGpud, clock: Clock
) -> None:
    first = await start_gpud(Hold(Step.CLONE_DISK, after=False))
    await first.reach(await first.order(), Step.CLONE_DISK)
    await first.kill()
    clock.advance(3600)
    second = await start_gpud(Hold(Step.CLONE_DISK, after=False))
    assert await second.findings() == []


async def test_a_status_that_does_not_fit_its_step_is_a_contradiction(gpud: Gpud) -> None:
    instance = await gpud.running()
    rewrite(gpud, "UPDATE instance SET status = ?", Status.CREATING.value)
    assert await found(gpud) == [(Kind.CONTRADICTION, instance.upstream_id)] * 2
    first, second = await gpud.findings()
    assert first.what == "is told as creating, and is at step running"
    assert (
        second.what
        == "is running/running by what the daemon says, and creating/running by its record"
    )


async def test_an_order_that_lost_its_script_is_lost(gpud: Gpud) -> None:
    instance = await gpud.running()
    rewrite(gpud, "DELETE FROM guest_input")
    assert await found(gpud) == [(Kind.LOST_ORDER, instance.upstream_id)]


async def test_an_order_of_which_the_daemon_says_nothing_is_a_contradiction(gpud: Gpud) -> None:
    instance = await gpud.running()
    del gpud.store._live[instance.upstream_id]
    assert (Kind.CONTRADICTION, instance.upstream_id) in await found(gpud)
    assert any("is ended by what the daemon says" in one.what for one in await gpud.findings())
