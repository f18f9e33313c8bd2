"""More callers than there is room for."""

from __future__ import annotations

import asyncio
import resource
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web

from gpud import config, listeners
from tests.machine.processes import free_port

Connect = Callable[[], Awaitable[asyncio.StreamReader]]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def go_on() -> asyncio.Event:
    return asyncio.Event()


@pytest.fixture
async def connect(
    port: int, go_on: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Connect]:
    """Open a listener with room for four connections, and connect to it."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    writers: list[asyncio.StreamWriter] = []

    async def hold(_: web.Request) -> web.Response:
        await go_on.wait()
        return web.Response(text="held")

    async def open_one() -> asyncio.StreamReader:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        await asyncio.sleep(0.005)
        return reader

    app = web.Application()
    app.router.add_get("/", hold)
    async with AsyncExitStack() as stack:
        await listeners.api(stack, config.Server(listen="127.0.0.1", port=port), None, app)
        yield open_one
        for writer in writers:
            writer.close()


async def test_the_oldest_silent_connections_give_way(connect: Connect) -> None:
    silent = [await connect() for _ in range(7)]
    ended = [reader.at_eof() for reader in silent]
    assert ended == [True] * 3 + [False] * 4


async def test_a_request_under_way_is_not_cut(
    connect: Connect, port: int, go_on: asyncio.Event
) -> None:
    async with aiohttp.ClientSession() as session:
        asking = asyncio.ensure_future(session.get(f"http://127.0.0.1:{port}/"))
        await asyncio.sleep(0.02)
        silent = [await connect() for _ in range(8)]
        go_on.set()
        async with await asking as answer:
            assert await answer.text() == "held"
    assert silent[0].at_eof()


async def test_nobody_is_let_in_any_more_at_the_end() -> None:
    runner = web.AppRunner(web.Application())
    with pytest.raises(ConnectionError):
        listeners._Crowd(1).admit(runner)


def test_without_a_limit_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert listeners._most_connections() == sys.maxsize
