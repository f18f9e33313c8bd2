"""Orders that must be refused: a clear 4xx, nothing recorded, nothing secret told."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gpud.dev.issuer import Issuer
from tests.unit.client import Client
from tests.unit.contract import Answer
from tests.unit.service import Service

SCRIPT = "#!/bin/sh\nexport SECRET=hunter2-in-the-script\n"
KEY = (
    Ed25519PrivateKey.generate()
    .public_key()
    .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    .decode()
)
SECRETS = ("hunter2", KEY.split()[1], b64encode(b"hunter2").decode())
GOOD = {"instance_id": "gpuai-1", "gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}
SECRET = {"startup_script": SCRIPT, "ssh_public_keys": [f"{KEY} hunter2-as-comment"]}

Check = Callable[..., Any]


@pytest.fixture
def check_refused(service: Service, client: Client, said: Callable[[], str]) -> Check:
    """The answer is this refusal, nothing is recorded, and no secret was told to anyone."""

    async def check(answer: Answer, status: int, code: str, *fields: str) -> None:
        assert (answer.status, answer.code) == (status, code)
        assert answer.json["detail"]
        assert [fault["field"] for fault in answer.json.get("errors", [])] == list(fields)
        assert await service.store.recent(10) == []
        assert await service.store.events() == []
        told = said() + answer.body.decode() + str(answer.headers)
        for secret in (*SECRETS, client.token):
            assert secret not in told

    return check


WRONG_VALUES: list[tuple[dict[str, Any], list[str]]] = [
    ({"instance_id": None}, ["instance_id"]),
    ({"instance_id": 7}, ["instance_id"]),
    ({"instance_id": ""}, ["instance_id"]),
    ({"instance_id": "x" * 129}, ["instance_id"]),
    ({"instance_id": "../../etc/passwd"}, ["instance_id"]),
    ({"instance_id": ".."}, ["instance_id"]),
    ({"instance_id": "a/b"}, ["instance_id"]),
    ({"instance_id": "i-0123456789abcdef"}, ["instance_id"]),
    ({"instance_id": "a\nb"}, ["instance_id"]),
    ({"instance_id": "a\n"}, ["instance_id"]),
    ({"instance_id": "a\0b"}, ["instance_id"]),
    ({"instance_id": "a\x1b[31mb"}, ["instance_id"]),
    ({"instance_id": "a\r\nX-Injected: 1"}, ["instance_id"]),
    ({"instance_id": "a b"}, ["instance_id"]),
    ({"instance_id": "ä"}, ["instance_id"]),
    ({"instance_id": "٣"}, ["instance_id"]),
    ({"gpu_type": 1}, ["gpu_type"]),
    ({"gpu_type": "h" * 129}, ["gpu_type"]),
    ({"gpu_count": "1"}, ["gpu_count"]),
    ({"gpu_count": 1.0}, ["gpu_count"]),
    ({"gpu_count": 1.5}, ["gpu_count"]),
    ({"gpu_count": True}, ["gpu_count"]),
    ({"gpu_count": None}, ["gpu_count"]),
    ({"gpu_count": [1]}, ["gpu_count"]),
    ({"tier": None}, ["tier"]),
    ({"tier": 0}, ["tier"]),
    ({"tier": "t" * 129}, ["tier"]),
    ({"region": 1}, ["region"]),
    ({"region": "r" * 129}, ["region"]),
    ({"ssh_public_keys": None}, ["ssh_public_keys"]),
    ({"ssh_public_keys": KEY}, ["ssh_public_keys"]),
    ({"ssh_public_keys": {}}, ["ssh_public_keys"]),
    ({"ssh_public_keys": [KEY] * 101}, ["ssh_public_keys"]),
    ({"docker_image": 1}, ["docker_image"]),
    ({"docker_image": ""}, ["docker_image"]),
    ({"startup_script": ["hunter2"]}, ["startup_script"]),
    ({"startup_script": SCRIPT + "\0"}, ["startup_script"]),
    (
        {"instance_id": "/", "gpu_count": "1", "tier": 3, "ssh_public_keys": [KEY, "x"]},
        ["instance_id", "gpu_count", "tier", "ssh_public_keys[1]"],
    ),
]


async def test_a_wrong_value_is_named_by_its_field(
    client: Client, check_refused: Check, subtests: pytest.Subtests
) -> None:
    for change, fields in WRONG_VALUES:
        with subtests.test(repr(change)[:60]):
            answer = await client.post({**GOOD, **SECRET, **change})
            await check_refused(answer, 400, "invalid_request", *fields)


async def test_a_missing_field_is_named(client: Client, check_refused: Check) -> None:
    for missing in GOOD:
        body = {name: value for name, value in {**GOOD, **SECRET}.items() if name != missing}
        await check_refused(await client.post(body), 400, "invalid_request", missing)


BROKEN_KEYS = [
    "",
    "hunter2",
    "ssh-ed25519",
    "ssh-ed25519 hunter2",
    KEY[:-8],
    KEY.replace("ssh-ed25519", "ssh-rsa"),
    f"{KEY} one\n{KEY} two",
    f"{KEY}\r\ncommand",
    f'command="reboot" {KEY}',
    f"{KEY} nul\0",
    f"{KEY} line\u2028separator",
    f"{KEY} right-to-left\u202e",
    "-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2\n-----END OPENSSH PRIVATE KEY-----",
    f"{KEY} " + "c" * 16384,
]


async def test_a_broken_key_is_refused(
    client: Client, check_refused: Check, subtests: pytest.Subtests
) -> None:
    for key in BROKEN_KEYS:
        with subtests.test(repr(key)[:60]):
            answer = await client.post({**GOOD, "ssh_public_keys": [KEY, key]})
            await check_refused(answer, 400, "invalid_request", "ssh_public_keys[1]")


BAD_IMAGES = [
    "nginx; rm -rf /",
    "$(reboot)",
    "`reboot`",
    "nginx && reboot",
    "nginx\nuser: root",
    "nginx\n",
    "{image: nginx}",
    "nginx: latest",
    "- nginx",
    "-v/:/host",
    "--privileged",
    "nginx '",
    'nginx"',
    "NGINX/Upper",
    "nginx:",
    "nginx@sha256:short",
    "../nginx",
    "nginx//x",
    "/nginx",
    "%n",
    "n" * 513,
    "größe",
]


async def test_a_bad_image_reference_is_refused(
    client: Client, check_refused: Check, subtests: pytest.Subtests
) -> None:
    for image in BAD_IMAGES:
        with subtests.test(repr(image)[:60]):
            answer = await client.post({**GOOD, **SECRET, "docker_image": image})
            await check_refused(answer, 400, "invalid_request", "docker_image")


NOT_OFFERED: list[tuple[dict[str, Any], list[str]]] = [
    ({"gpu_type": "h100"}, ["gpu_type"]),
    ({"gpu_type": "H100_SXM"}, ["gpu_type"]),
    ({"gpu_type": "l40s"}, ["gpu_type"]),
    ({"gpu_type": ""}, ["gpu_type"]),
    ({"gpu_count": 0}, ["gpu_count"]),
    ({"gpu_count": -1}, ["gpu_count"]),
    ({"gpu_count": 3}, ["gpu_count"]),
    ({"gpu_count": 10**300}, ["gpu_count"]),
    ({"gpu_count": -(2**63) - 1}, ["gpu_count"]),
    ({"tier": "reserved"}, ["tier"]),
    ({"tier": "On_Demand"}, ["tier"]),
    ({"region": "EU"}, ["region"]),
    ({"region": ""}, ["region"]),
    ({"gpu_type": "tpu", "region": "EU"}, ["gpu_type", "region"]),
    ({"gpu_count": 4, "region": "EU"}, ["gpu_count", "region"]),
]


async def test_what_is_not_offered_is_refused(
    client: Client, check_refused: Check, subtests: pytest.Subtests
) -> None:
    for change, fields in NOT_OFFERED:
        with subtests.test(repr(change)[:60]):
            answer = await client.post({**GOOD, **SECRET, **change})
            await check_refused(answer, 422, "not_offered", *fields)


@pytest.mark.parametrize(
    "settings",
    [
        {
            "offers": [
                {
                    "gpu_type": "h100_sxm",
                    "per_gpu": {"cpu_cores": 1, "memory_gib": 1, "storage_gib": 1},
                    "price_per_gpu_hour": {"on_demand": "1"},
                }
            ]
        }
    ],
    ids=[""],
)
async def test_a_tier_that_this_type_lacks_is_refused(client: Client, check_refused: Check) -> None:
    answer = await client.post({**GOOD, **SECRET, "tier": "spot"})
    await check_refused(answer, 422, "not_offered", "tier")


def raw(**fields: str) -> bytes:
    """A body whose values are JSON text of the test's own making."""
    values = {name: json.dumps(value) for name, value in {**GOOD, **SECRET}.items()} | fields
    return ("{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}").encode(
        "utf-8", "surrogatepass"
    )


