"""The operator's side door: drains, one instance in full, its end, and the server at a glance."""

from __future__ import annotations

import time
from typing import Any

import pytest

from gpud import __version__
from gpud.guest.console import ConsoleLogs
from gpud.model import PciAddress
from tests.unit.api.test_admin import (
    STAND_IN,
    Operator,
    consoles,
    door,
    new_instance,
    operator,
)
from tests.unit.service import Service, make_ended, make_failed, make_running, order

__all__ = ["consoles", "door", "operator"]  # fixtures


# -- drains ----------------------------------------------------------------------------------------


async def test_a_card_is_drained_and_undrained(service: Service, operator: Operator) -> None:
    shown = (await operator.post(f"/gpus/{STAND_IN}/drain", reason=" new \n fan "))["gpu"]
    assert shown["state"] == "drained"
    assert shown["why_not"][0].endswith(f": new fan (undrain: gpud undrain --gpu {STAND_IN})")
    assert [one.available_count for one in service.desk.offerings()] == [1, 1, 0, 0]
    answer = await operator.post(f"/gpus/{STAND_IN}/undrain")
    assert (answer["gpu"]["state"], answer["ended"]) == ("available", True)
    assert not (await operator.post(f"/gpus/{STAND_IN}/undrain"))["ended"]


async def test_the_server_is_drained_and_undrained(service: Service, operator: Operator) -> None:
    upstream_id = await new_instance(service)
    await operator.post(f"/gpus/{STAND_IN}/drain")
    answer = await operator.post("/drain", reason="new kernel")
    assert answer["instances"] == [upstream_id]
    assert [(one["gpu"], one["reason"]) for one in answer["drains"]] == [
        (None, "new kernel"),
        (STAND_IN, ""),
    ]
    first, second = (await operator.get("/gpus"))["gpus"]
    assert (first["state"], second["state"]) == ("in_use", "drained")
    answer = await operator.post("/undrain")
    assert (answer["ended"], [one["gpu"] for one in answer["drains"]]) == (True, [STAND_IN])
    assert not (await operator.post("/undrain"))["ended"]


async def test_the_drain_of_a_place_without_a_card_can_be_ended(
    service: Service, operator: Operator
) -> None:
    empty = PciAddress(0, 0x99, 0, 0)
    await service.store.drain(empty)
    assert await operator.post(f"/gpus/{empty}/undrain") == {"gpu": None, "ended": True}
    assert (await operator.post(f"/gpus/{empty}/undrain"))["code"] == "gpu_not_found"


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/gpus/0000:99:00.0/drain", {}, "gpu_not_found"),
        ("/gpus/third/drain", {}, "invalid_request"),
        ("/gpus/third/undrain", {}, "invalid_request"),
        (f"/gpus/{STAND_IN}/drain", {"reason": "x" * 501}, "invalid_request"),
        ("/drain", {"reason": "bell \a"}, "invalid_request"),
        (f"/gpus/{STAND_IN}/quarantine", {"reason": " \n "}, "invalid_request"),
    ],
)
async def test_drains_that_make_no_sense_are_refused(
    service: Service, operator: Operator, path: str, body: dict[str, str], code: str
) -> None:
    assert (await operator.post(path, **body))["code"] == code
    assert service.store.drains == {}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff"])
async def test_a_body_that_is_not_json_is_refused(operator: Operator, body: bytes) -> None:
    async with operator.session.post(operator.door.make_url("/drain"), data=body) as response:
        assert (await response.json(content_type=None))["code"] == "invalid_request"


async def test_a_body_that_is_no_object_has_no_reason(service: Service, operator: Operator) -> None:
    async with operator.session.post(operator.door.make_url("/drain"), json=["x"]) as response:
        assert response.status == 200
    assert service.store.drains[None].reason == ""


# -- one instance ----------------------------------------------------------------------------------


