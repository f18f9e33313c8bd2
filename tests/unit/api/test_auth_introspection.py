"""Opaque tokens: what is asked, which answers let a caller in, and what an outage looks like."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from gpud.api.auth import Authenticator, AuthError, Caller, Reason
from gpud.dev.issuer import INTROSPECTION_PATH, Issuer
from gpud.errors import Code, GpudError

Build = Callable[..., Authenticator]
TOKEN = "Bearer 2YotnFZFEjr1zCsicMWpAA"


def write_secret(path: Path, secret: str, mode: int = 0o600) -> None:
    path.write_text(secret)
    path.chmod(mode)


@pytest.fixture
def secret_file(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    write_secret(path, "s3:cr+t %\n")
    return path


@pytest.fixture
def settings(issuer: Issuer, secret_file: Path) -> dict[str, Any]:
    return {
        "jwks_url": None,
        "introspection": {
            "url": issuer.introspection_url,
            "client_id": "supplier-7",
            "client_secret": {"file": secret_file},
            "remember_s": 60,
        },
    }


@pytest.fixture
async def introspecting(build: Build, settings: dict[str, Any]) -> Authenticator:
    authenticator = build(**settings)
    await authenticator.start()
    return authenticator


async def outcome(authenticator: Authenticator, header: str = TOKEN) -> Reason | None:
    try:
        await authenticator.authenticate(header)
    except AuthError as error:
        return error.reason
    return None


def is_ready(authenticator: Authenticator) -> bool:
    return authenticator.ready


def answer(host: Any, **members: Any) -> None:
    host.answer = lambda: web.json_response(members)


async def test_an_active_token_tells_who_calls(
    introspecting: Authenticator, issuer: Issuer, clock: Any
) -> None:
    assert introspecting.ready
    caller = await introspecting.authenticate(f"Bearer {issuer.mint()}")
    assert caller == Caller("supplier-7", "supplier-7", clock.now + 3600)


async def test_an_inactive_token_is_refused(introspecting: Authenticator, issuer: Issuer) -> None:
    token = issuer.mint()
    issuer.revoke(token)
    with pytest.raises(AuthError) as caught:
        await introspecting.authenticate(f"Bearer {token}")
    assert (caught.value.reason, caught.value.code) == (Reason.INACTIVE, Code.INVALID_TOKEN)


async def test_a_revoked_token_is_refused_once_it_is_no_longer_remembered(
    introspecting: Authenticator, issuer: Issuer, host: Any, monotonic: Any
) -> None:
    token = issuer.mint()
    header = f"Bearer {token}"
    await introspecting.authenticate(header)
    issuer.revoke(token)
    monotonic.advance(59.9)
    assert introspecting.remembered(header) is not None
    assert await outcome(introspecting, header) is None
    assert host.asked == [INTROSPECTION_PATH]
    monotonic.advance(0.1)
    assert introspecting.remembered(header) is None
    assert await outcome(introspecting, header) is Reason.INACTIVE


async def test_an_answer_is_not_remembered_beyond_the_tokens_own_end(
    introspecting: Authenticator, host: Any, clock: Any
) -> None:
    answer(host, active=True, exp=clock.now + 5)
    await introspecting.authenticate(TOKEN)
    clock.advance(34.9)
    assert introspecting.remembered(TOKEN)
    clock.advance(0.1)
    assert introspecting.remembered(TOKEN) is None
    assert await outcome(introspecting) is Reason.EXPIRED


async def test_an_answer_may_say_no_more_than_active(
    introspecting: Authenticator, host: Any, monotonic: Any
) -> None:
    answer(host, active=True)
    assert await introspecting.authenticate(TOKEN) == Caller(None, None, None)
    monotonic.advance(60)
    assert introspecting.remembered(TOKEN) is None


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"exp": 1}, Reason.EXPIRED),
        ({"exp": "never"}, Reason.CLAIM),
        ({"nbf": 4e9}, Reason.NOT_YET_VALID),
        ({"iss": "https://somebody.else"}, Reason.ISSUER),
        ({"aud": "https://somebody.else"}, Reason.AUDIENCE),
        ({"aud": []}, Reason.AUDIENCE),
    ],
)
async def test_what_an_answer_says_is_held_against_the_config(
    introspecting: Authenticator, host: Any, members: dict[str, Any], reason: Reason
) -> None:
    answer(host, active=True, **members)
    assert await outcome(introspecting) is reason


async def test_configured_clients_and_scopes_are_demanded_even_of_a_silent_answer(
    build: Build, settings: dict[str, Any], host: Any
) -> None:
    authenticator = build(**settings, client_ids=["gpu-ai"], scopes=["gpu"])
    await authenticator.start()
    answer(host, active=True)
    assert await outcome(authenticator) is Reason.CLIENT
    answer(host, active=True, client_id="gpu-ai")
    assert await outcome(authenticator) is Reason.SCOPE
    answer(host, active=True, client_id="gpu-ai", scope="gpu")
    assert await outcome(authenticator) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: web.Response(status=500),
        lambda: web.Response(status=401),
        lambda: web.Response(status=400),
        lambda: web.Response(status=307, headers={"Location": "/elsewhere"}),
        lambda: web.Response(text="<html>"),
        lambda: web.json_response([True]),
        lambda: web.json_response({}),
        lambda: web.json_response({"active": "true"}),
        lambda: web.json_response({"active": 1}),
        lambda: web.json_response({"active": None}),
        lambda: web.json_response({"active": True, "padding": "x" * 65536}),
    ],
)
async def test_an_endpoint_that_does_not_do_its_job_is_an_outage(
    introspecting: Authenticator, host: Any, make: Callable[[], web.Response]
) -> None:
    host.answer = make
    with pytest.raises(AuthError) as caught:
        await introspecting.authenticate(TOKEN)
    assert (caught.value.reason, caught.value.http_status, caught.value.retry_after_s) == (
        Reason.INTROSPECTION_UNAVAILABLE,
        503,
        5,
    )
    assert host.asked == [INTROSPECTION_PATH]


async def test_a_silent_endpoint_is_an_outage(
    build: Build, settings: dict[str, Any], host: Any
) -> None:
    authenticator = build(**settings, http_timeout_s=0.02)
    await authenticator.start()
    host.gate.clear()
    assert await outcome(authenticator) is Reason.INTROSPECTION_UNAVAILABLE


async def test_an_outage_is_told_once_and_ends_by_itself(
    introspecting: Authenticator, host: Any, logs: list[Any]
) -> None:
    host.fail()
    for _ in range(3):
        assert await outcome(introspecting) is Reason.INTROSPECTION_UNAVAILABLE
    assert not is_ready(introspecting)
    answer(host, active=True)
    assert await outcome(introspecting) is None
    assert is_ready(introspecting)
    assert [entry["event"] for entry in logs] == [
        "introspection unavailable",
        "introspection available again",
    ]
    assert "s3:cr" not in str(logs)
    assert TOKEN.split()[1] not in str(logs)


async def test_an_outage_that_nobody_has_met_for_long_is_no_longer_told_of(
    introspecting: Authenticator, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a load balancer sends nobody any more, nobody would ever find that it is over."""
    host.fail()
    assert await outcome(introspecting) is Reason.INTROSPECTION_UNAVAILABLE
    assert not is_ready(introspecting)
    monkeypatch.setattr("gpud.api.introspection._FAILING_S", 0)
    assert is_ready(introspecting)