NOT_JSON = [
    b"",
    b" ",
    b"hunter2",
    raw()[:-1],
    raw() + b"x",
    raw(region="'US'"),
    raw(later="NaN"),
    raw(later="[-Infinity]"),
    raw(gpu_count="01"),
    raw(gpu_count="1" + "0" * 5000),
    raw(later='"\\ud800"'),
    raw(instance_id='"\\udc00"'),
    raw(startup_script='"\ud800"'),
    raw().replace(b"hunter2", b"\xff\xfe", 1),
    raw()[:-1] + b', "gpu_count": 2}',
    raw(later='{"a": {"b": 1, "b": 1}}'),
    raw(later="[" * 100_000),
    raw(later="[" * 100_000 + "]" * 100_000),
    raw(later='{"a":' * 10_000 + "1" + "}" * 10_000),
    b"\xef\xbb\xbf" + raw(),
    raw().decode().encode("utf-16"),
    raw().decode().encode("utf-32-le"),
    gzip.compress(raw()),
]


async def test_what_is_not_json_is_refused(
    client: Client, check_refused: Check, subtests: pytest.Subtests
) -> None:
    for body in NOT_JSON:
        with subtests.test(repr(body)[:60]):
            await check_refused(await client.post(body), 400, "invalid_json")


async def test_json_that_is_no_object_is_refused(client: Client, check_refused: Check) -> None:
    for body in (b"null", b"[]", b'"hunter2"', b"1", b"true"):
        await check_refused(await client.post(body), 400, "invalid_request", "(body)")


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json; charset=utf-8",
        "application/vnd.gpu.ai+json",
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/octet-stream",
        "/",
        None,
    ],
)
async def test_json_by_any_name_is_accepted(client: Client, content_type: str | None) -> None:
    body = raw()
    declared = {"Content_Type": content_type} if content_type else {}
    head = client.head("POST", "/v1/instances", Content_Length=str(len(body)), **declared)
    assert (await client.send(head + body)).status == 201


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
async def test_a_body_that_is_not_encoded_as_declared_is_refused(
    client: Client, check_refused: Check, coding: str
) -> None:
    answer = await client.post(raw(), headers={"Content-Encoding": coding})
    await check_refused(answer, 400, "invalid_request")


