"""Callers in crowds, in a hurry, in pieces, and again and again."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gpud.store import Store
from tests.faults import FaultLog
from tests.unit.client import ORDER, Client
from tests.unit.contract import Answer
from tests.unit.service import Service

pytestmark = pytest.mark.real_command("qemu-img")
EIGHT_GPUS = {
    "gpus": {"stand_ins": [{"gpu_type": "h100_sxm", "count": 8}]},
    "server": {"limits": {"orders_per_minute": None}},
}
ATTEMPTS = 3
BIG = "#!/bin/sh\n" + "#" * 300_000  # so that it needs room on the disk


async def gpu_ai_orders(client: Client, **fields: Any) -> Answer | None:
    """GPU.ai's way to order: up to three attempts with backoff, on a 5xx and on a lost connection."""
    answer = None
    for attempt in range(ATTEMPTS):
        await asyncio.sleep(0.02 * attempt)
        try:
            answer = await client.order(**fields)
        except OSError:  # aiohttp's own errors of a connection are of this kind
            continue
        if answer.status < 500:
            return answer
    return answer


async def instances(service: Service) -> list[str]:
    return [one.instance_id for one in await service.store.recent(1000)]


def claimed_twice(service: Service) -> int:
    claims = Counter(gpu.address for one in service.store.live.values() for gpu in one.grant.gpus)
    return sum(number - 1 for number in claims.values())


