"""What a tenant may legally send arrives in the store exactly as it was sent."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpud.api.schemas import parse_order
from gpud.model import GuestInput
from tests.unit.client import Client
from tests.unit.service import Service, make_ended

PRIVATE_KEYS: list[Any] = [
    ed25519.Ed25519PrivateKey.generate(),
    rsa.generate_private_key(65537, 2048),
    ec.generate_private_key(ec.SECP256R1()),
    ec.generate_private_key(ec.SECP521R1()),
]
KEYS = [
    key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    for key in PRIVATE_KEYS
]


async def ordered(
    client: Client, service: Service, instance_id: str = "x", **fields: Any
) -> GuestInput:
    """Order, and read back what is kept for the guest."""
    answer = await client.order(instance_id, **fields)
    assert answer.status == 201, answer.body
    upstream_id = answer.json["upstream_id"]
    kept = await service.store.guest_input(upstream_id)
    await make_ended(service, upstream_id)  # makes room for the next
    return kept


SCRIPTS = [
    "#!/bin/bash\r\necho one\r\n",
    "no newline at the end",
    "\n\n\n",
    " ",
    "cat <<'EOF'\n\"double\" 'single' `back` $(sub) ${var} \\ \\n\nEOF\nEOF\n",
    "key: [value, &anchor]\n- *anchor # comment\n---\n...\n%TAG !\n|\n>\n",
    "]]> <!-- & < > \" ' &amp; <![CDATA[ -->",
    "echo Grüße 日本語 עברית 🚀 \U0010ffff\n",
    "".join(chr(number) for number in range(1, 0x100)),
    "\u2028\u2029\u202e\ufeff\ufffe",
    "#cloud-config\nruncmd: [reboot]\n",
    "Content-Type: multipart/mixed; boundary=x\n--x--\n",
    "#!/bin/sh\n" + "0123456789abcde\n" * 32_000,
]


async def test_a_script_is_carried_byte_for_byte(
    client: Client, service: Service, said: Callable[[], str], subtests: pytest.Subtests
) -> None:
    for number, script in enumerate(SCRIPTS):
        with subtests.test(repr(script[:40])):
            kept = await ordered(client, service, str(number), startup_script=script)
            assert kept.startup_script == script.encode()
            assert script.strip() == "" or script not in said()


async def test_no_script_and_an_empty_one_are_both_none(client: Client, service: Service) -> None:
    assert (await ordered(client, service)).startup_script is None
    assert (await ordered(client, service, "b", startup_script="")) == GuestInput()


COMMENTS = [
    "",
    " a@b",
    " Jürgen Müller",
    " 山田さんの鍵",
    " ключ",
    " مفتاح",
    " 🔑 two words",
    " #'\"$`\\&<>",
]


async def test_a_key_is_carried_with_its_comment(
    client: Client, service: Service, subtests: pytest.Subtests
) -> None:
    for number, (key, comment) in enumerate(itertools.product(KEYS, COMMENTS)):
        with subtests.test(key.split()[0] + comment):
            given = [key + comment, f"  {key}\n"]
            kept = await ordered(client, service, str(number), ssh_public_keys=given)
            assert kept.ssh_public_keys == (key + comment, key)


async def test_a_hundred_keys_are_carried(client: Client, service: Service) -> None:
    keys = [f"{KEYS[0]} number-{number}" for number in range(100)]
    assert (await ordered(client, service, ssh_public_keys=keys)).ssh_public_keys == tuple(keys)


IMAGES = [
    "a",
    "nginx",
    "nginx:1.27",
    "library/nginx:latest",
    "registry.example.com/team/image:tag",
    "registry.example.com:5000/a/b/c_d__e-f--g.h:V1_2.3-x",
    "localhost:5000/x",
    "[2001:db8::1]:5000/x",
    "UPPER.example.com/x",
    "x@sha256:" + "0123456789abcdef" * 4,
    "ghcr.io/a/b:c@sha512:" + "a" * 128,
    "x:" + "t" * 128,
    "n" * 512,
]


async def test_an_image_reference_is_carried(
    client: Client, service: Service, subtests: pytest.Subtests
) -> None:
    for number, image in enumerate(IMAGES):
        with subtests.test(image[:40]):
            kept = await ordered(client, service, str(number), docker_image=image)
            assert kept.docker_image == image


@pytest.mark.parametrize(
    "instance_id",
    [
        "0",
        "z" * 128,
        "a" + string.ascii_letters,
        "a" + string.digits + "._:@=+~-",
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
    ],
)
async def test_every_legal_instance_id_orders_and_is_found(
    client: Client, instance_id: str
) -> None:
    made = await client.order(instance_id)
    shown = await client.get(f"/v1/instances/{instance_id}")
    assert shown.json["upstream_id"] == made.json["upstream_id"]


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(script=st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1))
def test_any_text_without_nul_is_a_script(script: str) -> None:
    body = {"instance_id": "x", "gpu_type": "x", "gpu_count": 1, "tier": "spot"}
    order, _ = parse_order(_json({**body, "startup_script": script}))
    assert order.guest_input.startup_script == script.encode()


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()