async def test_a_token_is_asked_about_once_for_all_who_wait(
    introspecting: Authenticator, issuer: Issuer, host: Any, eventually: Any
) -> None:
    host.gate.clear()
    header = f"Bearer {issuer.mint()}"
    waiting = [asyncio.create_task(outcome(introspecting, header)) for _ in range(10)]
    await eventually(lambda: host.asked)
    waiting[0].cancel()
    host.gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert results[1:] == [None] * 9
    assert host.asked == [INTROSPECTION_PATH]


async def test_closing_ends_the_questions_under_way_and_who_waits_is_told_to_come_again(
    introspecting: Authenticator, host: Any, eventually: Any
) -> None:
    host.gate.clear()
    waiting = asyncio.create_task(outcome(introspecting))
    await eventually(lambda: host.asked)
    await introspecting.close()
    assert await waiting is Reason.INTROSPECTION_UNAVAILABLE


async def test_an_unreadable_secret_stops_the_start(
    build: Build, settings: dict[str, Any], secret_file: Path
) -> None:
    write_secret(secret_file, "s3:cr+t %", mode=0o644)
    authenticator = build(**settings)
    with pytest.raises(GpudError, match="open to every user"):
        await authenticator.start()
    assert not authenticator.ready
    assert await outcome(authenticator) is Reason.INTROSPECTION_UNAVAILABLE


async def test_a_reload_reads_the_secret_again(
    introspecting: Authenticator, issuer: Issuer, secret_file: Path
) -> None:
    write_secret(secret_file, "wrong")
    await introspecting.reload()
    assert await outcome(introspecting) is Reason.INTROSPECTION_UNAVAILABLE
    write_secret(secret_file, "s3:cr+t %")
    await introspecting.reload()
    assert await outcome(introspecting, f"Bearer {issuer.mint()}") is None


async def test_the_secret_may_be_a_systemd_credential(
    build: Build, settings: dict[str, Any], issuer: Issuer, secret_file: Path
) -> None:
    settings["introspection"]["client_secret"] = {"credential": secret_file.name}
    directory = str(secret_file.parent)
    authenticator = build(**settings, environ={"CREDENTIALS_DIRECTORY": directory})
    await authenticator.start()
    assert await outcome(authenticator, f"Bearer {issuer.mint()}") is None