async def test_a_compressed_order_is_read(client: Client) -> None:
    answer = await client.post(gzip.compress(raw()), headers={"Content-Encoding": "gzip"})
    assert answer.status == 201


async def test_a_small_body_that_unpacks_to_a_large_one_is_refused(
    client: Client, check_refused: Check
) -> None:
    bomb = gzip.compress(b" " * 20_000_000)
    answer = await client.post(bomb, headers={"Content-Encoding": "gzip"})
    await check_refused(answer, 413, "payload_too_large")


async def test_a_body_of_2_mib_is_refused(client: Client, check_refused: Check) -> None:
    answer = await client.post({**GOOD, "startup_script": SCRIPT + "#" * 2**21})
    await check_refused(answer, 413, "payload_too_large")


@pytest.mark.parametrize("settings", [{"guest": {"image": "missing"}}], ids=[""])
async def test_without_a_guest_image_there_is_no_capacity(
    client: Client, check_refused: Check, said: Callable[[], str]
) -> None:
    await check_refused(await client.post({**GOOD, **SECRET}), 409, "no_capacity")
    assert "guest image cannot be used" in said()


@pytest.mark.parametrize("claims", [{"exp": 1}, {"aud": "x"}, {"iss": "x"}], ids=str)
async def test_a_bad_token_orders_nothing(
    client: Client, check_refused: Check, issuer: Issuer, claims: Any
) -> None:
    token = issuer.mint(**claims)
    answer = await client.post({**GOOD, **SECRET}, token=token)
    await check_refused(answer, 401, "invalid_token")
    assert token not in answer.body.decode()
