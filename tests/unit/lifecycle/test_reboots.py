"""The server goes down between the hand-over of a card and its guest's start."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpud.model import Instance, Status, Step
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold, drivers, make_server

AS_FOUND = {("nvidia", ""), ("snd_hda_intel", "")}


async def rebooted(start_gpud: StartGpud, libvirtd: LibvirtDaemon, server: FakeKernel) -> Gpud:
    libvirtd.guests.clear()
    return await start_gpud(server=server)


@pytest.fixture
def server(state_dir: Path) -> FakeKernel:
    """The same server in its next boot."""
    return make_server(state_dir / "next boot")


async def until_held(gpud: Gpud, hold: Hold) -> Instance:
    instance = await gpud.order()
    await hold.reached.wait()
    await gpud.kill()
    return instance


async def runs_again(gpud: Gpud, libvirtd: LibvirtDaemon, instance: Instance) -> Instance:
    await until(lambda: instance.domain_uuid in libvirtd.guests)
    return await gpud.reach(instance, Step.RUNNING)


@pytest.mark.parametrize("step", [Step.BIND_GPUS, Step.START_DOMAIN])
async def test_a_guest_gets_its_cards_and_their_drivers_get_them_back(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, server: FakeKernel, step: Step
) -> None:
    instance = await until_held(await start_gpud(hold := Hold(step, after=True)), hold)
    gpud = await rebooted(start_gpud, libvirtd, server)
    await gpud.reach(instance, Step.RUNNING)
    held = {server.driver(one) for gpu in instance.grant.gpus for one in gpu.functions}
    assert held == {"vfio-pci"}

    # Another start in this boot finds the cards on vfio-pci, which is not where they came from.
    libvirtd.guests[instance.domain_uuid].powers_off()
    await runs_again(gpud, libvirtd, instance)
    assert (await gpud.deleted(instance)).status is Status.TERMINATED
    assert set(drivers(server).values()) == AS_FOUND


async def test_a_guest_that_was_being_started_again_runs_on(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, server: FakeKernel
) -> None:
    hold = Hold(Step.START_DOMAIN, after=False)
    hold.open.set()
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    hold.reached.clear()
    hold.open.clear()
    libvirtd.guests[instance.domain_uuid].powers_off()
    await hold.reached.wait()
    await gpud.kill()
    gpud = await rebooted(start_gpud, libvirtd, server)
    again = await runs_again(gpud, libvirtd, instance)
    assert again.status is Status.RUNNING
    assert server.resets == []  # a tenant's own cards come back as they were


async def test_a_card_that_cannot_be_taken_any_more_fails_the_order(
    start_gpud: StartGpud, libvirtd: LibvirtDaemon, server: FakeKernel
) -> None:
    hold = Hold(Step.START_DOMAIN, after=False)
    instance = await until_held(await start_gpud(hold), hold)
    bad = instance.grant.gpus[0].address
    server.refuse(bad, "vfio-pci")
    gpud = await rebooted(start_gpud, libvirtd, server)
    ended = await gpud.ended(instance)
    assert ended.failure == "its GPUs could not be handed over"
    assert list(gpud.store.quarantines) == [bad]
    assert "createXML" not in libvirtd.calls
