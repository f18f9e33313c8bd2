"""Whom a request is taken to come from."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from gpud.api.origin import Origin, origin_of, parse_address
from gpud.config import Server

PROXY = "10.0.0.1"
FAR_PROXY = "192.0.2.7"
CALLER = "203.0.113.9"
ANYBODY = "198.51.100.66"


def server(header: str = "x-forwarded-for") -> Server:
    settings = {"trusted_proxies": ["10.0.0.0/8", FAR_PROXY, "fd00::/8"], "proxy_header": header}
    return Server.model_validate(settings, strict=False)


def origin(peer: object, *headers: tuple[str, str], header: str = "x-forwarded-for") -> str:
    """The address and scheme of a request, as ``http://1.2.3.4``."""
    transport = Mock()
    transport.get_extra_info = lambda name: peer if name == "peername" else None
    request = make_mocked_request("GET", "/", CIMultiDict(headers), transport=transport)
    found = origin_of(request, server(header))
    return f"{found.scheme}://{found.address}"


def forwarded_for(text: str) -> tuple[str, str]:
    return ("X-Forwarded-For", text)


def test_without_a_proxy_it_is_the_peer() -> None:
    assert origin((CALLER, 1)) == f"http://{CALLER}"
    assert origin(("2001:db8::1", 1, 0, 0)) == "http://2001:db8::1"
    assert origin(("::ffff:203.0.113.9", 1, 0, 0)) == f"http://{CALLER}"
    assert origin("") == "http://None", "a Unix socket has no address"
    assert origin(None) == "http://None"


def test_anybody_may_claim_anything_and_is_not_believed() -> None:
    claims = [forwarded_for(CALLER), ("X-Forwarded-Proto", "https"), ("Forwarded", f"for={CALLER}")]
    assert origin((ANYBODY, 1), *claims) == f"http://{ANYBODY}"
    assert origin((ANYBODY, 1), *claims, header="forwarded") == f"http://{ANYBODY}"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], PROXY),
        ([CALLER], CALLER),
        ([f"{CALLER}:4711"], CALLER),
        (["2001:db8::1"], "2001:db8::1"),
        (["[2001:db8::1]:4711"], "2001:db8::1"),
        ([f"{ANYBODY}, {CALLER}"], CALLER),
        ([ANYBODY, CALLER], CALLER),
        ([f"{ANYBODY}, {CALLER}, {FAR_PROXY}"], CALLER),
        ([f"{CALLER}, {FAR_PROXY}, 10.3.3.3"], CALLER),
        ([f"{FAR_PROXY}"], FAR_PROXY),
        ([f"{ANYBODY}, nonsense"], PROXY),
        ([f"{ANYBODY}, unknown, {FAR_PROXY}"], FAR_PROXY),
        ([f"{ANYBODY},"], PROXY),
        ([""], PROXY),
        (["1.2.3.4.5"], PROXY),
    ],
)
def test_what_a_trusted_proxy_says_is_read_from_its_end(lines: list[str], found: str) -> None:
    assert origin((PROXY, 1), *map(forwarded_for, lines)) == f"http://{found}"


@pytest.mark.parametrize(
    ("said", "scheme"),
    [("https", "https"), ("HTTP", "http"), ("gopher", "http"), ("http, https", "https")],
)
def test_a_proxy_says_how_its_caller_came(said: str, scheme: str) -> None:
    assert origin((PROXY, 1), forwarded_for(CALLER), ("X-Forwarded-Proto", said)) == (
        f"{scheme}://{CALLER}"
    )


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], f"http://{PROXY}"),
        ([f"for={CALLER};proto=https;by={PROXY}"], f"https://{CALLER}"),
        ([f'for="{CALLER}:80"'], f"http://{CALLER}"),
        (['For="[2001:db8::1]:4711";Proto=HTTPS'], "https://2001:db8::1"),
        ([f"for={ANYBODY}, for={CALLER}"], f"http://{CALLER}"),
        ([f"for={ANYBODY}", f"for={CALLER};proto=https"], f"https://{CALLER}"),
        ([f"for={CALLER}, for={FAR_PROXY};proto=https"], f"https://{CALLER}"),
        (["for=_hidden"], f"http://{PROXY}"),
        (["for=unknown"], f"http://{PROXY}"),
        (["proto=https"], f"http://{PROXY}"),
        ([f'for="{ANYBODY}, for={CALLER}'], f"http://{CALLER}"),
        ([f'for="{ANYBODY}, for="[2001:db8::1]"'], f"http://{PROXY}"),
        ([f"for={ANYBODY};;=, for={CALLER}"], f"http://{CALLER}"),
    ],
)
def test_forwarded_is_read_from_its_end(lines: list[str], found: str) -> None:
    headers = [("Forwarded", line) for line in lines]
    assert origin((PROXY, 1), *headers, header="forwarded") == found


def test_the_header_that_the_proxy_does_not_set_is_the_callers_own() -> None:
    mine, others = forwarded_for(CALLER), ("Forwarded", f"for={ANYBODY}")
    assert origin((PROXY, 1), mine, others) == f"http://{CALLER}"
    assert origin((PROXY, 1), others) == f"http://{PROXY}"
    assert origin((PROXY, 1), mine, others, header="forwarded") == f"http://{ANYBODY}"


@given(st.lists(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"))))
def test_no_header_can_make_it_fail(lines: list[str]) -> None:
    for header, name in (("x-forwarded-for", "X-Forwarded-For"), ("forwarded", "Forwarded")):
        assert origin((PROXY, 1), *((name, line) for line in lines), header=header)


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0")))
def test_nobody_can_hide_behind_what_he_began_the_header_with(begun: str) -> None:
    found = origin((PROXY, 1), forwarded_for(f"{begun}, {CALLER}"))
    assert found == f"http://{CALLER}"


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0")))
def test_a_begun_forwarded_header_hides_no_more_than_the_address(begun: str) -> None:
    found = origin((PROXY, 1), ("Forwarded", f"{begun}, for={CALLER}"), header="forwarded")
    assert found in {f"http://{CALLER}", f"http://{PROXY}"}


@pytest.mark.parametrize(
    ("address", "site"),
    [
        (CALLER, CALLER),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_an_ipv6_host_is_its_whole_network(address: str, site: str) -> None:
    assert Origin(parse_address(address), "http").site == site


def test_what_is_no_address_is_none() -> None:
    texts: list[Any] = ["", "unknown", "_x", "1.2.3", "[::1", "[", "]", "a:b:c", "1.2.3.4:x:y"]
    assert [text for text in texts if parse_address(text) is not None] == ["[::1"]
