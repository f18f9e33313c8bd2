"""The latest view of the host: looked at again and again, joined with the record as it is now."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from gpud.errors import Code, GpudError
from gpud.host.capacity import Capacity
from gpud.inventory import CardState, Inventory, inventory
from gpud.model import KnownCard, NumaNode, PciAddress, Step
from gpud.store import Store
from tests.unit.conftest import NvmlOn
from tests.unit.fakes.orders import until
from tests.unit.inventory.conftest import CONFIG, Server
from tests.unit.inventory.parts import at, gpu, known

STAND_INS = "gpus: {stand_ins: [{gpu_type: l40s, count: 2}, {gpu_type: rtx_4090, count: 1}]}"
NVML = """driver_version 550.90.07
card 0000:3b:00.0
    ids 10de:2684
    subsystem 10de:16c1
    name NVIDIA GeForce RTX 4090
    uuid GPU-0000003b
    memory_mib 24564
"""
SICK = NVML + "    mig 1 1\n"
runs_nvml = pytest.mark.real_command("gcc", Path(sys.executable).name)


@asynccontextmanager
async def kept_up(view: Inventory) -> AsyncIterator[None]:
    task = asyncio.create_task(view.run())
    yield
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- room


async def test_reserve_is_taken_off_evenly_from_the_nodes(server: Server) -> None:
    server.capacity = Capacity((NumaNode(0, 4, 8192), NumaNode(1, 4, 8192)), 100)
    view = server.inventory()
    await view.refresh()
    assert view.host.nodes == (NumaNode(0, 3, 7424), NumaNode(1, 3, 7424))
    assert view.host.storage_gib == 90


async def test_nothing_goes_below_zero(server: Server) -> None:
    server.capacity = Capacity((NumaNode(0, 1, 512),), 5)
    view = server.inventory()
    await view.refresh()
    assert (view.host.cpu_cores, view.host.memory_mib, view.host.storage_gib) == (0, 0, 0)


async def test_the_host_keeps_none_of_the_huge_pages(server: Server) -> None:
    view = server.inventory(config=CONFIG + "guest: {hugepages: 1G}")
    await view.refresh()
    assert view.host.memory_mib == 16384


async def test_addresses_are_for_the_network_mode_only(server: Server) -> None:
    view = server.inventory()
    await view.refresh()
    assert view.host.addresses is None
    config = CONFIG.replace("mode: user", "mode: network, subnet: 10.9.0.0/29")
    view = server.inventory(config=config)
    await view.refresh()
    assert view.host.addresses is not None
    assert len(view.host.addresses) == 5


# ---- cards


async def test_before_the_first_look_there_is_nothing(server: Server) -> None:
    view = server.inventory(config=CONFIG + STAND_INS)
    assert view.cards == ()
    assert view.host.gpus == ()


async def test_stand_ins_have_addresses_that_no_machine_has(server: Server) -> None:
    view = server.inventory(config=CONFIG + STAND_INS)
    await view.refresh()
    assert [gpu.gpu_type for gpu in view.host.gpus] == ["l40s", "l40s", "rtx_4090"]
    assert len({gpu.address for gpu in view.host.gpus}) == 3
    assert all(gpu.stand_in and not gpu.functions for gpu in view.host.gpus)
    assert all(PciAddress.parse(str(gpu.address)) == gpu.address for gpu in view.host.gpus)


async def test_a_stand_in_shows_who_has_it(server: Server) -> None:
    view = server.inventory(config=CONFIG + STAND_INS)
    await view.refresh()
    instance = await server.claim(view.host.gpus[1])
    assert [card.holder for card in view.cards] == [None, instance.upstream_id, None]
    assert view.cards[1].state is CardState.IN_USE


async def test_an_order_and_a_quarantine_count_at_once(server: Server) -> None:
    server.has(gpu("3b"), gpu("3c"))
    view = server.inventory()
    await view.refresh()
    instance = await server.claim(view.host.gpus[0])
    assert [card.state for card in view.cards] == [CardState.IN_USE, CardState.AVAILABLE]
    assert len(view.host.gpus) == 2  # what is claimed is the allocator's to take off
    await server.store.quarantine(at("3c"), "hot")
    assert [one.address for one in view.host.gpus] == [at("3b")]
    await server.release(instance, Step.CLEAN_GPUS)
    assert [card.state for card in view.cards] == [CardState.CLEANING, CardState.QUARANTINED]
    await server.store.release(at("3c"))
    assert len(view.host.gpus) == 2


async def test_the_view_may_be_read_on_any_thread(server: Server) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    assert await asyncio.to_thread(lambda: view.host) == view.host


async def test_a_card_is_found_by_its_address(server: Server) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    found = view.card(at("3b"))
    assert found is not None
    assert found.gpu_type == "rtx_4090"
    assert view.card(at("3c")) is None


async def test_each_look_is_a_new_view(server: Server) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    first = view.view
    server.has(gpu("3b", driver=None))
    await view.refresh()
    assert view.view == first + 1
    assert view.host.gpus == ()


async def test_a_lost_card_is_named(server: Server) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    assert await view.lost([at("3b"), at("3c")]) == [at("3c")]


async def test_a_domain_listed_before_its_instance_ended_has_nothing_any_more(
    server: Server,
) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    instance = await server.claim(view.host.gpus[0])
    server.domains = {at("3b"): instance.domain_name}
    await view.refresh()
    assert view.cards[0].summary == f"instance {instance.upstream_id}"
    await server.release(instance)
    await asyncio.sleep(0)
    await view.refresh()
    assert view.cards[0].why_not == ()
    server.domains = {at("3b"): "win11"}
    await view.refresh()
    assert view.cards[0].holder == "domain win11"


# ---- what is remembered


async def test_what_was_learned_is_kept_and_written_once(server: Server) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    assert server.store.known_cards == {at("3b"): KnownCard(at("3b"), "10de:2684 10de:16c1")}
    version = server.store.version
    await view.refresh()
    assert server.store.version == version


async def test_a_record_that_cannot_be_written_stops_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(_: KnownCard) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(server.store, "remember_card", full)
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    assert len(view.host.gpus) == 1


async def test_another_card_is_sold_once_the_operator_confirmed_it(server: Server) -> None:
    await server.store.remember_card(known("3b", ids="10de:2230 10de:16c1"))
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    assert view.host.gpus == ()
    assert await view.confirm(at("3b"))
    assert len(view.host.gpus) == 1


async def test_a_card_that_was_taken_out_is_forgotten_when_confirmed(server: Server) -> None:
    await server.store.remember_card(known("3b"))
    view = server.inventory()
    await view.refresh()
    assert view.card(at("3b")) is not None
    assert await view.confirm(at("3b"))
    assert view.card(at("3b")) is None
    assert not await view.confirm(at("3b"))


# ---- NVML


@runs_nvml
async def test_nvml_is_heard_before_the_first_look_is_over(server: Server, nvml_on: NvmlOn) -> None:
    server.has(gpu("3b"))
    view = server.inventory(nvml_on(NVML))
    await view.refresh()
    assert view.cards[0].uuid == "GPU-0000003b"
    assert view.cards[0].why_not == ()
    assert view.nvml_problem is None
    assert server.store.known_cards[at("3b")].uuid == "GPU-0000003b"


@runs_nvml
async def test_a_hanging_nvml_delays_nobody_and_hides_no_card(
    server: Server, nvml_on: NvmlOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_FIRST_ANSWER_S", 0.01)
    server.has(gpu("3b"), gpu("3c", driver="vfio-pci"))
    view = server.inventory(nvml_on("hang nvmlInitWithFlags\n", timeout_s=0.3))
    await view.refresh()
    assert [card.summary for card in view.cards] == ["NVML has not answered yet", ""]
    async with kept_up(view):
        await until(lambda: view.nvml_problem)
    assert [card.summary for card in view.cards] == ["", ""]
    assert view.nvml_problem is not None
    assert "did not answer" in view.nvml_problem


@runs_nvml
async def test_an_nvml_that_dies_unsays_nothing(server: Server, nvml_on: NvmlOn) -> None:
    server.has(gpu("3b"))
    view = server.inventory(nvml_on(SICK + "    compute 1\n"))
    await view.refresh()
    assert len(view.cards[0].used_by) == 1
    await view._ask(nvml_on("crash nvmlInitWithFlags\n"))
    assert "MIG is on" in view.cards[0].why_not[0]
    assert not view.cards[0].used_by  # nobody could say that it has ended


@runs_nvml
async def test_nvml_is_asked_again_and_again(
    server: Server, nvml_on: NvmlOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_ASK_NVML_EVERY_S", 0.01)
    server.has(gpu("3b"))
    view = server.inventory(nvml_on(NVML))
    await view.refresh()
    first = view.view
    nvml_on(SICK)
    async with kept_up(view):
        await until(lambda: not view.host.gpus)
    assert view.view > first
    assert "MIG is on" in view.cards[0].why_not[0]


@runs_nvml
async def test_a_card_that_nvml_leaves_out_is_not_sold(server: Server, nvml_on: NvmlOn) -> None:
    server.has(gpu("3b"), gpu("3c"), gpu("3d", driver="vfio-pci"))
    view = server.inventory(nvml_on(NVML))
    await view.refresh()
    assert [one.address for one in view.host.gpus] == [at("3b"), at("3d")]
    assert "NVML does not know it" in view.cards[1].why_not[0]


# ---- going on and on


def problem(view: Inventory) -> str | None:
    return view.problem


async def test_a_failed_look_keeps_the_former_view(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_LOOK_EVERY_S", 0.001)
    view = server.inventory()
    assert problem(view) == "the host has not been looked at yet"
    await view.refresh()
    assert problem(view) is None
    server.fails = OSError("gone")
    async with kept_up(view):
        await asyncio.sleep(0.02)
        assert view.host.cpu_cores == 6
        assert problem(view) == "gone"
        server.capacity = replace(server.capacity, nodes=(NumaNode(0, 9, 16384),))
        server.fails = None
        await until(lambda: view.host.cpu_cores == 7)
        assert problem(view) is None


async def test_a_look_follows_at_once_when_an_instance_has_ended(
    server: Server, store: Store
) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()
    instance = await server.claim(view.host.gpus[0])
    server.has(gpu("3b", driver=None))
    await view.refresh()
    async with kept_up(view):
        await asyncio.sleep(0)
        server.has(gpu("3b"))
        await server.release(instance)
        await until(lambda: view.cards[0].state is CardState.AVAILABLE)
    assert store.live == {}


@runs_nvml
async def test_a_bus_that_hangs_while_nvml_is_asked_is_reported_and_tried_again(
    server: Server, nvml_on: NvmlOn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "_ASK_NVML_EVERY_S", 0)
    monkeypatch.setattr(inventory, "_LOOK_EVERY_S", 0.01)
    server.has(gpu("3b"))
    view = server.inventory(nvml_on(NVML))
    await view.refresh()
    nvml_on(SICK)
    real, fails = view._bus.tree, True

    async def tree() -> object:
        if fails:
            raise GpudError(Code.GPU_UNUSABLE, "the PCI bus cannot be read")
        return await real()

    monkeypatch.setattr(view._bus, "tree", tree)
    async with kept_up(view):
        await asyncio.sleep(0.03)
        assert view.cards[0].why_not == ()
        fails = False
        await until(lambda: not view.host.gpus)
