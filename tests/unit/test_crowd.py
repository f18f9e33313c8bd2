"""More callers than there is room for, and callers who take their time."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from structlog.testing import capture_logs

from gpud import config, crowd, listeners
from gpud.api.tls import Certificate
from gpud.crowd import Crowd
from tests.machine.processes import free_port
from tests.unit.certificates import Tls


@dataclass
class Door:
    """An open listener, and those who came."""

    port: int
    crowd: Crowd
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def connect(self, sent: bytes = b"") -> asyncio.StreamReader:
        """Come, say something, and see that it is heard."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(sent)
        await asyncio.sleep(0.005)
        return reader

    async def emptied(self) -> None:
        """Wait until nobody is there any more."""
        while self.crowd._visitors:
            await asyncio.sleep(0.001)

    def leave(self) -> None:
        """Everybody goes."""
        for writer in self.writers:
            writer.close()


OpenDoor = Callable[..., Awaitable[Door]]

LARGE = 16 * 2**20
ASKING = b"GET / HTTP/1.1\r\nHost: gpud\r\n\r\n"


@pytest.fixture
async def open_door() -> AsyncIterator[OpenDoor]:
    """Open a listener; who asks there waits for ``go_on``."""
    async with AsyncExitStack() as stack:

        async def start(tls: ssl.SSLContext | None = None, **changes: Any) -> Door:
            async def hold(_: web.Request) -> web.Response:
                await door.go_on.wait()
                return web.Response(text="held")

            async def large(_: web.Request) -> web.Response:
                return web.Response(body=bytes(LARGE))

            app = web.Application()
            app.router.add_get("/", hold)
            app.router.add_get("/large", large)
            port = free_port()
            server = config.Server(listen="127.0.0.1", port=port, shutdown_timeout_s=0.5, **changes)
            door = Door(port, await listeners.api(stack, server, tls, app))
            stack.callback(door.go_on.set)
            stack.callback(door.leave)
            return door

        yield start


