"""The view of the host."""

from __future__ import annotations

import asyncio

import pytest

from gpud import inventory
from gpud.configfile import parse_config
from gpud.host.capacity import Capacity
from gpud.inventory import Inventory
from gpud.model import PciAddress

CONFIG = """
auth: {issuer: x, audience: [a], jwks_url: "https://a/b"}
site: {region: US, datacenter_location: x}
host_reserve: {cpu_cores: 2, memory_gib: 1.5, storage_gib: 10}
gpus: {stand_ins: [{gpu_type: l40s, count: 2}, {gpu_type: rtx_4090, count: 1}]}
network: {mode: %s, subnet: 10.9.0.0/29}
"""


def measured(
    capacity: Capacity = Capacity(8, 16384, 100),  # noqa: B008 - frozen
    mode: str = "user",
) -> Inventory:
    return Inventory(parse_config(CONFIG % mode), lambda: capacity)


async def test_reserve_is_taken_off() -> None:
    view = measured()
    await view.refresh()
    assert (view.host.cpu_cores, view.host.memory_mib, view.host.storage_gib) == (6, 14848, 90)


async def test_nothing_goes_below_zero() -> None:
    view = measured(Capacity(1, 512, 5))
    await view.refresh()
    assert (view.host.cpu_cores, view.host.memory_mib, view.host.storage_gib) == (0, 0, 0)


async def test_stand_ins_have_addresses_that_no_machine_has() -> None:
    view = measured()
    await view.refresh()
    assert [gpu.gpu_type for gpu in view.host.gpus] == ["l40s", "l40s", "rtx_4090"]
    assert len({gpu.address for gpu in view.host.gpus}) == 3
    assert all(gpu.stand_in for gpu in view.host.gpus)
    assert all(PciAddress.parse(str(gpu.address)) == gpu.address for gpu in view.host.gpus)


async def test_addresses_are_for_the_network_mode_only() -> None:
    view = measured(mode="user")
    await view.refresh()
    assert view.host.addresses is None
    view = measured(mode="network")
    await view.refresh()
    assert view.host.addresses is not None
    assert len(view.host.addresses) == 5


async def test_before_the_first_look_there_is_nothing() -> None:
    assert measured().host.gpus == ()


async def test_a_failed_look_keeps_the_former_view(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0
    looked = asyncio.Event()

    def measure() -> Capacity:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise OSError("gone")
        if looks == 4:
            looked.set()
        return Capacity(9, 16384, 100)

    monkeypatch.setattr(inventory, "_REFRESH_S", 0)
    view = Inventory(parse_config(CONFIG % "user"), measure)
    await view.refresh()
    task = asyncio.create_task(view.run())
    await asyncio.wait_for(looked.wait(), 5)
    task.cancel()
    assert view.host.cpu_cores == 7
    assert view.view >= 3
