"""The operator's side door: lists and consoles over HTTP, as the gpud command asks for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer

from gpud.api import admin
from gpud.api.admin import Admin
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.model import GuestInput, KnownCard, PciAddress
from tests.unit.service import Service, make_ended, make_failed, make_running, order

BROKEN = PciAddress.parse("0000:42:00.0")


@pytest.fixture
def consoles(tmp_path: Path) -> ConsoleLogs:
    return ConsoleLogs(tmp_path / "console", 64 * 1024)


@pytest.fixture
async def door(service: Service, consoles: ConsoleLogs, clock: Any) -> AsyncIterator[TestServer]:
    async def reconcile() -> None:
        consoles.remove("i-00000000000000aa")

    async def reload() -> list[str]:
        return ["stock.high_from: 4 -> 5"]

    async def release(address: PciAddress) -> bool:
        if address == BROKEN:
            raise GpudError(Code.GPU_UNUSABLE, f"{address} does not answer", hint="see dmesg")
        return await service.store.release(address)

    overview = service.overview(consoles)
    side_door = Admin(
        service.store,
        service.desk,
        service.inventory,
        release,
        consoles,
        clock,
        reconcile=reconcile,
        reload=reload,
        overview=overview.server,
        in_full=overview.instance,
    )
    server = TestServer(side_door.build_app())
    await server.start_server(access_log=None)
    yield server
    await server.close()


class Operator:
    def __init__(self, session: aiohttp.ClientSession, door: TestServer) -> None:
        self.session = session
        self.door = door

    async def get(self, path: str) -> Any:
        async with self.session.get(self.door.make_url(path)) as response:
            return await response.json(content_type=None)

    async def post(self, path: str, **body: str) -> Any:
        async with self.session.post(self.door.make_url(path), json=body) as response:
            return await response.json(content_type=None)


@pytest.fixture
def operator(session: aiohttp.ClientSession, door: TestServer) -> Operator:
    return Operator(session, door)


async def new_instance(service: Service, instance_id: str = "gpuai-1") -> str:
    return (await service.desk.order(order(instance_id))).instance.upstream_id


async def test_an_instance_is_shown_in_full(
    service: Service, operator: Operator, clock: Any
) -> None:
    upstream_id = await new_instance(service)
    await make_running(service, upstream_id)
    await service.store.script_exited(upstream_id, 3)
    clock.advance(75)
    assert await operator.get("/instances") == {
        "instances": [
            {
                "upstream_id": upstream_id,
                "instance_id": "gpuai-1",
                "status": "running",
                "step": "running",
                "in_step_seconds": 75,
                "gpu_type": "h100_sxm",
                "gpus": ["ffffffff:00:00.0"],
                "tier": "on_demand",
                "cpu_cores": 4,
                "memory_mib": 16384,
                "storage_gib": 100,
                "address": None,
                "cost_per_hour": 3.49,
                "uptime_seconds": 75,
                "script_exit_code": 3,
                "restarts": 0,
                "failure": None,
            }
        ]
    }


@pytest.mark.parametrize(
    "settings", [{"network": {"mode": "network", "subnet": "10.9.0.0/29"}}], ids=[""]
)
async def test_an_address_of_its_own_is_shown(service: Service, operator: Operator) -> None:
    await new_instance(service)
    assert (await operator.get("/instances"))["instances"][0]["address"] == "10.9.0.2"


async def test_ended_instances_are_shown_when_asked_for(
    service: Service, operator: Operator, clock: Any
) -> None:
    first = await new_instance(service, "gpuai-1")
    await make_failed(service, first, "no boot")
    await make_ended(service, first)
    clock.advance(1)
    second = await new_instance(service, "gpuai-2")
    live = await operator.get("/instances")
    assert [one["upstream_id"] for one in live["instances"]] == [second]
    all_of_them = await operator.get("/instances?all=1")
    assert [one["upstream_id"] for one in all_of_them["instances"]] == [first, second]
    assert all_of_them["instances"][0]["failure"] == "no boot"


async def test_offers_are_shown_with_those_that_are_sold_out(
    service: Service, operator: Operator
) -> None:
    await new_instance(service)
    shown = (await operator.get("/offers"))["offerings"]
    assert [one["available_count"] for one in shown] == [1, 1, 0, 0]
    service.hypervisor.up = False
    shown = (await operator.get("/offers"))["offerings"]
    assert {(one["available_count"], one["stock_status"]) for one in shown} == {(0, "Low")}


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/instances/none/console", "instance_not_found"),
        ("/nothing", "not_found"),
        ("/instances/..%2f..%2fetc%2fpasswd/console", "instance_not_found"),
    ],
)
async def test_a_refusal_is_a_problem(operator: Operator, path: str, code: str) -> None:
    assert (await operator.get(path))["code"] == code


async def test_a_console_is_shown_by_either_id(
    service: Service, consoles: ConsoleLogs, door: TestServer, session: aiohttp.ClientSession
) -> None:
    upstream_id = await new_instance(service)
    consoles.append(upstream_id, b"\x1b[31mboot\xff\n")
    for either_id in (upstream_id, "gpuai-1"):
        async with session.get(door.make_url(f"/instances/{either_id}/console")) as response:
            assert await response.read() == b"\x1b[31mboot\xff\n"
            assert response.content_type == "application/octet-stream"


async def test_a_console_without_output_is_empty(
    service: Service, door: TestServer, session: aiohttp.ClientSession
) -> None:
    await new_instance(service)
    async with session.get(door.make_url("/instances/gpuai-1/console")) as response:
        assert await response.read() == b""


async def test_a_console_is_followed_from_its_first_byte_to_the_end(
    service: Service,
    consoles: ConsoleLogs,
    door: TestServer,
    session: aiohttp.ClientSession,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admin, "_FOLLOW_EVERY_S", 0.005)
    upstream_id = await new_instance(service)
    url = door.make_url("/instances/gpuai-1/console?follow=1")
    async with session.get(url) as response:
        for said in (b"login: ", b"login: ", b"\nmore\n"):
            await asyncio.sleep(0.015)
            consoles.append(upstream_id, said)
            assert await response.content.readexactly(len(said)) == said
        await make_ended(service, upstream_id)
        assert await response.content.read() == b""


@pytest.mark.parametrize(
    ("before", "now", "added"),
    [
        (b"", b"", b""),
        (b"", b"new", b"new"),
        (b"old", b"old", b""),
        (b"old", b"old new", b" new"),
        (b"a\n", b"a\na\n", b"a\n"),
        (b"dropped" + b"kept" * 1024, b"kept" * 1024 + b"new", b"new"),
        (b"forgotten", b"", b""),
        (b"all dropped", b"new", b"new"),
    ],
)
def test_only_what_is_new_is_added(before: bytes, now: bytes, added: bytes) -> None:
    assert admin._added(before, now) == added


STAND_IN = "ffffffff:00:00.0"


async def test_gpus_are_shown_with_who_has_them(service: Service, operator: Operator) -> None:
    upstream_id = await new_instance(service)
    first, second = (await operator.get("/gpus"))["gpus"]
    assert (first["address"], first["state"], first["holder"]) == (
        STAND_IN, "in_use", upstream_id,
    )  # fmt: skip
    assert (second["state"], second["holder"]) == ("available", None)


async def test_a_quarantined_gpu_is_not_sold_until_it_is_released(
    service: Service, operator: Operator
) -> None:
    path = f"/gpus/{STAND_IN}"
    answer = await operator.post(f"{path}/quarantine", reason="fans rattle")
    assert answer["gpu"]["state"] == "quarantined"
    assert "fans rattle" in answer["gpu"]["summary"]
    assert [one.available_count for one in service.desk.offerings()] == [1, 1, 0, 0]
    assert (await operator.post(f"{path}/release"))["gpu"]["state"] == "available"
    assert (await operator.post(f"{path}/release"))["code"] == "gpu_not_found"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/gpus/0000:99:00.0/quarantine", "gpu_not_found"),
        ("/gpus/99:00.0/confirm", "gpu_not_found"),
        ("/gpus/third/release", "invalid_request"),
    ],
)
async def test_acts_on_no_gpu_are_refused(operator: Operator, path: str, code: str) -> None:
    assert (await operator.post(path))["code"] == code


async def test_the_operator_is_told_why_a_card_cannot_be_released(operator: Operator) -> None:
    told = await operator.post(f"/gpus/{BROKEN}/release")
    assert (told["code"], told["detail"]) == ("gpu_unusable", f"{BROKEN} does not answer")
    assert told["hint"] == "see dmesg"


async def test_a_swapped_card_is_taken_for_the_right_one_when_confirmed(
    service: Service, operator: Operator
) -> None:
    address = PciAddress(0, 0x99, 0, 0)
    await service.store.remember_card(KnownCard(address, "10de:2330 10de:16c1"))
    assert (await operator.post(f"/gpus/{address}/confirm")) == {"gpu": None}
    assert service.store.known_cards == {}


async def test_reconciling_is_done_when_asked_for(
    operator: Operator, consoles: ConsoleLogs
) -> None:
    consoles.append("i-00000000000000aa", b"x")
    assert await operator.post("/reconcile") == {}
    assert consoles.kept() == set()


async def test_a_reload_tells_what_changed(operator: Operator) -> None:
    assert await operator.post("/reload") == {"changed": ["stock.high_from: 4 -> 5"]}


async def test_events_are_shown_of_all_of_an_instance_and_of_a_gpu(
    service: Service, operator: Operator, clock: Any
) -> None:
    upstream_id = await new_instance(service)
    await operator.post(f"/gpus/{STAND_IN}/quarantine", reason="fans rattle")
    shown = (await operator.get("/events"))["events"]
    assert shown == [
        {"id": shown[0]["id"], "at": clock.now, "upstream_id": upstream_id, "gpu": None, "was": "",
         "became": "creating/lease_address", "why": "order accepted"},
        {"id": shown[1]["id"], "at": clock.now, "upstream_id": "", "gpu": STAND_IN, "was": "",
         "became": "quarantined", "why": "fans rattle"},
    ]  # fmt: skip
    for either_id in (upstream_id, "gpuai-1"):
        assert (await operator.get(f"/events?instance={either_id}"))["events"] == shown[:1]
    assert (await operator.get(f"/events?gpu={STAND_IN}"))["events"] == shown[1:]
    assert (await operator.get("/events?limit=1"))["events"] == shown[1:]
    assert (await operator.get(f"/events?after={shown[0]['id']}"))["events"] == shown[1:]


async def test_what_happened_to_an_instance_that_the_record_lost_is_shown(
    service: Service, operator: Operator
) -> None:
    await service.store.note("had no instance", upstream_id="i-00000000000000aa")
    (event,) = (await operator.get("/events?instance=i-00000000000000aa"))["events"]
    assert event["why"] == "had no instance"


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("instance=nobody", "instance_not_found"),
        ("gpu=third", "invalid_request"),
        ("after=-1", "invalid_request"),
        ("after=9223372036854775808", "invalid_request"),
        ("limit=0", "invalid_request"),
        ("limit=1e3", "invalid_request"),
        (f"limit={'1' * 5000}", "invalid_request"),
    ],
)
async def test_events_that_make_no_sense_are_refused(
    operator: Operator, query: str, code: str
) -> None:
    assert (await operator.get(f"/events?{query}"))["code"] == code


async def test_a_confirmed_card_is_an_event(service: Service, operator: Operator) -> None:
    address = PciAddress(0, 0x99, 0, 0)
    await service.store.remember_card(KnownCard(address, "10de:2330 10de:16c1"))
    await operator.post(f"/gpus/{address}/confirm")
    (event,) = (await operator.get(f"/events?gpu={address}"))["events"]
    assert event["became"] == "confirmed"


async def test_no_event_tells_what_a_guest_was_given(service: Service, operator: Operator) -> None:
    secrets = GuestInput(("ssh-ed25519 SeCrEt1",), "private/SeCrEt2", b"token=SeCrEt3")
    made = await service.desk.order(order(guest_input=secrets))
    upstream_id = made.instance.upstream_id
    await make_running(service, upstream_id)
    await service.store.script_exited(upstream_id, 3)
    await make_failed(service, upstream_id, "it died")
    await make_ended(service, upstream_id)
    shown = await operator.get("/events")
    assert len(shown["events"]) > 10
    assert "SeCrEt" not in str(shown)
