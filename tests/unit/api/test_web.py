"""What every request goes through: its name, its size, its time, its route."""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from aiohttp import web

from gpud.api.problem import from_http
from gpud.errors import Code, GpudError
from tests.unit.client import Client
from tests.unit.contract import Answer, check_response
from tests.unit.service import Service

MIB = 2**20


def body_of(size: int) -> bytes:
    """An order of exactly so many bytes."""
    order = {"instance_id": "big", "gpu_type": "h100_sxm", "gpu_count": 1, "tier": "spot"}
    empty = json.dumps({**order, "startup_script": ""}).encode()
    return empty[:-2] + b"#" * (size - len(empty)) + empty[-2:]


async def send_chunked(client: Client, body: bytes) -> Answer:
    async def chunks() -> AsyncIterator[bytes]:
        source = io.BytesIO(body)
        while chunk := source.read(65536):
            yield chunk

    url = client.url.with_path("/v1/instances")
    headers = {"Authorization": f"Bearer {client.token}", "Content-Type": "application/json"}
    async with client.session.post(url, data=chunks(), headers=headers) as response:
        answer = Answer(response.status, response.headers, await response.read())
    check_response("POST", "/v1/instances", answer)
    return answer


@pytest.mark.parametrize("asked", ["a", "A-z.0_9", "x" * 64])
async def test_a_callers_request_id_is_kept(client: Client, said: Any, asked: str) -> None:
    answer = await client.get("/v1/instances/none", headers={"X-Request-Id": asked})
    assert answer.headers["X-Request-Id"] == asked
    assert answer.json["request_id"] == asked
    assert f"'request_id': '{asked}'" in said()


async def test_another_request_id_is_replaced(client: Client, said: Any) -> None:
    for asked in ["", " ", "x" * 65, "a b", "a;b", "a\tb", "ä", "<script>", "a/b"]:
        answer = await client.get("/v1/gpu/available", headers={"X-Request-Id": asked})
        assert len(answer.headers["X-Request-Id"]) == 16
        assert len(asked) < 2 or asked not in said()


async def test_request_ids_differ(client: Client) -> None:
    answers = [await client.get("/v1/gpu/available") for _ in range(3)]
    assert len({answer.headers["X-Request-Id"] for answer in answers}) == 3


@pytest.mark.parametrize("injected", ["a\r\nX-Injected: 1", "a\nX-Injected: 1", "a\rX-Injected: 1"])
async def test_no_header_can_be_injected(client: Client, injected: str) -> None:
    answer = await client.send(client.head("GET", "/v1/gpu/available", X_Request_Id=injected))
    assert answer.status in {200, 400}
    assert "X-Injected" not in answer.headers


@pytest.mark.parametrize(("size", "status"), [(MIB, 201), (MIB + 1, 413), (2 * MIB, 413)])
async def test_the_body_may_have_1_mib(
    client: Client, service: Service, size: int, status: int
) -> None:
    assert (await client.post(body_of(size))).status == status
    assert len(service.store.live) == (status == 201)


@pytest.mark.parametrize(("size", "status"), [(MIB, 201), (MIB + 1, 413), (2 * MIB, 413)])
async def test_a_body_of_unknown_length_may_have_1_mib(
    client: Client, service: Service, size: int, status: int
) -> None:
    assert (await send_chunked(client, body_of(size))).status == status
    assert len(service.store.live) == (status == 201)


@pytest.mark.parametrize("settings", [{"server": {"max_body_bytes": 1024}}], ids=[""])
async def test_the_limit_is_the_configured_one(client: Client) -> None:
    assert (await client.post(body_of(1024))).status == 201
    refused = await client.post(body_of(1025))
    assert (refused.status, refused.code) == (413, "payload_too_large")
    assert refused.headers["Connection"] == "close"


async def test_a_large_body_without_a_token_is_not_read(client: Client) -> None:
    answer = await client.post(body_of(2 * MIB), token=None)
    assert answer.code == "missing_token"


@pytest.mark.parametrize("settings", [{"server": {"body_timeout_s": 0.02}}], ids=[""])
async def test_a_body_that_stays_out_is_given_up(client: Client, service: Service) -> None:
    head = client.head("POST", "/v1/instances", Content_Length="1000")
    answer = await client.send(head + body_of(500))
    check_response("POST", "/v1/instances", answer)
    assert (answer.status, answer.code) == (408, "request_timeout")
    assert not service.store.live