async def test_all_of_an_instance_is_told_by_either_id(
    service: Service, operator: Operator, consoles: ConsoleLogs, clock: Any
) -> None:
    ordered_at = clock.now
    upstream_id = await new_instance(service)
    clock.advance(30)
    await make_running(service, upstream_id)
    await service.store.guest_booted(upstream_id, "boot-1")
    await service.store.script_exited(upstream_id, 3)
    consoles.append(upstream_id, b"login:")
    clock.advance(7200)
    told = await operator.get(f"/instances/{upstream_id}")
    assert told == await operator.get("/instances/gpuai-1")
    (row,) = (await operator.get("/instances"))["instances"]
    events = told.pop("events")
    assert len(events) == 10
    assert events[-1]["why"] == "the startup script ended with exit code 3"
    instance = service.store.live[upstream_id]
    assert told == {
        **row,
        "created_at": ordered_at,
        "running_at": ordered_at + 30,
        "delete_requested_at": None,
        "ended_at": None,
        "step_since": ordered_at + 30,
        "step_due_at": None,
        "can_be_given_up": False,
        "cost_so_far": pytest.approx(6.98),
        "region": "US",
        "numa_nodes": [0],
        "image_digest": service.images.resolve("base").digest,
        "domain": f"gpud-{upstream_id}",
        "mac": instance.mac,
        "boots": 1,
        "last_start_at": None,
        "console_bytes": 6,
    }


async def test_when_a_step_is_due_is_told(service: Service, operator: Operator, clock: Any) -> None:
    upstream_id = await new_instance(service)
    deadlines = service.config.deadlines
    told = await operator.get("/instances/gpuai-1")
    assert told["step_due_at"] == clock.now + deadlines.lease_address_s
    assert told["can_be_given_up"]
    await make_failed(service, upstream_id, "no boot")
    told = await operator.get("/instances/gpuai-1")
    assert (told["can_be_given_up"], told["failure"]) == (False, "no boot")
    await make_ended(service, upstream_id)
    told = await operator.get("/instances/gpuai-1")
    assert (told["step_due_at"], told["ended_at"]) == (None, clock.now)


async def test_a_step_from_before_the_daemons_start_is_given_its_whole_time_again(
    service: Service, consoles: ConsoleLogs, clock: Any
) -> None:
    upstream_id = await new_instance(service)
    clock.advance(1000)
    told = await service.overview(consoles).instance(service.store.live[upstream_id])
    assert told["step_due_at"] == clock.now + service.config.deadlines.lease_address_s


@pytest.mark.parametrize("path", ["/instances/none", "/instances/..%2f..%2fetc"])
async def test_an_instance_that_nobody_knows_is_not_found(operator: Operator, path: str) -> None:
    assert (await operator.get(path))["code"] == "instance_not_found"
    assert (await operator.post(f"{path}/stop", reason="x"))["code"] == "instance_not_found"


# -- its end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("running", [False, True])
async def test_the_operator_ends_an_instance_as_its_caller_would(
    service: Service, operator: Operator, clock: Any, running: bool
) -> None:
    upstream_id = await new_instance(service)
    if running:
        await make_running(service, upstream_id)
    answer = await operator.post("/instances/gpuai-1/stop", reason="it floods the network")
    assert (answer["stopped"], answer["instance"]["status"]) == (True, "stopping")
    instance = service.store.live[upstream_id]
    assert instance.delete_requested_at == clock.now
    (event,) = (await operator.get("/events?limit=1"))["events"]
    assert event["why"] == "the operator asked to terminate it: it floods the network"
    assert event["became"].startswith("stopping/")
    answer = await operator.post("/instances/gpuai-1/stop", reason="again")
    assert (answer["stopped"], answer["instance"]["status"]) == (False, "stopping")
    await make_ended(service, upstream_id)
    assert (await operator.get("/instances/gpuai-1"))["status"] == "terminated"
    assert (await service.desk.order(order())).replayed


