"""Cards that are bound for a guest and have none: told of once, and left as they are."""

from __future__ import annotations

import asyncio

import pytest

from gpud.errors import GpudError
from gpud.host.vfio import Handover
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon, error
from tests.unit.fakes.orders import until
from tests.unit.lifecycle.gpud_under_test import Gpud, drivers

CARD = [PciAddress.parse("0000:01:00.0"), PciAddress.parse("0000:01:00.1")]


def handover(kernel: FakeKernel) -> Handover:
    return Handover(kernel.sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock)


async def told(gpud: Gpud) -> list[PciAddress | None]:
    return [event.gpu for event in await gpud.store.events() if "by nobody" in event.why]


@pytest.mark.leaves_a_mess
async def test_a_card_that_did_not_get_its_driver_back_is_told_of_once_and_not_touched(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.deleted(await gpud.running())
    await gpud.reconciler.once()
    assert await told(gpud) == []
    await handover(kernel).bind(CARD)
    before = drivers(kernel)
    for _ in range(2):
        await gpud.reconciler.once()
    assert sorted(map(str, await told(gpud))) == [*map(str, CARD)]
    assert drivers(kernel) == before
    await handover(kernel).give_back({CARD[0]: "nvidia", CARD[1]: "snd_hda_intel"})
    await gpud.reconciler.once()
    await handover(kernel).bind(CARD)
    await gpud.reconciler.once()
    assert len(await told(gpud)) == 4


async def test_a_card_that_came_with_vfio_pci_or_has_a_guest_is_none(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await handover(kernel).bind(CARD)
    await gpud.deleted(await gpud.running("came with vfio-pci"))
    await gpud.reconciler.once()
    await gpud.running("has it")
    await gpud.reconciler.once()
    assert await told(gpud) == []


async def test_looks_of_the_operator_and_of_the_daemon_follow_each_other(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    with libvirtd.hanging("listAllDomains") as fault:
        first = asyncio.create_task(gpud.reconciler.once())
        second = asyncio.create_task(gpud.reconciler.once(repair=True))
        await until(fault.reached.is_set)
        await asyncio.sleep(0.01)
        assert libvirtd.calls.count("listAllDomains") == 1
    await asyncio.gather(first, second)


async def test_a_libvirt_that_cannot_tell_who_has_what_is_asked_again(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    await gpud.running()
    libvirtd.fault("XMLDesc", error("cannot tell"), times=1_000_000)  # whoever else may ask it
    with pytest.raises(GpudError, match="cannot tell"):
        await gpud.reconciler.once()
    libvirtd.heal()
    await gpud.reconciler.once()