@pytest.fixture
def room_for_four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the connection was closed; it may take a moment to be seen."""
    try:
        async with asyncio.timeout(0.05):
            return await reader.read() == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False


@pytest.mark.usefixtures("room_for_four")
async def test_the_oldest_silent_connections_give_way(open_door: OpenDoor) -> None:
    door = await open_door()
    silent = [await door.connect() for _ in range(7)]
    assert [await ended(reader) for reader in silent] == [True] * 3 + [False] * 4


@pytest.mark.usefixtures("room_for_four")
async def test_a_request_under_way_is_not_cut(open_door: OpenDoor) -> None:
    door = await open_door()
    async with aiohttp.ClientSession() as session:
        asking = asyncio.ensure_future(session.get(door.url))
        await asyncio.sleep(0.02)
        silent = [await door.connect() for _ in range(8)]
        door.go_on.set()
        async with await asking as answer:
            assert await answer.text() == "held"
    assert await ended(silent[0])


@pytest.mark.usefixtures("room_for_four")
async def test_where_all_are_busy_one_more_is_turned_away(open_door: OpenDoor) -> None:
    door = await open_door()
    busy = [await door.connect(ASKING) for _ in range(4)]
    assert await ended(await door.connect(ASKING))
    door.go_on.set()
    for reader in busy:
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(("descriptors", "per_address"), [(256, 256), (100_000, 64)])
async def test_a_request_that_is_there_is_read_before_its_connection_can_give_way(
    open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch, descriptors: int, per_address: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (descriptors, descriptors))
    door = await open_door(max_connections_per_address=per_address)
    door.go_on.set()
    with ExitStack() as stack:
        asking, *_ = [  # all before the loop turns: it finds them waiting
            stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
            for _ in range(120)
        ]
        asking.sendall(ASKING)
        asking.setblocking(False)
        answer = await asyncio.get_running_loop().sock_recv(asking, 1000)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


async def test_one_address_has_only_so_many(open_door: OpenDoor) -> None:
    door = await open_door(max_connections_per_address=2)
    silent = [await door.connect() for _ in range(4)]
    assert [await ended(reader) for reader in silent] == [True] * 2 + [False] * 2


async def test_a_proxy_has_as_many_as_it_likes(open_door: OpenDoor) -> None:
    loopback = IPv4Network("127.0.0.0/8")
    door = await open_door(max_connections_per_address=1, trusted_proxies=[loopback])
    silent = [await door.connect() for _ in range(4)]
    assert not any([await ended(reader) for reader in silent])


async def test_an_address_that_went_away_is_forgotten(open_door: OpenDoor) -> None:
    door = await open_door()
    await door.connect()
    assert len(door.crowd._by_site) == 1
    door.writers[0].close()
    async with asyncio.timeout(5):
        while door.crowd._by_site or door.crowd._by_handler:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost:", b"\x16\x03\x01"])
async def test_who_takes_too_long_to_ask_is_cut_off(open_door: OpenDoor, sent: bytes) -> None:
    door = await open_door(header_timeout_s=0.03)
    slow = await door.connect(sent)
    async with asyncio.timeout(5):
        assert b"held" not in await slow.read()
        await door.emptied()


async def test_who_has_asked_may_wait_for_the_answer(open_door: OpenDoor) -> None:
    door = await open_door(header_timeout_s=0.02)
    asking = await door.connect(ASKING)
    await asyncio.sleep(0.05)
    door.go_on.set()
    assert await asking.readline() == b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"\x16\x03\x01\x02\x00\x01"], ids=["nothing", "the beginning"]
)
async def test_a_handshake_that_takes_too_long_is_cut_off(
    open_door: OpenDoor, tmp_path: Path, sent: bytes
) -> None:
    tls = Certificate.read(Tls(tmp_path).write("server")).context
    door = await open_door(tls, header_timeout_s=0.03)
    slow = await door.connect(sent)
    assert len(door.crowd._visitors) == 1, "it counts from the beginning"
    async with asyncio.timeout(5):
        await slow.read()
        await door.emptied()


async def test_no_tls_where_tls_is_spoken_costs_nobody_anything(
    open_door: OpenDoor, tmp_path: Path
) -> None:
    tls = Certificate.read(Tls(tmp_path).write("server")).context
    door = await open_door(tls)
    async with asyncio.timeout(5):
        assert b"HTTP" not in await (await door.connect(ASKING)).read()
        await door.emptied()


async def test_connections_leave_no_descriptor_behind(open_door: OpenDoor, tmp_path: Path) -> None:
    tls = Certificate.read(Tls(tmp_path).write("server")).context
    door = await open_door(tls, max_connections_per_address=1)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(20):
        await door.connect(b"\x16\x03\x01\x02")
    for writer in door.writers:
        writer.close()
    async with asyncio.timeout(5):
        while len(os.listdir("/proc/self/fd")) > before:  # noqa: PTH208
            await asyncio.sleep(0.001)


async def test_when_descriptors_run_out_callers_wait(
    open_door: OpenDoor, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = await open_door()
    door.go_on.set()
    monkeypatch.setattr(crowd, "_ACCEPT_AGAIN_S", 0.03)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    next_one = os.dup(0)
    os.close(next_one)
    with capture_logs() as logs:
        try:  # the caller's own end gets the last one
            resource.setrlimit(resource.RLIMIT_NOFILE, (next_one + 1, limits[1]))
            waiting = await door.connect(ASKING)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert await waiting.readline() == b"HTTP/1.1 200 OK\r\n"
    assert [log["error"] for log in logs] == ["Too many open files"]


async def test_an_answer_waits_for_who_reads_slowly(open_door: OpenDoor) -> None:
    door = await open_door()
    door.go_on.set()
    slow = await door.connect(ASKING.replace(b"/ ", b"/large "))
    await asyncio.sleep(0.01)
    head = await slow.readuntil(b"\r\n\r\n")
    assert b"200 OK" in head
    assert len(await slow.readexactly(LARGE)) == LARGE


async def test_a_request_of_a_connection_that_was_cut_is_not_begun(open_door: OpenDoor) -> None:
    async def never(_: web.Request) -> web.Response:
        raise AssertionError

    door = await open_door()
    with pytest.raises(ConnectionResetError):
        await door.crowd.watch(make_mocked_request("GET", "/"), never)


async def test_a_new_certificate_is_for_new_connections(
    open_door: OpenDoor, tmp_path: Path
) -> None:
    first, second = Tls(tmp_path).write("first"), Tls(tmp_path).write("second")
    door = await open_door(Certificate.read(first).context)
    door.go_on.set()

    def trusting(files: config.Tls) -> aiohttp.TCPConnector:
        context = ssl.create_default_context(cafile=str(files.certificate_file))
        return aiohttp.TCPConnector(ssl=context)

    url = f"https://localhost:{door.port}/"
    async with (
        aiohttp.ClientSession(connector=trusting(first)) as old,
        aiohttp.ClientSession(connector=trusting(second)) as new,
    ):
        async with old.get(url) as answer:
            assert answer.status == 200
        server = config.Server(listen="127.0.0.1", port=door.port)
        door.crowd.reconfigure(server, Certificate.read(second).context)
        async with old.get(url) as answer:  # over the connection that it has
            assert answer.status == 200
        async with new.get(url) as answer:
            assert answer.status == 200
        door.crowd.reconfigure(server, None)
        async with aiohttp.ClientSession() as plain, plain.get(door.url) as answer:
            assert answer.status == 200


async def test_a_listener_that_is_closed_in_a_pause_stays_closed(open_door: OpenDoor) -> None:
    door = await open_door()
    (listener,) = await listeners._listen(config.Server(listen="127.0.0.1", port=free_port()))
    door.crowd.dismiss(listener)
    door.crowd.welcome(listener, web.Server(lambda _: None))  # type: ignore[arg-type, return-value]


def test_without_a_limit_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: unlimited)
    assert crowd.most_connections() == sys.maxsize