@pytest.mark.parametrize("settings", [{"server": {"request_timeout_s": 0.03}}], ids=[""])
async def test_an_order_that_takes_too_long_is_still_made(
    client: Client, service: Service, eventually: Any
) -> None:
    answered = threading.Event()
    service.desk._hypervisor_up = lambda: answered.wait(10)
    answer = await client.order()
    assert (answer.status, answer.code) == (503, "too_slow")
    assert int(answer.headers["Retry-After"]) > 0
    # A reader waits its turn behind it, and is not kept for ever either.
    waiting = await client.get("/v1/instances/other")
    assert (waiting.status, waiting.code) == (503, "too_slow")
    answered.set()
    await eventually(lambda: service.store.live)
    again = await client.order()
    while again.status == 503:  # a busy machine may not make it in time either
        again = await client.order()
    assert (again.status, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert len(service.store.live) == 1


UNKNOWN_PATHS = [
    "/",
    "/v1",
    "/v1/",
    "/v1/instances/",
    "/v2/gpu/available",
    "/v1/gpu/available/",
    "/metrics",
    "/v1/Instances",
    "//v1/instances",
    "/instances",
    "/v1/instances/x/console",
]


async def test_an_unknown_path_is_404(client: Client, subtests: pytest.Subtests) -> None:
    for method, path in itertools.product(("GET", "POST", "DELETE", "PATCH"), UNKNOWN_PATHS):
        with subtests.test(f"{method} {path}"):
            answer = await client.ask(method, path, token=None)
            assert (answer.status, answer.code) == (404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/instances", {"POST"}),
        ("HEAD", "/v1/instances", {"POST"}),
        ("DELETE", "/v1/instances", {"POST"}),
        ("POST", "/v1/gpu/available", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/gpu/available", {"GET", "HEAD"}),
        ("PUT", "/v1/instances/x", {"GET", "HEAD", "DELETE"}),
        ("PATCH", "/v1/instances/x", {"GET", "HEAD", "DELETE"}),
        ("POST", "/openapi.yaml", {"GET", "HEAD"}),
    ],
)
async def test_an_unknown_method_is_405(
    client: Client, method: str, path: str, allowed: set[str]
) -> None:
    answer = await client.ask(method, path)
    assert answer.status == 405
    assert set(answer.headers["Allow"].replace(" ", "").split(",")) == allowed
    assert method == "HEAD" or answer.code == "method_not_allowed"


@pytest.mark.parametrize("path", ["/v1/gpu/available", "/v1/instances/gpuai-1", "/openapi.yaml"])
async def test_head_is_get_without_a_body(client: Client, path: str) -> None:
    await client.order()
    got = await client.get(path)
    answer = await client.ask("HEAD", path)
    assert (answer.status, answer.body) == (200, b"")
    assert answer.headers["Content-Length"] == str(len(got.body))


async def test_head_of_an_unknown_instance_is_404(client: Client) -> None:
    assert (await client.ask("HEAD", "/v1/instances/none")).status == 404


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_a_body_where_none_belongs_is_ignored(client: Client, method: str) -> None:
    await client.order()
    answer = await client.ask(method, "/v1/instances/gpuai-1", data=b"\xff\xfe not json")
    assert answer.status in {200, 204}


async def test_a_query_is_ignored(client: Client) -> None:
    assert (await client.get("/v1/gpu/available?gpu_type=l40s&x=%ff")).json["offerings"]


@pytest.mark.parametrize(
    "fault",
    [
        RuntimeError("hunter2 in /etc/shadow"),
        GpudError(Code.STATE_UNUSABLE, "hunter2 in /etc/shadow", hint="look there"),
    ],
    ids=lambda fault: type(fault).__name__,
)
async def test_a_defect_of_ours_is_told_without_its_inside(
    client: Client, service: Service, said: Callable[[], str], fault: Exception
) -> None:
    def broken() -> bool:
        raise fault

    service.desk._hypervisor_up = broken
    answer = await client.order()
    assert (answer.status, answer.code) == (500, "internal_error")
    assert "hunter2" not in answer.body.decode()
    assert answer.json["type"] == "urn:gpud:problem:internal_error"
    assert answer.json["request_id"] in said()
    assert not service.store.live
    assert "hunter2" in said(), "the operator can find out"


async def test_requests_are_counted_by_route(client: Client, service: Service) -> None:
    await client.get("/v1/instances/none")
    await client.ask("PUT", "/v1/instances/none")
    await client.ask("QUERY", "/nowhere", token=None)

    def requests(route: str, method: str, status: str) -> float:
        labels = {"route": route, "method": method, "status": status}
        return service.metric("gpud_api_requests_total", **labels)

    assert requests("/v1/instances/{id}", "GET", "404") == 1
    assert requests("(none)", "other", "405") == 1
    assert requests("(none)", "other", "404") == 1


async def test_an_order_that_cannot_be_read_counts_as_refused(
    client: Client, service: Service
) -> None:
    await client.post(b"{")
    await client.order(instance_id="")
    for code in ("invalid_json", "invalid_request"):
        assert service.metric("gpud_orders_total", outcome=code) == 1
    told = service.metrics.registry.get_sample_value
    assert told("gpud_token_failures_total", {"reason": "expired"}) == 0  # before its first time


async def test_a_caller_who_polls_costs_no_signature_check(
    client: Client, service: Service
) -> None:
    await asyncio.gather(*(client.get("/v1/gpu/available") for _ in range(5)))
    await client.get("/v1/gpu/available", token="x.y.z")
    assert service.metric("gpud_token_failures_total", reason="malformed") == 1


async def test_a_caller_may_wait_for_a_go_ahead(client: Client) -> None:
    answer = await client.post(body_of(1000), headers={"Expect": "100-continue"})
    assert answer.status == 201


async def test_two_tokens_in_one_request_are_refused(client: Client) -> None:
    head = client.head("GET", "/v1/gpu/available", Authorization=f"Bearer {client.token}")
    answer = await client.send(head)
    check_response("GET", "/v1/gpu/available", answer)
    assert (answer.status, answer.code) == (401, "invalid_token")


def test_what_aiohttp_may_raise_besides_is_a_400() -> None:
    assert from_http(web.HTTPBadRequest()).code is Code.INVALID_REQUEST