async def test_one_that_failed_stays_failed(service: Service, operator: Operator) -> None:
    upstream_id = await new_instance(service)
    await make_failed(service, upstream_id, "no boot")
    for _ in range(2):
        answer = await operator.post("/instances/gpuai-1/stop", reason="it failed")
        assert (answer["stopped"], answer["instance"]["status"]) == (False, "error")
        if upstream_id in service.store.live:
            await make_ended(service, upstream_id)


async def test_an_end_needs_a_reason(service: Service, operator: Operator) -> None:
    upstream_id = await new_instance(service)
    assert (await operator.post("/instances/gpuai-1/stop"))["code"] == "invalid_request"
    assert service.store.live[upstream_id].delete_requested_at is None


# -- the server at a glance ------------------------------------------------------------------------


async def test_a_server_at_rest(service: Service, operator: Operator, clock: Any) -> None:
    clock.advance(75)
    told = await operator.get("/status")
    assert told.pop("earned_today") == {"usd": 0.0, "since": pytest.approx(clock.now, abs=90_000)}
    offers = told.pop("offers")
    assert [(one["available_count"], one["why_not"]) for one in offers] == [
        (2, None), (2, None), (1, None), (1, None),
    ]  # fmt: skip
    assert told == {
        "version": __version__,
        "up_seconds": 75,
        "ready": True,
        "problems": {},
        "nothing_sold_because": [],
        "drains": [],
        "gpus": {"available": 2, "in_use": 0, "cleaning": 0, "drained": 0, "quarantined": 0,
                 "unavailable": 0},
        "instances": {"creating": 0, "running": 0, "stopping": 0, "terminated": 0, "error": 0},
        "events": [],
    }  # fmt: skip
    assert service.store.live == {}


async def test_a_server_at_work_and_in_trouble(service: Service, operator: Operator) -> None:
    upstream_id = await new_instance(service)
    await make_running(service, upstream_id)
    service.hypervisor.up = False
    service.keys.ready = False
    await operator.post("/drain", reason="new kernel")
    told = await operator.get("/status")
    assert (told["ready"], set(told["problems"])) == (False, {"libvirt", "keys"})
    assert [words[:15] for words in told["nothing_sold_because"]] == [
        "libvirt does no", "the server is d",
    ]  # fmt: skip
    assert [one["gpu"] for one in told["drains"]] == [None]
    assert (told["gpus"]["in_use"], told["gpus"]["drained"]) == (1, 1)
    assert told["instances"]["running"] == 1
    assert {one["available_count"] for one in told["offers"]} == {0}
    assert len(told["events"]) == 5
    assert told["events"][-1]["why"] == "the whole server: new kernel"


async def test_only_what_was_earned_today_counts(
    service: Service, operator: Operator, clock: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC-02:00")
    time.tzset()
    try:
        clock.now = 1_800_000_000.0  # 10:00 of that place's day
        clock.advance(-20 * 3600)
        for hours in (1, 14, 3):
            await run_for(service, hours, clock)
        told = (await operator.get("/status"))["earned_today"]
    finally:
        monkeypatch.undo()
        time.tzset()
    # The first ended before midnight; the second began at 16:00 and ran till 6:00.
    assert told["usd"] == pytest.approx((6 + 3) * 3.49)
    assert told["since"] == 1_800_000_000.0 - 10 * 3600


async def run_for(service: Service, hours: int, clock: Any) -> None:
    """Sell an instance for so many hours; an hour goes by until the first of them has ended."""
    upstream_id = await new_instance(service, f"gpuai-{hours}")
    await make_running(service, upstream_id)
    clock.advance(hours * 3600)
    await service.store.request_delete(upstream_id)
    clock.advance(3600 if hours == 1 else 0)
    await make_ended(service, upstream_id)


async def test_what_is_running_has_earned_up_to_now(
    service: Service, operator: Operator, clock: Any
) -> None:
    await make_running(service, await new_instance(service))
    before = (await operator.get("/status"))["earned_today"]["usd"]
    clock.advance(60)
    after = (await operator.get("/status"))["earned_today"]["usd"]
    assert after - before == pytest.approx(3.49 / 60, abs=1e-5)
