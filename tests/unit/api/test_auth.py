"""The authenticator as the web layer meets it: who is let in, what is remembered, what is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gpud.api.auth import Authenticator, AuthError, Caller, Reason
from gpud.api.auth_error import _CODE, _DETAIL
from gpud.dev.issuer import Issuer
from gpud.errors import Code

Build = Callable[..., Authenticator]


async def refusal(authenticator: Authenticator, authorization: str | None) -> AuthError:
    with pytest.raises(AuthError) as caught:
        await authenticator.authenticate(authorization)
    return caught.value


async def test_a_good_token_tells_who_calls(
    authenticator: Authenticator, issuer: Issuer, clock: Any
) -> None:
    caller = await authenticator.authenticate(f"Bearer {issuer.mint()}")
    assert caller == Caller("supplier-7", "supplier-7", clock.now + 3600)


@pytest.mark.parametrize("prefix", ["Bearer ", "bearer ", "BEARER  ", "  Bearer "])
async def test_scheme_is_caseless_and_spaces_are_free(
    authenticator: Authenticator, issuer: Issuer, prefix: str
) -> None:
    await authenticator.authenticate(prefix + issuer.mint())


@pytest.mark.parametrize(
    "header", [None, "", "Basic dTpw", "Bearertoken", "Token abc", "Bearer\ttoken", "=,;"]
)
async def test_without_a_bearer_token_no_error_attribute_is_sent(
    authenticator: Authenticator, header: str | None
) -> None:
    error = await refusal(authenticator, header)
    assert (error.reason, error.code, error.http_status) == (
        Reason.MISSING,
        Code.MISSING_TOKEN,
        401,
    )
    assert error.www_authenticate == "Bearer"


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "Bearer a b",
        "Bearer a,b",
        'Bearer "abc"',
        "Bearer =",
        "Bearer a=b",
        "Bearer caf\u00e9",
        "Bearer \udcff\udcfe",
        "Bearer a\nb",
        "Bearer \x00",
    ],
)
async def test_bearer_syntax_faults_are_refused(authenticator: Authenticator, header: str) -> None:
    error = await refusal(authenticator, header)
    assert (error.reason, error.code) == (Reason.MALFORMED, Code.INVALID_TOKEN)
    assert error.www_authenticate == (
        'Bearer error="invalid_token", error_description="The bearer token is not well formed"'
    )
    assert authenticator.remembered(header) is None


async def test_an_oversized_header_is_refused_unread(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    header = "Bearer " + "a" * 16_384
    assert (await refusal(authenticator, header)).reason is Reason.TOO_LARGE
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
    assert authenticator.remembered(header) is None


async def test_a_good_token_is_remembered_without_asking_anybody(
    authenticator: Authenticator, host: Any, issuer: Issuer
) -> None:
    header = f"Bearer {issuer.mint()}"
    assert authenticator.remembered(header) is None
    caller = await authenticator.authenticate(header)
    assert authenticator.remembered(header) is caller
    assert authenticator.remembered(header.lower()[:7] + header[7:]) is caller
    assert await authenticator.authenticate("Bearer   " + header[7:]) is caller
    assert host.jwks_fetches == 1


async def test_nothing_else_is_remembered(authenticator: Authenticator, issuer: Issuer) -> None:
    token = issuer.mint()
    await authenticator.authenticate(f"Bearer {token}")
    for other in (None, "", "Bearer ", token, f"Basic   {token}", f"Bearer {issuer.mint(jti='2')}"):
        assert authenticator.remembered(other) is None


async def test_a_remembered_token_ends_with_its_expiry_and_leeway(
    authenticator: Authenticator, issuer: Issuer, clock: Any
) -> None:
    header = f"Bearer {issuer.mint()}"
    await authenticator.authenticate(header)
    clock.advance(3600 + 29.9)
    assert authenticator.remembered(header) is not None
    clock.advance(0.1)
    assert authenticator.remembered(header) is None
    assert (await refusal(authenticator, header)).reason is Reason.EXPIRED


async def test_a_refused_token_is_not_remembered(
    authenticator: Authenticator, issuer: Issuer
) -> None:
    header = f"Bearer {issuer.mint(aud='elsewhere')}"
    await authenticator.authenticate(f"Bearer {issuer.mint()}")
    await refusal(authenticator, header)
    assert authenticator.remembered(header) is None


async def test_memory_is_bounded_and_keeps_the_recently_used(build: Build, issuer: Issuer) -> None:
    authenticator = build(remembered_tokens=2)
    await authenticator.start()
    first, second, third = (f"Bearer {issuer.mint()}" for _ in range(3))
    await authenticator.authenticate(first)
    await authenticator.authenticate(second)
    assert authenticator.remembered(first)
    await authenticator.authenticate(third)
    assert authenticator.remembered(first)
    assert authenticator.remembered(second) is None
    assert authenticator.remembered(third)


async def test_memory_of_size_zero_remembers_nothing(build: Build, issuer: Issuer) -> None:
    authenticator = build(remembered_tokens=0)
    await authenticator.start()
    header = f"Bearer {issuer.mint()}"
    await authenticator.authenticate(header)
    assert authenticator.remembered(header) is None


async def test_the_memory_holds_no_token(authenticator: Authenticator, issuer: Issuer) -> None:
    token = issuer.mint()
    await authenticator.authenticate(f"Bearer {token}")
    assert token not in repr(vars(authenticator._memory))


async def test_a_scope_error_names_the_scopes_needed(build: Build, issuer: Issuer) -> None:
    authenticator = build(scopes=["gpu:read", 'gpu:"write\r\n'])
    await authenticator.start()
    error = await refusal(authenticator, f"Bearer {issuer.mint(scope='gpu:read')}")
    assert (error.reason, error.http_status) == (Reason.SCOPE, 403)
    assert error.www_authenticate == (
        'Bearer error="insufficient_scope", '
        'error_description="The token does not carry the scope needed here", '
        'scope="gpu:read gpu:write"'
    )


def test_every_reason_has_its_words_and_a_status_for_callers() -> None:
    assert set(_DETAIL) == set(Reason)
    assert _CODE.keys() < set(Reason)
    assert {AuthError(reason).http_status for reason in Reason} == {401, 403, 503}


def test_an_unavailable_issuer_is_not_blamed_on_the_token() -> None:
    error = AuthError(Reason.KEYS_UNAVAILABLE, retry_after_s=7)
    assert (error.code, error.retry_after_s, error.transient) == (Code.AUTH_UNAVAILABLE, 7, True)
    assert error.www_authenticate is None
