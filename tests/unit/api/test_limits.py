"""Who asks too often gets 429, and when to come again; who does not, never."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from gpud.api import gate
from gpud.api.rate import Rates
from gpud.dev.issuer import Issuer
from tests.unit.client import ORDER, Client, OpenClient
from tests.unit.service import Clock, Service

AVAILABLE = "/v1/gpu/available"


def limits(**per_minute: int | None) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("settings", [{"server": {"limits": per_minute}}], ids=[""])


@pytest.fixture(autouse=True)
def standing_clock(monotonic: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "Rates", lambda: Rates(monotonic=monotonic))


async def statuses(client: Client, count: int, path: str = AVAILABLE, **more: Any) -> list[int]:
    return [(await client.get(path, **more)).status for _ in range(count)]


@limits(offerings_per_minute=10)
async def test_one_too_many_is_told_when_to_come_again(client: Client, monotonic: Clock) -> None:
    assert await statuses(client, 10) == [200] * 10
    refused = await client.get(AVAILABLE)
    assert (refused.status, refused.code) == (429, "rate_limited")
    assert refused.headers["Retry-After"] == "6"
    assert await statuses(client, 3) == [429] * 3, "being refused does not make it longer"
    monotonic.advance(6)
    assert await statuses(client, 2) == [200, 429]


@limits(offerings_per_minute=10)
async def test_kinds_of_requests_are_counted_apart(client: Client, service: Service) -> None:
    await statuses(client, 11)
    assert await statuses(client, 1, "/v1/instances/none") == [404]
    assert (await client.order()).status == 201
    assert (await client.ask("HEAD", AVAILABLE)).status == 429, "HEAD is GET without a body"
    told = {"route": AVAILABLE, "method": "GET", "status": "429"}
    assert service.metric("gpud_api_requests_total", **told) == 1


@limits(offerings_per_minute=10)
async def test_clients_are_counted_apart_and_not_by_token(client: Client, issuer: Issuer) -> None:
    await statuses(client, 10)
    assert await statuses(client, 1, token=issuer.mint(sub="a", scope="gpu")) == [429]
    other = issuer.mint(client_id="another", azp="another", sub="another")
    assert await statuses(client, 1, token=other) == [200]


@limits(orders_per_minute=10)
async def test_an_order_that_failed_here_may_be_repeated(client: Client, service: Service) -> None:
    service.hypervisor.up = False
    for _ in range(15):
        assert (await client.order()).status == 503
    service.hypervisor.up = True
    assert (await client.order()).status == 201


@limits(orders_per_minute=10)
async def test_three_attempts_at_an_order_are_always_let_in(client: Client) -> None:
    answers = [(await client.order()).status for _ in range(3)]
    assert answers == [201] * 3
    answers = [(await client.order(instance_id="2", gpu_count=2)).status for _ in range(9)]
    assert answers == [409] * 7 + [429] * 2


@limits(refused_tokens_per_minute=10)
async def test_bad_tokens_are_judged_only_so_often(
    client: Client, service: Service, issuer: Issuer, monotonic: Clock
) -> None:
    forged = issuer.mint(scope="gpu")[:-8] + "AAAAAAAA"
    await statuses(client, 1)
    assert await statuses(client, 12, token=forged) == [401] * 10 + [429] * 2
    assert service.metric("gpud_token_failures_total", reason="signature") == 10
    assert await statuses(client, 3) == [200] * 3, "who is known is let in"
    assert await statuses(client, 1, token=None) == [401], "no token costs nothing to refuse"
    new = issuer.mint(scope="gpu", sub="new")
    assert await statuses(client, 1, token=new) == [429]
    monotonic.advance(6)
    assert await statuses(client, 1, token=new) == [200]


@limits(refused_tokens_per_minute=10)
async def test_many_bad_tokens_at_once_are_counted_too(
    client: Client, issuer: Issuer, service: Service
) -> None:
    forged = issuer.mint(scope="gpu")[:-8] + "AAAAAAAA"
    answers = await asyncio.gather(*(client.get(AVAILABLE, token=forged) for _ in range(30)))
    assert sorted(answer.status for answer in answers) == [401] * 10 + [429] * 20
    assert service.metric("gpud_token_failures_total", reason="signature") == 10


@limits(refused_tokens_per_minute=10)
async def test_tokens_that_could_not_be_judged_do_not_count(
    open_client: OpenClient, host: Any
) -> None:
    host.fail()
    client = await open_client()
    assert await statuses(client, 20) == [503] * 20


@limits(offerings_per_minute=None, document_per_minute=None, refused_tokens_per_minute=None)
async def test_limits_can_be_switched_off(client: Client) -> None:
    assert set(await statuses(client, 130)) == {200}
    assert set(await statuses(client, 70, "/openapi.yaml")) == {200}
    assert set(await statuses(client, 70, token="x.y.z")) == {401}


PROXIED = {"trusted_proxies": ["127.0.0.1/32"], "limits": {"document_per_minute": 10}}


@pytest.mark.parametrize("settings", [{"server": PROXIED}], ids=[""])
async def test_behind_a_proxy_each_client_has_its_own_limit(client: Client) -> None:
    def by_way_of(address: str) -> dict[str, Any]:
        return {"token": None, "headers": {"X-Forwarded-For": address}}

    one, another = by_way_of("203.0.113.9"), by_way_of("203.0.113.10")
    assert await statuses(client, 11, "/openapi.yaml", **one) == [200] * 10 + [429]
    assert await statuses(client, 1, "/openapi.yaml", **another) == [200]


@pytest.mark.parametrize("settings", [{"server": PROXIED}], ids=[""])
async def test_the_log_names_the_client_and_not_the_proxy(client: Client) -> None:
    headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    with capture_logs(processors=[merge_contextvars]) as logs:
        await client.order(instance_id="")
        await client.post({**ORDER, "instance_id": "gpuai-1"}, headers=headers)
        await client.delete("/v1/instances/gpuai-1", headers=headers)
        await client.get(AVAILABLE, token="x.y.z", headers=headers)
        await client.get("/nowhere", headers=headers)
    told = [(log["event"], log["client_address"], log["client_scheme"]) for log in logs]
    assert told == [
        ("request refused", "127.0.0.1", "http"),
        ("order accepted", "203.0.113.9", "https"),
        ("delete accepted", "203.0.113.9", "https"),
        ("request refused", "203.0.113.9", "https"),
        ("request refused", "203.0.113.9", "https"),
    ]


@pytest.mark.parametrize("path", ["/nowhere", "/v1/gpu/available"])
async def test_who_is_nobody_fills_no_log(client: Client, path: str) -> None:
    with capture_logs() as logs:
        for _ in range(70):
            await client.ask("GET", path, token=None)
    assert len([line for line in logs if line["event"] == "request refused"]) == 60


async def test_what_is_refused_to_a_caller_is_always_told(client: Client) -> None:
    with capture_logs() as logs:
        for _ in range(61):
            await client.ask("GET", "/nowhere", token=None)
        await client.post(b"{")
    assert logs[-1]["code"] == "invalid_json"
