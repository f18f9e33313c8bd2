"""POST /v1/instances: what is answered, what a repeat does, and how much is sold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from gpud import desk
from gpud.model import Status
from tests.unit.client import Client
from tests.unit.service import Service, make_ended, make_failed, make_running

REPLAYED = "Idempotent-Replayed"


async def test_an_order_is_answered_in_full_and_is_durable(
    client: Client, service: Service
) -> None:
    answer = await client.order()
    assert answer.status == 201
    upstream_id = answer.json["upstream_id"]
    assert answer.json == {
        "upstream_id": upstream_id,
        "status": "creating",
        "cost_per_hour": 3.49,
        "estimated_ready_seconds": 180,
        "datacenter_location": "US-Demo-1",
        "region": "US",
    }
    assert answer.headers["Location"] == f"/v1/instances/{upstream_id}"
    assert REPLAYED not in answer.headers
    assert [one.upstream_id for one in await service.store.recent(10)] == [upstream_id]
    assert service.metric("gpud_orders_total", outcome="accepted") == 1


async def test_nothing_of_what_the_guest_is_given_is_told(
    client: Client, service: Service, said: Callable[[], str]
) -> None:
    given = {"startup_script": "echo hunter2", "docker_image": "hunter2", "later": "hunter2"}
    first, again = await client.order(**given), await client.order(**given)
    assert "hunter2" not in (first.body + again.body).decode()
    assert again.json["upstream_id"] in said()
    assert "hunter2" not in said() + repr(service.store.live)
    assert client.token not in said()


async def test_the_cost_is_that_of_all_gpus_in_the_tier(client: Client) -> None:
    answer = await client.order(tier="spot", gpu_count=2, region="US")
    assert answer.json["cost_per_hour"] == 3.98


async def test_the_location_leads_to_the_instance(client: Client) -> None:
    made = await client.order()
    shown = await client.get(made.headers["Location"])
    assert shown.json["upstream_id"] == made.json["upstream_id"]


async def test_a_repeat_is_the_same_instance(client: Client, service: Service) -> None:
    first = await client.order(startup_script="echo 1", ssh_public_keys=[])
    again = await client.order(ssh_public_keys=[], startup_script="echo 1")
    assert again.status == 201
    assert again.headers[REPLAYED] == "true"
    assert again.json == first.json
    assert len(await service.store.recent(10)) == 1
    assert service.metric("gpud_orders_total", outcome="replayed") == 1


async def test_twenty_at_once_make_one_instance(client: Client, service: Service) -> None:
    answers = await asyncio.gather(*(client.order() for _ in range(20)))
    assert {answer.status for answer in answers} == {201}
    assert Counter(REPLAYED in answer.headers for answer in answers) == {False: 1, True: 19}
    assert len({answer.json["upstream_id"] for answer in answers}) == 1
    assert len(await service.store.recent(100)) == 1


async def test_ten_orders_at_once_for_two_gpus_make_two_instances(
    client: Client, service: Service
) -> None:
    answers = await asyncio.gather(*(client.order(f"gpuai-{n}") for n in range(10)))
    assert Counter(answer.status for answer in answers) == {201: 2, 409: 8}
    refused = [answer for answer in answers if answer.status == 409]
    assert {answer.code for answer in refused} == {"no_capacity"}
    assert not any("Retry-After" in answer.headers for answer in refused)
    instances = await service.store.recent(100)
    assert len({gpu.address for one in instances for gpu in one.grant.gpus}) == 2
    assert service.metric("gpud_capacity_refusals_total", shortage="gpus") == 8


@pytest.mark.parametrize(
    "change",
    [
        {"gpu_count": 2},
        {"tier": "spot"},
        {"region": "US"},
        {"startup_script": "echo 2"},
        {"docker_image": "nginx"},
        {"gpu_type": "l40s"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_the_id_of_another_order_is_refused(
    client: Client, service: Service, change: dict[str, Any]
) -> None:
    first = await client.order()
    answer = await client.order(**change)
    assert (answer.status, answer.code) == (409, "instance_id_reused")
    assert first.json["upstream_id"] not in str(answer.json)
    assert len(await service.store.recent(10)) == 1


async def test_unknown_fields_are_counted_and_break_no_repeat(
    client: Client, service: Service
) -> None:
    await client.order(added_later={"deep": [1, 2.5, None]}, another="one")
    again = await client.order(third=True)
    assert again.headers[REPLAYED] == "true"
    assert service.metric("gpud_unknown_request_fields_total") == 3


async def test_null_is_as_good_as_absent(client: Client) -> None:
    await client.order(region=None, docker_image=None, startup_script=None)
    assert REPLAYED in (await client.order()).headers


async def test_a_repeat_tells_the_present_status(
    client: Client, service: Service, clock: Any
) -> None:
    upstream_id = (await client.order()).json["upstream_id"]
    clock.advance(50)
    assert (await client.order()).json["estimated_ready_seconds"] == 130
    clock.advance(1000)
    late = await client.order()
    assert (late.json["status"], late.json["estimated_ready_seconds"]) == ("creating", 1)
    await make_running(service, upstream_id)
    ready = await client.order()
    assert (ready.json["status"], ready.json["estimated_ready_seconds"]) == ("running", 0)
    await client.delete(f"/v1/instances/{upstream_id}")
    assert (await client.order()).json["status"] == "stopping"
    await make_ended(service, upstream_id)
    ended = await client.order()
    assert (ended.json["upstream_id"], ended.json["status"]) == (upstream_id, "terminated")
    assert not service.store.live


async def test_a_repeat_of_a_failed_order_tells_so(client: Client, service: Service) -> None:
    upstream_id = (await client.order()).json["upstream_id"]
    await make_failed(service, upstream_id, "the guest did not boot in time")
    await make_ended(service, upstream_id)
    again = await client.order()
    assert (again.status, again.json["status"]) == (201, Status.ERROR)


async def test_a_repeat_is_answered_while_the_hypervisor_is_away(
    client: Client, service: Service
) -> None:
    await client.order()
    service.hypervisor.up = False
    assert (await client.order()).headers[REPLAYED] == "true"
    refused = await client.order("gpuai-2")
    assert (refused.status, refused.code) == (503, "hypervisor_unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    assert len(await service.store.recent(10)) == 1


async def test_what_cannot_be_recorded_is_refused_for_now_and_nothing_of_it_is_kept(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (await client.order()).json["upstream_id"]
    pages = service.store._connection.execute("PRAGMA max_page_count = 1").fetchone()[0]
    script = "#" * 400_000
    refused = await client.order("gpuai-2", startup_script=script)
    assert (refused.status, refused.code) == (503, "record_unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    assert [one.upstream_id for one in await service.store.recent(10)] == [first]
    assert (await client.get("/v1/gpu/available")).json["offerings"] == []
    service.store._connection.execute(f"PRAGMA max_page_count = {pages + 1000}")
    monkeypatch.setattr(desk, "_UNRECORDED_S", 0)
    assert (await client.get("/v1/gpu/available")).json["offerings"] != []
    assert (await client.order("gpuai-2", startup_script=script)).status == 201


async def test_an_ended_instance_makes_room(client: Client, service: Service) -> None:
    first = await client.order(gpu_count=2)
    assert (await client.order("gpuai-2")).status == 409
    await client.delete(first.headers["Location"])
    assert (await client.order("gpuai-2")).status == 409, "a stopping one still holds its GPUs"
    await make_ended(service, first.json["upstream_id"])
    assert (await client.order("gpuai-2")).status == 201


async def test_the_estimate_is_learned_from_boots_of_the_shape(
    client: Client, service: Service, clock: Any
) -> None:
    first = await client.order()
    clock.advance(33)
    await make_running(service, first.json["upstream_id"])
    assert (await client.order("gpuai-2")).json["estimated_ready_seconds"] == 33


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"network": {"mode": "network", "subnet": "10.9.0.0/29"}}, "10.9.0.2"),
        ({}, "10.0.2.15"),
    ],
    ids=["network", "user"],
)
async def test_the_guests_address_is_shown(client: Client, expected: str) -> None:
    made = await client.order()
    assert (await client.get(made.headers["Location"])).json["ip"] == expected
