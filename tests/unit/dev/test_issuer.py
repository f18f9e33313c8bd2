"""The development issuer speaks OAuth2 well enough for a standard client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import jwt
import pytest
from structlog.testing import capture_logs

from gpud.dev.issuer import JWKS_PATH, TOKEN_PATH, Issuer, running_issuer, serve
from tests.unit.conftest import KeyMaker

CLIENT, SECRET = "gpu ai", "s3:cr+t %"
GRANT = {"grant_type": "client_credentials"}


@pytest.fixture
async def issuer(key_maker: KeyMaker) -> AsyncIterator[Issuer]:
    async with running_issuer(
        client_id=CLIENT, client_secret=SECRET, audience="me", key_maker=key_maker
    ) as issuer:
        yield issuer


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as captured:
        yield captured


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": aiohttp.encode_basic_auth(user, password)}


async def test_a_token_is_had_with_basic_credentials_and_verifies(
    issuer: Issuer, session: aiohttp.ClientSession
) -> None:
    headers = basic("gpu+ai", "s3%3Acr%2Bt+%25")  # form-encoded, RFC 6749 section 2.3.1
    async with session.post(issuer.url + TOKEN_PATH, data=GRANT, headers=headers) as response:
        answer = await response.json()
        assert response.headers["Cache-Control"] == "no-store"
    async with session.get(issuer.url + JWKS_PATH) as response:
        (jwk,) = (await response.json())["keys"]
    assert (answer["token_type"], answer["expires_in"]) == ("Bearer", 3600)
    claims = jwt.decode(
        answer["access_token"],
        jwt.PyJWK(jwk),
        algorithms=["RS256"],
        audience="me",
        issuer=issuer.url,
        options={"require": ["exp", "iat", "jti"]},
    )
    assert (claims["sub"], claims["client_id"]) == (CLIENT, CLIENT)
    assert claims["exp"] - claims["iat"] == 3600
    assert jwt.get_unverified_header(answer["access_token"])["kid"] == issuer.kid


async def test_a_token_is_had_with_credentials_in_the_form(
    issuer: Issuer, session: aiohttp.ClientSession
) -> None:
    form = {**GRANT, "client_id": CLIENT, "client_secret": SECRET}
    async with session.post(issuer.url + TOKEN_PATH, data=form) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        basic("gpu+ai", "wrong"),
        basic("somebody", "s3%3Acr%2Bt+%25"),
        {"Authorization": "Basic !!!"},
        {"Authorization": "Basic /w=="},
        {"Authorization": "Bearer dTpw"},
    ],
)
@pytest.mark.parametrize("path", ["/oauth2/token", "/oauth2/introspect"])
async def test_others_get_nothing(
    issuer: Issuer, session: aiohttp.ClientSession, path: str, headers: dict[str, str]
) -> None:
    form = {**GRANT, "token": issuer.mint()}
    async with session.post(issuer.url + path, data=form, headers=headers) as response:
        assert response.status == 401
        assert await response.json() == {"error": "invalid_client"}
        assert response.headers["WWW-Authenticate"] == "Basic"


async def test_other_grants_are_refused(issuer: Issuer, session: aiohttp.ClientSession) -> None:
    form = {"grant_type": "password", "client_id": CLIENT, "client_secret": SECRET}
    async with session.post(issuer.url + TOKEN_PATH, data=form) as response:
        assert response.status == 400
        assert await response.json() == {"error": "unsupported_grant_type"}


async def introspect(session: aiohttp.ClientSession, issuer: Issuer, **form: str) -> Any:
    form = {"client_id": CLIENT, "client_secret": SECRET, **form}
    async with session.post(issuer.introspection_url, data=form) as response:
        return await response.json()


async def test_introspection_tells_active_tokens_from_others(
    issuer: Issuer, session: aiohttp.ClientSession
) -> None:
    token, dropped_kid = issuer.mint(), issuer.kid
    answer = await introspect(session, issuer, token=token)
    assert answer["active"] is True
    assert answer["client_id"] == CLIENT
    issuer.rotate()
    revoked = issuer.mint()
    issuer.revoke(revoked)
    issuer.drop_key(dropped_kid)
    for dead in (token, revoked, "opaque", issuer.mint(exp=1), issuer.mint(exp=None)):
        assert await introspect(session, issuer, token=dead) == {"active": False}
    assert await introspect(session, issuer) == {"error": "invalid_request"}


async def test_rotation_publishes_both_keys_and_dropping_takes_one_away(issuer: Issuer) -> None:
    first, second = issuer.kid, issuer.rotate()
    assert [jwk["kid"] for jwk in issuer.jwks()["keys"]] == [first, second]
    assert issuer.kid == second
    issuer.drop_key(first)
    assert [jwk["kid"] for jwk in issuer.jwks()["keys"]] == [second]
    with pytest.raises(KeyError):
        issuer.drop_key(first)


async def test_the_published_keys_are_public(issuer: Issuer) -> None:
    (jwk,) = issuer.jwks()["keys"]
    assert jwk.keys() == {"kty", "key_ops", "n", "e", "kid", "alg", "use"}


async def test_serving_lasts_until_cancelled(logs: list[Any]) -> None:
    serving = asyncio.create_task(serve("127.0.0.1", 0, CLIENT, SECRET, "me"))
    async with asyncio.timeout(10):
        while not logs:
            await asyncio.sleep(0.001)
    async with aiohttp.ClientSession() as session, session.get(logs[0]["url"] + JWKS_PATH) as got:
        assert got.status == 200
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    assert SECRET not in str(logs)
