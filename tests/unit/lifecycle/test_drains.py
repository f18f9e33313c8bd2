"""Whole orders while cards are drained: what is there stays, and what comes free is not sold."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpud.errors import Code, GpudError
from gpud.inventory import CardState
from gpud.model import RELEASE_STEPS, PciAddress, Status, Step
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, Gpud, Hold

GPU, OTHER = PciAddress(0, 1, 0, 0), PciAddress(0, 2, 0, 0)
WHAT = pytest.mark.parametrize("what", [GPU, None], ids=["the card", "the server"])


def state(gpud: Gpud, address: PciAddress = GPU) -> CardState:
    card = gpud.inventory.card(address)
    assert card is not None
    return card.state


async def refused(gpud: Gpud) -> None:
    with pytest.raises(GpudError) as caught:
        await gpud.order("refused")
    assert caught.value.code is Code.NO_CAPACITY


@WHAT
async def test_an_instance_keeps_what_is_drained_and_gives_it_back_unsold(
    gpud: Gpud, what: PciAddress | None
) -> None:
    instance = await gpud.running()
    await gpud.store.drain(what)
    await gpud.inventory.refresh()
    assert state(gpud) is CardState.IN_USE
    ended = await gpud.deleted(instance)
    assert (ended.status, ended.failure) == (Status.TERMINATED, None)
    await gpud.inventory.refresh()
    assert (state(gpud), gpud.store.quarantines) == (CardState.DRAINED, {})
    if what is None:
        await refused(gpud)
    else:
        assert (await gpud.running("next")).grant.gpus[0].address == OTHER
        await refused(gpud)
    assert await gpud.findings() == []
    await gpud.store.undrain(what)
    again = await gpud.running("again")
    assert again.grant.gpus[0].address == GPU


@WHAT
@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_an_order_under_way_is_carried_out(
    start_gpud: StartGpud, what: PciAddress | None, step: Step
) -> None:
    hold = Hold(step, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.store.drain(what)
    hold.open.set()
    running = await gpud.reach(instance, Step.RUNNING)
    assert running.status is Status.RUNNING
    assert await gpud.findings() == []


@WHAT
async def test_a_guest_that_ends_by_itself_is_started_again_on_its_drained_card(
    gpud: Gpud, libvirtd: LibvirtDaemon, what: PciAddress | None
) -> None:
    instance = await gpud.running()
    await gpud.store.drain(what)
    libvirtd.guests[instance.domain_uuid].powers_off()
    await until(lambda: gpud.store.live[instance.upstream_id].step is not Step.RUNNING)
    again = await gpud.reach(instance, Step.RUNNING)
    assert (again.status, again.restarts) == (Status.RUNNING, 1)


@pytest.mark.parametrize("step", sorted(RELEASE_STEPS))
async def test_a_card_that_is_drained_while_it_is_given_back_comes_out_drained(
    start_gpud: StartGpud, step: Step
) -> None:
    hold = Hold(step, after=False)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    await gpud.store.drain(GPU)
    assert state(gpud) is CardState.CLEANING
    hold.open.set()
    await gpud.ended(instance)
    await gpud.inventory.refresh()
    assert state(gpud) is CardState.DRAINED
    assert gpud.store.quarantines == {}


async def test_a_drain_and_what_runs_under_it_outlive_the_daemon(
    start_gpud: StartGpud, gpud: Gpud
) -> None:
    instance = await gpud.running()
    await gpud.store.drain(None, "new kernel")
    await gpud.kill()
    after = await start_gpud()
    assert after.store.drains[None].reason == "new kernel"
    assert (await after.reach(instance, Step.RUNNING)).status is Status.RUNNING
    await refused(after)


async def test_a_drained_card_that_fails_after_its_guest_is_quarantined_and_drained(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    instance = await gpud.running()
    await gpud.store.drain(GPU)
    kernel.fail(f"devices/{GPU}/reset", 5)
    await gpud.deleted(instance)
    await gpud.inventory.refresh()
    assert state(gpud) is CardState.QUARANTINED
    kernel.mend(f"devices/{GPU}/reset")
    kernel.release(f"devices/{GPU}/reset")
    assert GPU in gpud.store.drains


@pytest.mark.leaves_a_mess
async def test_a_drained_card_that_is_pulled_stays_drained_for_who_takes_its_place(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.store.drain(GPU, "to be swapped")
    for function in (GPU, replace(GPU, function=1)):
        kernel.pull(function)
    await gpud.inventory.refresh()
    assert state(gpud) is CardState.UNAVAILABLE
    kernel.add_function(GPU, driver="nvidia", group=1, device=0x2331)
    await gpud.inventory.refresh()
    assert await gpud.inventory.confirm(GPU)
    await gpud.inventory.refresh()
    assert state(gpud) is CardState.DRAINED


@pytest.mark.leaves_a_mess
async def test_a_drained_card_that_is_taken_out_for_good_leaves_no_drain(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.store.drain(GPU, "to be sold")
    for function in (GPU, replace(GPU, function=1)):
        kernel.pull(function)
    assert await gpud.inventory.confirm(GPU)
    assert gpud.store.drains == {}
    assert gpud.inventory.card(GPU) is None
