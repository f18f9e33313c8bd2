"""Whether the API is reached by the name that GPU.ai was given."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gpud.api.web import openapi_document
from gpud.config import Server
from gpud.doctor.check import Level, Verdict
from gpud.doctor.reach import reach
from tests.unit.doctor.parts import free_port


async def document(_: web.Request) -> web.Response:
    return web.Response(body=openapi_document())


async def other(_: web.Request) -> web.Response:
    return web.Response(status=502, text="<html>Bad Gateway</html>")


@pytest.fixture
async def proxy() -> AsyncIterator[TestServer]:
    """What stands where GPU.ai calls."""
    app = web.Application()
    app.router.add_get("/openapi.yaml", document)
    app.router.add_get("/elsewhere/openapi.yaml", other)
    server = TestServer(app)
    async with server:
        yield server


async def found(url: str, *, daemon_up: bool = True) -> Verdict:
    (only,) = await reach(Server(public_url=url), daemon_up=daemon_up)
    return only


async def test_without_a_url_nothing_is_said() -> None:
    assert await reach(Server(), daemon_up=True) == []


@pytest.mark.parametrize("ending", ["", "/"])
async def test_a_url_that_leads_to_the_daemon_is_well(proxy: TestServer, ending: str) -> None:
    assert (await found(str(proxy.make_url("")).rstrip("/") + ending)).level is Level.OK


async def test_a_url_that_leads_elsewhere_is_a_fault(proxy: TestServer) -> None:
    said = await found(str(proxy.make_url("/elsewhere")))
    assert said.level is Level.FAULT
    assert "answers 502, and not with gpud's document" in said.what


async def test_a_url_that_leads_nowhere_is_a_fault_that_tells_no_password() -> None:
    said = await found(f"http://me:hunter2@127.0.0.1:{free_port()}")
    assert said.level is Level.FAULT
    assert "Cannot connect" in said.what
    assert "curl -sS http://127.0.0.1:" in said.mend
    assert "hunter2" not in str(said)


async def test_while_no_daemon_runs_the_url_is_not_asked_for() -> None:
    assert (await found("https://gpu.example.com", daemon_up=False)).level is Level.NOTE
