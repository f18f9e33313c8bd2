"""The published document: valid, in step with the code, and every answer it promises can be had."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import openapi_spec_validator
import pytest
import yaml

from gpud.api.schemas import OrderBody
from gpud.api.web import openapi_document
from gpud.config import Limits
from gpud.dev.issuer import Issuer
from gpud.errors import HTTP_STATUS
from gpud.model import GPU_TYPES, Status, Tier
from tests.unit.client import Client, OpenClient
from tests.unit.contract import Answer, check_request, check_response, document, documented
from tests.unit.service import Service

AVAILABLE = "/v1/gpu/available"
INSTANCES = "/v1/instances"
INSTANCE = "/v1/instances/{id}"


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = document()["components"]["schemas"][name]
    return found


def test_the_document_is_openapi_3_0_3() -> None:
    source = yaml.load(openapi_document(), yaml.CSafeLoader)
    assert source["openapi"] == "3.0.3"
    openapi_spec_validator.validate(source)


def test_the_document_lists_every_code_that_a_caller_can_meet() -> None:
    codes = schema("Problem")["properties"]["code"]["enum"]
    assert codes == [code.value for code in HTTP_STATUS]


def test_the_document_lists_the_gpu_types_tiers_and_statuses_of_the_model() -> None:
    assert schema("GpuType")["enum"] == list(GPU_TYPES)
    assert schema("Tier")["enum"] == list(Tier)
    assert schema("Status")["enum"] == list(Status)


def test_the_document_and_the_parser_know_the_same_fields_of_an_order() -> None:
    order = schema("Order")
    assert set(order["properties"]) == set(OrderBody.model_fields)
    required = {name for name, field in OrderBody.model_fields.items() if field.is_required()}
    assert set(order["required"]) == required


async def test_the_document_is_served_without_a_token(client: Client) -> None:
    answer = await client.get("/openapi.yaml", token=None)
    assert answer.status == 200
    assert answer.body == openapi_document()


GOOD_PROBLEM: dict[str, Any] = {
    "type": "urn:gpud:problem:not_found",
    "title": "Not Found",
    "status": 404,
    "detail": "there is nothing",
    "code": "not_found",
    "request_id": "r1",
}
GOOD_HEADERS = {"Content-Type": "application/problem+json", "X-Request-Id": "r1"}


def test_the_check_lets_a_good_problem_pass() -> None:
    body = json.dumps(GOOD_PROBLEM).encode()
    check_response("GET", "/nowhere", Answer(404, GOOD_HEADERS, body))


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (404, {"X-Request-Id": None}, {}),
        (404, {"X-Request-Id": "other"}, {}),
        (404, {"X-Request-Id": "a b"}, {"request_id": "a b"}),
        (404, {"Content-Type": "application/json"}, {}),
        (200, {}, {"status": 200}),
        (405, {}, {"status": 405}),
        (404, {}, {"status": 405}),
        (404, {}, {"code": "instance_not_found"}),
        (404, {}, {"code": "made_up", "type": "urn:gpud:problem:made_up"}),
        (404, {}, {"added": 1}),
        (404, {}, {"errors": [{"field": 1, "detail": ""}]}),
    ],
)
def test_the_check_notices(
    status: int, headers: dict[str, str | None], body: dict[str, Any]
) -> None:
    sent = {name: text for name, text in (GOOD_HEADERS | headers).items() if text is not None}
    with pytest.raises(AssertionError):
        check_response(
            "GET", "/nowhere", Answer(status, sent, json.dumps(GOOD_PROBLEM | body).encode())
        )


def test_the_check_notices_what_an_operation_does_not_promise() -> None:
    headers = {"X-Request-Id": "r1", "Content-Type": "application/json"}
    check_response("GET", AVAILABLE, Answer(200, headers, b'{"offerings": []}'))
    for body in (b"{}", b'{"offerings": [{}]}', b'{"offerings": [], "more": 1}'):
        with pytest.raises(AssertionError):
            check_response("GET", AVAILABLE, Answer(200, headers, body))
    with pytest.raises(AssertionError):
        check_response("DELETE", "/v1/instances/x", Answer(204, headers, b"x"))
    with pytest.raises(AssertionError):
        check_request("POST", INSTANCES, {"instance_id": "x"})


class Producer:
    """Brings each documented answer about."""

    def __init__(
        self, service: Service, issuer: Issuer, host: Any, open_client: OpenClient
    ) -> None:
        self.service = service
        self.issuer = issuer
        self.host = host
        self.open_client = open_client

    async def good(self, method: str, path: str) -> Answer:
        client = await self.open_client()
        made = await client.order()
        if path == INSTANCES:
            return made
        return await client.ask(method, path.format(id=made.json["upstream_id"]))

    async def no_token(self, method: str, path: str) -> Answer:
        client = await self.open_client()
        return await client.ask(method, path.format(id="x"), token=None)

    async def no_scope(self, method: str, path: str) -> Answer:
        client = await self.open_client(scopes=["gpu"])
        token = self.issuer.mint(scope="another")
        return await client.ask(method, path.format(id="x"), token=token)

    async def no_keys(self, method: str, path: str) -> Answer:
        self.host.fail()
        client = await self.open_client()
        return await client.ask(method, path.format(id="x"))

    async def no_instance(self, method: str, path: str) -> Answer:
        client = await self.open_client()
        return await client.ask(method, path.format(id="i-0123456789abcdef"))

    async def order(self, **fields: Any) -> Answer:
        client = await self.open_client()
        return await client.order(**fields)

    async def bad_order(self, *_: str) -> Answer:
        return await self.order(gpu_count="one")

    async def large_order(self, *_: str) -> Answer:
        return await self.order(startup_script="#" * 2**20)

    async def strange_order(self, *_: str) -> Answer:
        return await self.order(gpu_type="l40s")

    async def one_too_many(self, *_: str) -> Answer:
        await self.order(gpu_count=2)
        return await self.order(instance_id="gpuai-2")

    async def too_often(self, method: str, path: str) -> Answer:
        client = await self.open_client()
        for _ in range(10):
            answer = await client.ask(method, path.format(id="x"))
            assert answer.status != 429
        return await client.ask(method, path.format(id="x"))

    async def slow_order(self, method: str, path: str) -> Answer:
        client = await self.open_client()
        return await client.send(client.head(method, path, Content_Length="2") + b"{")


PRODUCERS: dict[tuple[str, str, str], Callable[..., Awaitable[Answer]]] = {
    ("GET", "/openapi.yaml", "200"): Producer.good,
    ("GET", AVAILABLE, "200"): Producer.good,
    ("POST", INSTANCES, "201"): Producer.good,
    ("GET", INSTANCE, "200"): Producer.good,
    ("DELETE", INSTANCE, "204"): Producer.good,
    ("POST", INSTANCES, "400"): Producer.bad_order,
    ("POST", INSTANCES, "408"): Producer.slow_order,
    ("POST", INSTANCES, "409"): Producer.one_too_many,
    ("POST", INSTANCES, "413"): Producer.large_order,
    ("POST", INSTANCES, "422"): Producer.strange_order,
    ("GET", INSTANCE, "404"): Producer.no_instance,
    ("DELETE", INSTANCE, "404"): Producer.no_instance,
    ("GET", "/openapi.yaml", "429"): Producer.too_often,
    **{
        (method, path, status): producer
        for method, path in (
            ("GET", AVAILABLE),
            ("POST", INSTANCES),
            ("GET", INSTANCE),
            ("DELETE", INSTANCE),
        )
        for status, producer in (
            ("401", Producer.no_token),
            ("403", Producer.no_scope),
            ("429", Producer.too_often),
            ("503", Producer.no_keys),
        )
    },
}


def test_every_documented_answer_has_a_test() -> None:
    assert set(documented()) == set(PRODUCERS)


STRICT: dict[str, Any] = {
    "408": {"server": {"body_timeout_s": 0.02}},
    "429": {"server": {"limits": dict.fromkeys(Limits.model_fields, 10)}},
}


@pytest.mark.parametrize(
    ("promise", "settings"),
    [(promise, STRICT.get(promise[2], {})) for promise in PRODUCERS],
    ids=[" ".join(promise) for promise in PRODUCERS],
)
async def test_a_documented_answer_can_be_had(
    promise: tuple[str, str, str],
    service: Service,
    issuer: Issuer,
    host: Any,
    open_client: OpenClient,
) -> None:
    method, path, status = promise
    producer = Producer(service, issuer, host, open_client)
    answer = await PRODUCERS[promise](producer, method, path)
    assert answer.status == int(status)
