"""Keys from a URL: when they are fetched, what an outage does, and what a change of keys does."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from cryptography.hazmat.primitives.asymmetric import rsa

from gpud.api.auth import Authenticator, AuthError, Reason
from gpud.api.auth_jwks import retry_delay_s
from gpud.dev.issuer import Issuer
from gpud.errors import Code

Build = Callable[..., Authenticator]
LONG_S = 50_000.0


async def outcome(authenticator: Authenticator, token: str) -> Reason | None:
    """Why the token is refused; None when it is not."""
    try:
        await authenticator.authenticate(f"Bearer {token}")
    except AuthError as error:
        return error.reason
    return None


def events(logs: list[Any]) -> list[str]:
    return [entry["event"] for entry in logs]


def unknown_kid(issuer: Issuer, kid: str = "nobody") -> str:
    return issuer.mint(headers={"kid": kid})


async def test_an_unknown_kid_is_fetched_once_for_all_who_wait(
    authenticator: Authenticator, issuer: Issuer, host: Any, eventually: Any
) -> None:
    issuer.rotate()
    host.gate.clear()
    tokens = [issuer.mint(jti=str(n)) for n in range(20)]
    waiting = [asyncio.create_task(outcome(authenticator, token)) for token in tokens]
    await eventually(lambda: host.jwks_fetches == 2)
    host.gate.set()
    assert await asyncio.gather(*waiting) == [None] * 20
    assert host.jwks_fetches == 2


async def test_who_gives_up_waiting_does_not_end_the_fetch_for_others(
    authenticator: Authenticator, issuer: Issuer, host: Any, eventually: Any
) -> None:
    issuer.rotate()
    host.gate.clear()
    impatient = asyncio.create_task(outcome(authenticator, issuer.mint()))
    patient = asyncio.create_task(outcome(authenticator, issuer.mint()))
    await eventually(lambda: host.jwks_fetches == 2)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    host.gate.set()
    assert await patient is None


async def test_unknown_kids_cause_one_fetch_per_interval(
    authenticator: Authenticator, issuer: Issuer, host: Any, monotonic: Any
) -> None:
    for n in range(5):
        token = unknown_kid(issuer, f"nobody-{n}")
        assert await outcome(authenticator, token) is Reason.UNKNOWN_KEY
    assert host.jwks_fetches == 2
    monotonic.advance(29.9)
    await outcome(authenticator, unknown_kid(issuer))
    assert host.jwks_fetches == 2
    monotonic.advance(0.2)
    await outcome(authenticator, unknown_kid(issuer))
    assert host.jwks_fetches == 3


async def test_a_bad_signature_under_a_known_kid_causes_no_fetch(
    authenticator: Authenticator,
    issuer: Issuer,
    host: Any,
    signing_keys: list[rsa.RSAPrivateKey],
) -> None:
    token = jwt.encode({}, signing_keys[1], algorithm="RS256", headers={"kid": issuer.kid})
    assert await outcome(authenticator, token) is Reason.SIGNATURE
    assert host.jwks_fetches == 1


async def test_after_a_rotation_old_and_new_tokens_are_good(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    before = issuer.mint()
    issuer.rotate()
    assert await outcome(authenticator, issuer.mint()) is None
    assert await outcome(authenticator, before) is None


async def test_a_removed_key_forgets_the_tokens_it_signed(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    old_kid, old_token = issuer.kid, issuer.mint()
    issuer.rotate()
    new_token = issuer.mint()
    assert await outcome(authenticator, old_token) is None
    assert await outcome(authenticator, new_token) is None
    issuer.drop_key(old_kid)
    await authenticator.reload()
    assert authenticator.remembered(f"Bearer {old_token}") is None
    assert authenticator.remembered(f"Bearer {new_token}") is not None
    assert await outcome(authenticator, old_token) is Reason.UNKNOWN_KEY


async def test_a_key_changed_under_its_name_forgets_the_tokens_it_signed(
    authenticator: Authenticator, issuer: Issuer, host: Any
) -> None:
    token, kid = issuer.mint(), issuer.kid
    assert await outcome(authenticator, token) is None
    issuer.rotate()
    jwks = issuer.jwks()
    changed = [{**key, "kid": kid} for key in jwks["keys"] if key["kid"] == issuer.kid]
    host.answer = lambda: web.json_response({"keys": changed})
    await authenticator.reload()
    assert await outcome(authenticator, token) is Reason.SIGNATURE


async def test_a_token_without_kid_is_tried_with_the_fitting_keys(
    authenticator: Authenticator, issuer: Issuer, host: Any, signing_keys: list[rsa.RSAPrivateKey]
) -> None:
    assert await outcome(authenticator, issuer.mint(headers={"kid": None})) is None
    issuer.rotate()
    assert await outcome(authenticator, issuer.mint(headers={"kid": None})) is None
    assert host.jwks_fetches == 2
    token = jwt.encode({}, signing_keys[2], algorithm="RS256")
    assert await outcome(authenticator, token) is Reason.SIGNATURE


async def test_a_token_without_kid_is_refused_when_too_many_keys_fit(
    build: Build, issuer: Issuer, host: Any
) -> None:
    jwk = issuer.jwks()["keys"][0]
    number = int.from_bytes(b"\x80" + b"\0" * 254 + b"\x01")
    others = [
        {**jwk, "kid": str(n), "n": jwt.utils.to_base64url_uint(number + 2 * n).decode()}
        for n in range(8)
    ]
    host.answer = lambda: web.json_response({"keys": [jwk, *others]})
    authenticator = build()
    await authenticator.start()
    assert await outcome(authenticator, issuer.mint(headers={"kid": None})) is Reason.SIGNATURE
    assert await outcome(authenticator, issuer.mint()) is None


async def test_a_token_without_kid_is_refused_when_two_keys_verify_it(
    build: Build, issuer: Issuer, host: Any
) -> None:
    jwk = issuer.jwks()["keys"][0]
    private = issuer.private_key(issuer.kid).private_numbers()
    # x**e = x**(e + lcm(p-1, q-1)) mod n: another public key that verifies every signature of ours.
    twin_exponent = private.public_numbers.e + math.lcm(private.p - 1, private.q - 1)
    twin = {**jwk, "kid": "twin", "e": jwt.utils.to_base64url_uint(twin_exponent).decode()}
    host.answer = lambda: web.json_response({"keys": [jwk, twin]})
    authenticator = build()
    await authenticator.start()
    assert await outcome(authenticator, issuer.mint(headers={"kid": "twin"})) is None
    assert await outcome(authenticator, issuer.mint()) is None
    assert await outcome(authenticator, issuer.mint(headers={"kid": None})) is Reason.SIGNATURE


async def test_a_first_start_in_an_outage_answers_503_and_recovers_by_itself(
    build: Build, issuer: Issuer, host: Any, logs: list[Any], eventually: Any
) -> None:
    host.fail()
    authenticator = build(jwks_refresh_s=0.005)
    await authenticator.start()
    assert not authenticator.ready
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(f"Bearer {issuer.mint()}")
    assert (caught.value.code, caught.value.reason) == (
        Code.AUTH_UNAVAILABLE,
        Reason.KEYS_UNAVAILABLE,
    )
    assert caught.value.retry_after_s is not None
    assert caught.value.retry_after_s >= 1
    host.recover()
    await eventually(lambda: authenticator.ready)
    assert await outcome(authenticator, issuer.mint()) is None
    told = events(logs)
    assert told[:3] == ["jwks unavailable", "jwks available again", "jwks changed"]


async def test_before_the_start_a_token_fetches_the_keys_it_needs(
    build: Build, issuer: Issuer, host: Any
) -> None:
    authenticator = build()
    assert await outcome(authenticator, issuer.mint()) is None
    assert host.jwks_fetches == 1


async def test_a_refused_connection_is_an_outage(build: Build, issuer: Issuer) -> None:
    authenticator = build(jwks_url="http://127.0.0.1:1/jwks.json")
    await authenticator.start()
    assert await outcome(authenticator, issuer.mint()) is Reason.KEYS_UNAVAILABLE


async def test_a_silent_issuer_is_an_outage(build: Build, issuer: Issuer, host: Any) -> None:
    host.gate.clear()
    authenticator = build(http_timeout_s=0.02)
    await authenticator.start()
    assert await outcome(authenticator, issuer.mint()) is Reason.KEYS_UNAVAILABLE


async def test_an_outage_keeps_the_keys_in_use_and_is_told_once(
    authenticator: Authenticator, issuer: Issuer, host: Any, logs: list[Any]
) -> None:
    host.fail(503)
    for _ in range(3):
        await authenticator.reload()
    assert await outcome(authenticator, issuer.mint()) is None
    host.recover()
    for _ in range(3):
        await authenticator.reload()
    assert events(logs) == ["jwks unavailable", "jwks available again"]
    assert logs[0]["keys_still_in_use"] == 1
    assert logs[1]["after_failures"] == 3


async def test_in_an_outage_an_unknown_kid_is_not_called_invalid(
    authenticator: Authenticator, issuer: Issuer, host: Any
) -> None:
    host.fail()
    issuer.rotate()
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(f"Bearer {issuer.mint()}")
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.KEYS_UNAVAILABLE, 1)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "<html>sign in</html>",
        "[]",
        "{}",
        '{"keys": {}}',
        '{"keys": []}',
        '{"keys": [null, 5, {"kty": "oct", "k": "AAAA"}, {"kty": "RSA"}]}',
        "[" * 100_000,
    ],
)
async def test_a_bad_document_keeps_the_keys_in_use(
    authenticator: Authenticator, issuer: Issuer, host: Any, body: str, logs: list[Any]
) -> None:
    host.answer = lambda: web.Response(text=body, content_type="application/json")
    await authenticator.reload()
    assert await outcome(authenticator, issuer.mint()) is None
    assert events(logs) == ["jwks unavailable"]


async def test_an_endless_document_is_not_read_to_its_end(
    authenticator: Authenticator, issuer: Issuer, host: Any, logs: list[Any]
) -> None:
    body = json.dumps(issuer.jwks()) + " " * 2**20
    host.answer = lambda: web.Response(text=body)
    await authenticator.reload()
    assert logs[0]["reason"] == "the answer is larger than 1048576 bytes"


async def test_one_unusable_key_does_not_spoil_the_others(
    build: Build, issuer: Issuer, host: Any, logs: list[Any]
) -> None:
    keys = [{"kty": "EC", "crv": "P-256", "x": "!", "y": "!"}, None, *issuer.jwks()["keys"]]
    host.answer = lambda: web.json_response({"keys": keys})
    authenticator = build()
    await authenticator.start()
    assert await outcome(authenticator, issuer.mint()) is None
    assert logs[0]["passed_over"] == ("key 0 is damaged", "key 1 is not an object")


async def test_a_change_among_unusable_keys_forgets_no_token(
    authenticator: Authenticator, issuer: Issuer, host: Any
) -> None:
    header = f"Bearer {issuer.mint()}"
    await authenticator.authenticate(header)
    host.answer = lambda: web.json_response({"keys": [None, *issuer.jwks()["keys"]]})
    await authenticator.reload()
    assert authenticator.remembered(header) is not None


async def test_what_was_never_started_can_be_closed(build: Build) -> None:
    await build().close()


async def test_keys_are_refreshed_in_the_background(
    build: Build, issuer: Issuer, host: Any, eventually: Any
) -> None:
    authenticator = build(jwks_refresh_s=0.005)
    await authenticator.start()
    await eventually(lambda: host.jwks_fetches >= 3)
    assert await outcome(authenticator, issuer.mint()) is None


async def test_after_a_failed_demand_the_next_attempt_does_not_wait_for_the_refresh(
    build: Build, issuer: Issuer, host: Any
) -> None:
    authenticator = build(jwks_refresh_s=LONG_S)
    await authenticator.start()
    appointed = authenticator._judge._source._timer  # type: ignore[attr-defined]
    host.fail()
    await outcome(authenticator, unknown_kid(issuer))
    assert appointed.cancelled()
    loop = asyncio.get_running_loop()
    timer = authenticator._judge._source._timer  # type: ignore[attr-defined]
    assert timer.when() - loop.time() < 1.1


async def test_closing_stops_every_fetch_and_may_be_repeated(
    build: Build, host: Any, eventually: Any
) -> None:
    authenticator = build(jwks_refresh_s=0.005)
    await authenticator.start()
    host.gate.clear()
    under_way = asyncio.create_task(authenticator.reload())
    await eventually(lambda: host.jwks_fetches == 2)
    await authenticator.close()
    await under_way  # which is no reason to end who waits for it
    host.gate.set()
    fetches = host.jwks_fetches
    await asyncio.sleep(0.03)
    assert host.jwks_fetches == fetches
    await authenticator.close()


async def test_redirects_are_followed_within_the_origin_only(
    build: Build, issuer: Issuer, host: Any, logs: list[Any]
) -> None:
    async def redirect(request: web.Request) -> web.Response:
        targets = {"same": "/keys", "loop": "/loop", "http": issuer.jwks_url, "none": ""}
        return web.Response(status=302, headers={"Location": targets[request.match_info["to"]]})

    async def publish(_: web.Request) -> web.Response:
        return web.json_response(issuer.jwks())

    application = web.Application()
    application.router.add_get("/keys", publish)
    application.router.add_get("/{to}", redirect)
    async with TestServer(application) as server:
        await _start_and_close(build, str(server.make_url("/same")))
        assert events(logs) == ["jwks changed"]
        for to in ("loop", "http", "none"):
            await _start_and_close(build, str(server.make_url(f"/{to}")))
    reasons = [entry["reason"] for entry in logs if entry["event"] == "jwks unavailable"]
    assert reasons == [
        "redirected more than 3 times",
        "redirected to somewhere else than https",
        "redirected to somewhere else than https",
    ]
    assert host.jwks_fetches == 0


async def _start_and_close(build: Build, url: str) -> None:
    authenticator = build(jwks_url=url)
    await authenticator.start()
    await authenticator.close()


async def test_credentials_in_the_url_are_not_logged(
    build: Build, issuer: Issuer, host: Any, logs: list[Any]
) -> None:
    host.fail()
    url = issuer.jwks_url.replace("http://", "http://me:hunter2@") + "?apikey=hunter3"
    await _start_and_close(build, url)
    assert "hunter" not in json.dumps(logs)
    assert logs[0]["url"] == issuer.jwks_url


@pytest.mark.parametrize(
    ("failures", "refresh_s", "delay_s"),
    [(0, 600, 600), (1, 600, 1), (2, 600, 2), (7, 600, 60), (5000, 600, 60), (5, 10, 10)],
)
def test_attempts_in_an_outage_grow_rarer(failures: int, refresh_s: float, delay_s: float) -> None:
    assert retry_delay_s(failures, refresh_s) == delay_s


async def test_transport_errors_of_every_kind_are_outages(build: Build, logs: list[Any]) -> None:
    async def slam(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n")
        writer.close()

    server = await asyncio.start_server(slam, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        await _start_and_close(build, f"http://127.0.0.1:{port}/")
    assert events(logs) == ["jwks unavailable"]
