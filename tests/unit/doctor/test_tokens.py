"""The keys that tokens are judged with, from real files and a real server on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm

from gpud.config import Auth
from gpud.doctor.check import Level
from gpud.doctor.tokens import tokens
from tests.unit.doctor.parts import level, named, only

KEY = ec.generate_private_key(ec.SECP256R1()).public_key()
JWKS = {"keys": [ECAlgorithm.to_jwk(KEY, as_dict=True)]}


def auth(**changes: Any) -> Auth:
    settings = {"issuer": "x", "audience": ["gpud"], "algorithms": ["ES256"], **changes}
    return Auth.model_validate(settings)


@pytest.fixture
async def issuer() -> AsyncIterator[str]:
    async def keys(_: web.Request) -> web.Response:
        return web.json_response(JWKS)

    app = web.Application()
    app.router.add_get("/jwks", keys)
    async with TestServer(app) as server:
        yield f"http://127.0.0.1:{server.port}"


async def test_keys_that_fit_are_well(issuer: str) -> None:
    found = only(await tokens(auth(jwks_url=f"{issuer}/jwks?secret=1")))
    assert found[:2] == (Level.OK, f"1 for ES256 from {issuer}/jwks")


async def test_keys_that_fit_no_algorithm_are_a_fault(issuer: str) -> None:
    found = only(await tokens(auth(jwks_url=f"{issuer}/jwks", algorithms=["RS256"])))
    assert found[0] is Level.FAULT
    assert found[2] == "auth.algorithms: of ES256, the one that the issuer signs with"


async def test_a_jwks_that_cannot_be_had_is_a_fault_with_the_reason(issuer: str) -> None:
    found = only(await tokens(auth(jwks_url=f"{issuer}/elsewhere")))
    assert found[:2] == (Level.FAULT, f"{issuer}/elsewhere: the answer has status 404")
    assert "curl" in found[2]


async def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "key.pem"
    config = auth(key_files=[file])
    assert only(await tokens(config))[0] is Level.FAULT
    file.write_bytes(KEY.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert only(await tokens(config))[0] is Level.OK


def introspection(url: str, secret: Path) -> Auth:
    return auth(introspection={"url": url, "client_id": "a", "client_secret": {"file": secret}})


async def test_introspection_needs_its_secret_and_its_endpoint(issuer: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    config = introspection(f"{issuer}/introspect", secret)
    assert level(await tokens(config), "client secret") is Level.FAULT
    secret.write_text("hush-hush")
    secret.chmod(0o600)
    found = await tokens(config)
    assert {one.level for one in found} == {Level.OK}
    assert "hush" not in json.dumps([one.what + one.mend for one in found])


async def test_an_endpoint_that_is_away_is_a_fault(tmp_path: Path) -> None:
    found = await tokens(introspection("http://127.0.0.1:1/introspect", tmp_path / "secret"))
    assert named(found, "introspection")[0] is Level.FAULT
