"""Cards that leave a running guest, or say nothing for a while, and what that means for the others."""

from __future__ import annotations

import asyncio

import pytest

from gpud.lifecycle import cleaning
from gpud.model import Instance, PciAddress, Status, Step
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import Clock
from tests.unit.lifecycle.gpud_under_test import Gpud

GPU, AUDIO = PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")
OTHER = PciAddress.parse("0000:02:00.0")


async def looks(gpud: Gpud) -> None:
    """Let the workers look at their cards a few times."""
    for _ in range(5):
        gpud.worker.wake_all()
        await asyncio.sleep(0.005)


async def sellable(gpud: Gpud) -> list[PciAddress]:
    await gpud.inventory.refresh()
    taken = {gpu.address for one in gpud.store.live.values() for gpu in one.grant.gpus}
    return [gpu.address for gpu in gpud.inventory.host.gpus if gpu.address not in taken]


def fate(gpud: Gpud, instance: Instance) -> Status | None:
    found = gpud.store.live.get(instance.upstream_id)
    return None if found is None else found.status


async def test_a_card_that_is_silent_for_a_moment_costs_no_tenant_anything(
    gpud: Gpud, kernel: FakeKernel, monotonic: Clock
) -> None:
    instance = await gpud.running()
    kernel.hang(f"devices/{GPU}/config")  # its guest resets it
    for _ in range(2):
        await looks(gpud)
        monotonic.advance(37)
    kernel.mend(f"devices/{GPU}/config")
    await looks(gpud)
    monotonic.advance(100)
    await looks(gpud)
    assert fate(gpud, instance) is Status.RUNNING


async def test_a_card_that_stays_silent_ends_its_instance(
    gpud: Gpud, kernel: FakeKernel, monotonic: Clock
) -> None:
    instance, other = await gpud.running("a"), await gpud.running("b")
    kernel.fall_off(GPU)
    await looks(gpud)
    assert fate(gpud, instance) is Status.RUNNING
    monotonic.advance(76)
    assert (await gpud.ended(instance)).status is Status.ERROR
    assert fate(gpud, other) is Status.RUNNING


async def test_a_guest_that_dies_of_its_card_is_not_started_again(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpud.inventory.bus._FRESH_S", 1000)
    instance = await gpud.running()
    await gpud.inventory.refresh()  # a moment ago, all was well
    kernel.pull(GPU)
    kernel.pull(AUDIO)
    libvirtd.guests[instance.domain_uuid].powers_off()
    assert (await gpud.ended(instance)).status is Status.ERROR
    assert libvirtd.calls.count("createXML") == 1


async def test_a_reset_without_end_stops_no_other_release_and_no_order(
    gpud: Gpud, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "_ASK_AGAIN_S", 0)
    stuck, other = await gpud.running("a"), await gpud.running("b")
    kernel.hang(f"devices/{GPU}/reset")
    await gpud.deleted(stuck)
    assert GPU in gpud.store.quarantines
    await gpud.deleted(other)
    assert await sellable(gpud) == [OTHER]
    again = await gpud.running("c")
    assert again.step is Step.RUNNING
    assert again.grant.gpus[0].address == OTHER
