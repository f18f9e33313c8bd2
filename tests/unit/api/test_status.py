"""GET and DELETE /v1/instances/{id}, in every state an instance can be in."""

from __future__ import annotations

from typing import Any

import pytest

from gpud.model import Status
from tests.unit.client import Client
from tests.unit.service import Service, make_ended, make_failed, make_running

FIELDS = {"upstream_id", "status", "ip", "cost_per_hour", "uptime_seconds"}
STRANGE_IDS = [
    "..%2f..",
    "..%2F..%2Fetc%2Fpasswd",
    "%2e%2e",
    "%00",
    "a%0d%0aX-Injected:%201",
    "%ff",
    "%ed%a0%80",
    "%F0%9F%98%80",
    "'%20OR%201=1--",
    "%25",
    "x" * 4000,
]


async def bring_to(state: str, client: Client, service: Service) -> str:
    """Order an instance and bring it to ``state``."""
    upstream_id: str = (await client.order()).json["upstream_id"]
    if state in {"running", "stopping", "terminated"}:
        await make_running(service, upstream_id)
    if state in {"stopping", "terminated"}:
        await service.store.request_delete(upstream_id)
    if state.startswith("error"):
        await make_failed(service, upstream_id, "the guest did not boot in time")
    if state in {"terminated", "error, released"}:
        await make_ended(service, upstream_id)
    return upstream_id


STATES = ["creating", "running", "stopping", "terminated", "error", "error, released"]


@pytest.mark.parametrize("state", STATES)
async def test_status_in_every_state(client: Client, service: Service, state: str) -> None:
    upstream_id = await bring_to(state, client, service)
    shown = (await client.get(f"/v1/instances/{upstream_id}")).json
    assert shown["status"] == state.partition(",")[0]
    assert shown["cost_per_hour"] == 3.49
    ended = state in {"terminated", "error, released"}
    failed = state.startswith("error")
    assert ("ip" in shown) is not ended
    assert shown.get("status_message") == ("the guest did not boot in time" if failed else None)
    assert set(shown) - {"ip", "status_message"} == FIELDS - {"ip"}


@pytest.mark.parametrize("state", STATES)
async def test_both_ids_find_the_same(client: Client, service: Service, state: str) -> None:
    upstream_id = await bring_to(state, client, service)
    by_ours = await client.get(f"/v1/instances/{upstream_id}")
    by_theirs = await client.get("/v1/instances/gpuai-1")
    assert by_ours.json == by_theirs.json
    assert by_ours.status == 200


async def test_uptime_runs_from_running_to_the_end(
    client: Client, service: Service, clock: Any
) -> None:
    upstream_id = (await client.order()).json["upstream_id"]

    async def uptime() -> int:
        shown = await client.get(f"/v1/instances/{upstream_id}")
        return int(shown.json["uptime_seconds"])

    clock.advance(60)
    assert await uptime() == 0
    await make_running(service, upstream_id)
    clock.advance(89.9)
    assert await uptime() == 89
    await service.store.request_delete(upstream_id)
    clock.advance(1)
    await make_ended(service, upstream_id)
    clock.advance(1800)
    assert await uptime() == 90


async def test_uptime_is_never_negative(client: Client, service: Service, clock: Any) -> None:
    upstream_id = (await client.order()).json["upstream_id"]
    await make_running(service, upstream_id)
    clock.advance(-3600)
    assert (await client.get(f"/v1/instances/{upstream_id}")).json["uptime_seconds"] == 0


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("by", ["upstream_id", "instance_id"])
async def test_delete_is_accepted_in_every_state_and_again(
    client: Client, service: Service, state: str, by: str
) -> None:
    upstream_id = await bring_to(state, client, service)
    path = f"/v1/instances/{upstream_id if by == 'upstream_id' else 'gpuai-1'}"
    ended = upstream_id not in service.store.live
    for _ in range(3):
        answer = await client.delete(path)
        assert (answer.status, answer.body) == (204, b"")
        instance = await service.store.find(upstream_id)
        assert instance is not None
        assert instance.status is (Status.TERMINATED if ended else Status.STOPPING)
    assert len(await service.store.recent(10)) == 1


async def test_a_deleted_instance_ends_as_terminated(client: Client, service: Service) -> None:
    upstream_id = await bring_to("creating", client, service)
    await client.delete(f"/v1/instances/{upstream_id}")
    assert (await client.get(f"/v1/instances/{upstream_id}")).json["status"] == "stopping"
    await make_ended(service, upstream_id)
    assert (await client.get(f"/v1/instances/{upstream_id}")).json["status"] == "terminated"


async def test_a_failed_instance_that_is_deleted_has_no_message_any_more(
    client: Client, service: Service
) -> None:
    upstream_id = await bring_to("error", client, service)
    await client.delete(f"/v1/instances/{upstream_id}")
    shown = (await client.get(f"/v1/instances/{upstream_id}")).json
    assert shown["status"] == "stopping"
    assert "status_message" not in shown


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_strange_id_is_unknown(
    client: Client, service: Service, method: str, subtests: pytest.Subtests
) -> None:
    await client.order()
    for strange in STRANGE_IDS:
        with subtests.test(strange[:40]):
            answer = await client.ask(method, f"/v1/instances/{strange}")
            assert (answer.status, answer.code) == (404, "instance_not_found")
            assert "X-Injected" not in answer.headers
            assert "passwd" not in str(answer.json)
    assert all(one.delete_requested_at is None for one in service.store.live.values())


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", ["/v1/instances/../../etc/passwd", "/v1/instances/a/b"])
async def test_no_path_leads_out(client: Client, method: str, path: str) -> None:
    answer = await client.send(client.head(method, path))
    assert (answer.status, answer.code) == (404, "not_found")
