"""Whatever arrives as a token, the answer is a caller or a refusal, never another exception."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any

import jwt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpud.api.auth import Authenticator, AuthError, Caller
from gpud.api.keys import UnusableKeyError, read_jwks
from gpud.dev.issuer import Issuer

fuzz = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

any_text = st.text(st.characters())  # lone surrogates too: aiohttp makes them of odd bytes
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
header_names = st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jwk", "jku", "x5c", "cty"])
header_values = json_values | st.sampled_from(["RS256", "none", "HS256", ["exp"]])
claim_names = st.sampled_from(
    ["iss", "aud", "exp", "nbf", "iat", "sub", "client_id", "azp", "scope", "scp"]
)


def segment(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


@pytest.fixture
async def offline(build: Any, issuer: Issuer, tmp_path: Path) -> Authenticator:
    """An authenticator that has keys and demands all it can, without a network."""
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(issuer.jwks()))
    authenticator: Authenticator = build(
        jwks_url=None, key_files=[path], client_ids=["supplier-7"], scopes=["gpu"]
    )
    await authenticator.start()
    return authenticator


async def judge(authenticator: Authenticator, header: str) -> Caller | None:
    authenticator.remembered(header)
    try:
        return await authenticator.authenticate(header)
    except AuthError as error:
        refusal = error
    assert refusal.http_status in {401, 403}
    assert refusal.www_authenticate is not None
    assert refusal.www_authenticate.isascii()
    assert refusal.www_authenticate.isprintable()
    return None


@fuzz
@given(prefix=st.sampled_from(["", "Bearer ", "Bearer", "bearer\t", "Basic "]), rest=any_text)
async def test_any_text_is_refused(offline: Authenticator, prefix: str, rest: str) -> None:
    assert await judge(offline, prefix + rest) is None


@fuzz
@given(
    header=st.dictionaries(header_names, header_values),
    payload=st.dictionaries(claim_names, json_values),
    signature=st.binary(max_size=300),
)
async def test_any_forged_jwt_is_refused(
    offline: Authenticator, header: Any, payload: Any, signature: bytes
) -> None:
    parts = [json.dumps(header).encode(), json.dumps(payload).encode(), signature]
    assert await judge(offline, "Bearer " + ".".join(map(segment, parts))) is None


@fuzz
@given(data=st.data())
async def test_any_change_of_a_good_token_is_refused(
    offline: Authenticator, issuer: Issuer, data: st.DataObject
) -> None:
    token = issuer.mint(scope="gpu", jti=None)
    assert await judge(offline, f"Bearer {token}") is not None
    position = data.draw(st.integers(0, len(token) - 1))
    character = data.draw(st.characters(codec="ascii").filter(lambda c: c != token[position]))
    changed = token[:position] + character + token[position + 1 :]
    assert await judge(offline, f"Bearer {changed}") is None


@fuzz
@given(claims=st.dictionaries(claim_names, json_values, min_size=1))
async def test_any_claims_that_the_issuer_signs_are_judged(
    offline: Authenticator, issuer: Issuer, claims: dict[str, Any]
) -> None:
    usual = jwt.decode(issuer.mint(scope="gpu"), options={"verify_signature": False})
    payload = json.dumps({**usual, **claims}).encode()
    key = issuer.private_key(issuer.kid)
    token = jwt.PyJWS().encode(payload, key, algorithm="RS256", headers={"kid": issuer.kid})
    caller = await judge(offline, f"Bearer {token}")
    if caller is not None:
        assert caller.client_id == "supplier-7"
        assert not {"iss", "aud", "exp"} & claims.keys() or caller.expires_at is not None


@fuzz
@given(body=st.binary() | json_values.map(lambda value: json.dumps({"keys": value}).encode()))
def test_any_garbage_as_jwks_is_refused(body: bytes) -> None:
    with pytest.raises(UnusableKeyError):
        read_jwks(body)