@pytest.mark.parametrize("settings", [EIGHT_GPUS])
async def test_of_200_orders_at_once_for_8_gpus_exactly_8_win(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    began = time.perf_counter()
    answers = await asyncio.gather(*(client.order(f"order-{number}") for number in range(200)))
    took_s = time.perf_counter() - began
    doubles = claimed_twice(service)
    won = [answer.status for answer in answers].count(201)
    fault_log.record(
        "200 orders at once for 8 GPUs",
        recovered=int(won == 8),
        double_claims=doubles,
        slowest_s=took_s,
    )
    assert (won, doubles) == (8, 0)
    refused = Counter((answer.status, answer.code) for answer in answers if answer.status != 201)
    assert refused == {(409, "no_capacity"): 192}
    assert len(await instances(service)) == 8


async def test_50_copies_of_one_order_at_once_are_one_instance(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    with fault_log.recovering("50 copies of one order at once"):
        answers = await asyncio.gather(*(client.order() for _ in range(50)))
        assert {answer.status for answer in answers} == {201}
        assert len({answer.json["upstream_id"] for answer in answers}) == 1
        fresh = [answer for answer in answers if "Idempotent-Replayed" not in answer.headers]
        assert len(fresh) == 1
        assert await instances(service) == ["gpuai-1"]


async def test_orders_and_deletes_of_one_id_at_once_end_as_one_instance(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    with fault_log.recovering("orders and DELETEs of one id at once"):
        acts: list[Awaitable[Answer]] = []
        for _ in range(25):
            acts += [client.order(), client.delete("/v1/instances/gpuai-1")]
        statuses = Counter(answer.status for answer in await asyncio.gather(*acts))
        assert statuses[201] == 25
        assert set(statuses) <= {201, 204, 404}
        assert await instances(service) == ["gpuai-1"]
        final = await client.delete("/v1/instances/gpuai-1")
        assert final.status == 204


def request_for(client: Client, instance_id: str) -> bytes:
    body = json.dumps({**ORDER, "instance_id": instance_id}).encode()
    head = client.head(
        "POST", "/v1/instances", Content_Type="application/json", Content_Length=str(len(body))
    )
    return head + body


async def test_a_caller_who_hangs_up_gets_its_order_with_the_next_attempt(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    assert client.url.port is not None
    request = request_for(client, "gpuai-1")
    # Cut in the head, in the body, and after all of it, before the reply.
    for length in (10, len(request) // 2, len(request) - 1, len(request), len(request)):
        _, writer = await asyncio.open_connection("127.0.0.1", client.url.port)
        writer.write(request[:length])
        await writer.drain()
        writer.transport.abort()
    with fault_log.recovering("a caller hangs up before the reply", runs=5):
        answer = await gpu_ai_orders(client)
        assert answer is not None
        assert answer.status == 201
        assert await instances(service) == ["gpuai-1"]


async def test_an_order_is_durable_though_its_caller_hung_up(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    assert client.url.port is not None
    with fault_log.recovering("the reply is lost"):
        _, writer = await asyncio.open_connection("127.0.0.1", client.url.port)
        writer.write(request_for(client, "gpuai-1"))
        await writer.drain()
        async with asyncio.timeout(5):
            while not service.store.live:
                await asyncio.sleep(0.001)
        writer.transport.abort()
        again = await gpu_ai_orders(client)
        assert again is not None
        assert again.headers["Idempotent-Replayed"] == "true"
        assert [again.json["upstream_id"]] == list(service.store.live)


@pytest.mark.parametrize(
    "settings", [{"server": {"body_timeout_s": 0.3, "keepalive_timeout_s": 0.5}}]
)
async def test_slow_senders_are_cut_off_in_time_and_hold_nobody_up(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    assert client.url.port is not None
    request = request_for(client, "slow")
    head = request.index(b"\r\n\r\n") + 4

    async def send_slowly(begin: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.url.port)
        writer.write(request[:begin])
        for byte in request[begin:]:
            if reader.at_eof():
                break
            writer.write(bytes([byte]))
            await writer.drain()  # tells of a reset, which is no end of what is read
            await asyncio.sleep(0.05)
        await reader.read()
        writer.close()

    with fault_log.recovering("senders of a byte at a time", runs=100):
        # Half of them in the middle of the head, half after it.
        slow = [asyncio.ensure_future(send_slowly(one)) for one in (20, head) for _ in range(50)]
        await asyncio.sleep(0.1)
        began = time.perf_counter()
        assert (await client.order()).status == 201
        assert time.perf_counter() - began < 1
        async with asyncio.timeout(10):
            await asyncio.gather(*slow, return_exceptions=True)
        assert await instances(service) == ["gpuai-1"]


# -- GPU.ai's retries over faults of the server ----------------------------------------------------

Fault = Callable[[Service, pytest.MonkeyPatch], None]


def hypervisor_away(service: Service, _: pytest.MonkeyPatch) -> None:
    service.hypervisor.up = False


def disk_full(service: Service, _: pytest.MonkeyPatch) -> None:
    """SQLite may not take another page: what it meets on a full disk."""
    service.store._connection.execute("PRAGMA max_page_count = 1")


def fails_after_commit(service: Service, patch: pytest.MonkeyPatch) -> None:
    """The process breaks between the commit and the reply."""
    admit = service.store.admit

    async def broken(*arguments: Any) -> None:
        await admit(*arguments)
        raise RuntimeError("broken")

    patch.setattr(service.store, "admit", broken)


def mend(service: Service) -> None:
    service.hypervisor.up = True
    service.store._connection.execute("PRAGMA max_page_count = 1073741823")


@pytest.mark.parametrize("fault", [hypervisor_away, disk_full, fails_after_commit])
async def test_gpu_ai_tries_three_times_over_a_fault_and_has_one_instance(
    client: Client,
    service: Service,
    fault_log: FaultLog,
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault,
) -> None:
    await client.order("before")
    with monkeypatch.context() as patch:
        fault(service, patch)
        answer = await gpu_ai_orders(client, startup_script=BIG)
        assert answer is not None
        assert answer.status >= 500, "a fault of ours has to be tried again"
    mend(service)
    with fault_log.recovering(f"GPU.ai's three attempts: {fault.__name__.replace('_', ' ')}"):
        first = await gpu_ai_orders(client, startup_script=BIG)
        second = await gpu_ai_orders(client, startup_script=BIG)
        assert first is not None
        assert second is not None
        assert first.status == 201
        assert first.json["upstream_id"] == second.json["upstream_id"]
        assert sorted(await instances(service)) == ["before", "gpuai-1"]
        assert claimed_twice(service) == 0


async def test_killed_between_commit_and_reply_the_next_attempt_finds_the_order(
    client: Client, service: Service, fault_log: FaultLog
) -> None:
    accepted = await client.order()
    with fault_log.recovering("GPU.ai's three attempts: killed between commit and reply"):
        await service.store.close()
        reopened = await Store.open(service.config.state_dir, service.clock)
        vars(service.store).update(vars(reopened))  # which the parts hold on to
        again = await gpu_ai_orders(client)
        assert again is not None
        assert again.json["upstream_id"] == accepted.json["upstream_id"]
        assert await instances(service) == ["gpuai-1"]
