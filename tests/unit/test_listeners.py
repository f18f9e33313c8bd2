"""The daemon's doors, opened for real on loopback and in a directory."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import socket
import ssl
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from structlog.testing import capture_logs

from gpud import config, listeners
from gpud.api.tls import certificate_expires_at, tls_context
from gpud.errors import Code, GpudError
from tests.unit.certificates import Tls


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def server(free_port: int) -> config.Server:
    return config.Server(listen="127.0.0.1", port=free_port)


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def application(handler: Any) -> web.Application:
    app = web.Application()
    app.router.add_get("/", handler)
    return app


async def hello(_: web.Request) -> web.Response:
    return web.Response(text="hello")


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return Tls(tmp_path)


async def test_the_api_is_served_over_tls(
    server: config.Server, tls: Tls, session: aiohttp.ClientSession
) -> None:
    files = tls.write("server")
    trusting = ssl.create_default_context(cafile=str(files.certificate_file))
    async with AsyncExitStack() as stack:
        await listeners.api(stack, server, tls_context(files), application(hello))
        url = f"https://127.0.0.1:{server.port}/"
        async with session.get(url, ssl=trusting, server_hostname="localhost") as response:
            assert await response.text() == "hello"
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{server.port}/")


async def test_old_tls_is_not_spoken(tls: Tls) -> None:
    assert tls_context(tls.write("server")).minimum_version is ssl.TLSVersion.TLSv1_2


def mismatched(tls: Tls) -> config.Tls:
    return tls.write("one").model_copy(update={"key_file": tls.write("two").key_file})


def missing(tls: Tls) -> config.Tls:
    files = tls.write("one")
    files.key_file.unlink()
    return files


def garbage(tls: Tls) -> config.Tls:
    files = tls.write("one")
    files.certificate_file.write_text("hunter2")
    return files


def missing_certificate(tls: Tls) -> config.Tls:
    files = tls.write("one")
    files.certificate_file.unlink()
    return files


def swapped(tls: Tls) -> config.Tls:
    files = tls.write("one")
    return config.Tls(certificate_file=files.key_file, key_file=files.certificate_file)


def encrypted(tls: Tls) -> config.Tls:
    return tls.write("one", password=b"hunter2")


@pytest.mark.parametrize("spoil", [mismatched, missing, garbage, swapped, encrypted])
def test_unusable_tls_files_are_refused_by_name(
    tls: Tls, spoil: Callable[[Tls], config.Tls]
) -> None:
    files = spoil(tls)
    with pytest.raises(GpudError, match=r"server\.tls") as refused:
        tls_context(files)
    assert refused.value.code is Code.CONFIG_INVALID
    assert str(files.key_file) in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_the_expiry_of_the_certificate_is_known(tls: Tls) -> None:
    left_s = certificate_expires_at(tls.write("server")) - dt.datetime.now(dt.UTC).timestamp()
    assert 3500 < left_s < 3600


@pytest.mark.parametrize("spoil", [missing_certificate, garbage])
def test_a_certificate_that_cannot_be_read_is_named(
    tls: Tls, spoil: Callable[[Tls], config.Tls]
) -> None:
    files = spoil(tls)
    with pytest.raises(GpudError, match=r"server\.tls") as refused:
        certificate_expires_at(files)
    assert str(files.certificate_file) in str(refused.value)
    assert "hunter2" not in str(refused.value)


async def test_a_port_that_is_taken_is_named(server: config.Server) -> None:
    async with AsyncExitStack() as stack:
        await listeners.api(stack, server, None, application(hello))
        with pytest.raises(GpudError, match=f"server: 127.0.0.1 port {server.port}") as refused:
            await listeners.api(stack, server, None, application(hello))
    assert refused.value.code is Code.CONFIG_INVALID


async def test_a_request_under_way_is_finished_at_the_end(
    server: config.Server, session: aiohttp.ClientSession
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        asked.set()
        await answer.wait()
        return web.Response(text="done")

    url = f"http://127.0.0.1:{server.port}/"
    stack = AsyncExitStack()
    await listeners.api(stack, server, None, application(slow))
    request = asyncio.create_task(session.get(url))
    await asked.wait()
    closing = asyncio.create_task(stack.aclose())
    while True:  # until the listener is gone
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        except ConnectionError:
            break
        writer.close()
    assert not closing.done()
    answer.set()
    async with await request as response:
        assert await response.text() == "done"
    await closing


async def test_a_request_that_does_not_end_is_cut_off(
    free_port: int, session: aiohttp.ClientSession
) -> None:
    asked = asyncio.Event()

    async def endless(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError

    server = config.Server(listen="127.0.0.1", port=free_port, shutdown_timeout_s=0.02)
    stack = AsyncExitStack()
    await listeners.api(stack, server, None, application(endless))
    request = asyncio.create_task(session.get(f"http://127.0.0.1:{free_port}/"))
    await asked.wait()
    await stack.aclose()
    with pytest.raises(aiohttp.ClientError):
        await request


async def test_a_request_that_cannot_be_read_is_not_quoted_in_the_log(
    server: config.Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with AsyncExitStack() as stack:
        await listeners.api(stack, server, None, application(hello))
        with capture_logs() as logs:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer hunter2\0\r\n\r\n")
            assert (await reader.read()).startswith(b"HTTP/1.0 400 ")
            writer.close()
    assert "hunter2" not in f"{logs} {caplog.text}"
    assert logs == [
        {"event": "request could not be read", "error": "BadHttpMessage", "log_level": "info"}
    ]


async def nothing() -> dict[str, str]:
    return {}


async def test_prometheus_gets_the_page_as_it_is_made(
    free_port: int, session: aiohttp.ClientSession
) -> None:
    made: list[bytes] = []

    async def page() -> bytes:
        made.append(b"gpud_libvirt_up %d.0\n" % len(made))
        return made[-1]

    where = config.Metrics(listen="127.0.0.1", port=free_port)
    async with AsyncExitStack() as stack:
        await listeners.metrics(stack, where, page, nothing, nothing)
        for number in range(2):
            async with session.get(f"http://127.0.0.1:{free_port}/metrics") as response:
                assert await response.text() == f"gpud_libvirt_up {number}.0\n"
                assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        with pytest.raises(GpudError, match=r"metrics: 127\.0\.0\.1 port"):
            await listeners.metrics(stack, where, page, nothing, nothing)


async def test_health_checks_name_what_is_not_well(
    free_port: int, session: aiohttp.ClientSession
) -> None:
    problems: dict[str, str] = {}

    async def ready() -> dict[str, str]:
        return problems

    async def page() -> bytes:
        raise AssertionError

    async def ask(path: str) -> tuple[int, object]:
        async with session.get(f"http://127.0.0.1:{free_port}/{path}") as response:
            return response.status, await response.json()

    where = config.Metrics(listen="127.0.0.1", port=free_port)
    async with AsyncExitStack() as stack:
        await listeners.metrics(stack, where, page, nothing, ready)
        assert await ask("readyz") == (200, {"problems": {}})
        problems["libvirt"] = "is not connected"
        assert await ask("readyz") == (503, {"problems": problems})
        assert await ask("healthz") == (200, {"problems": {}})


async def test_the_admin_socket_is_for_the_user_and_the_group_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpud.sock"
    async with AsyncExitStack() as stack:
        await listeners.admin(stack, path, application(hello))
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        connector = aiohttp.UnixConnector(str(path))
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            session.get("http://gpud/") as response,
        ):
            assert await response.text() == "hello"
    assert not path.exists()


async def test_an_admin_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "gpud.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with AsyncExitStack() as stack:
        await listeners.admin(stack, path, application(hello))
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.close()
        await writer.wait_closed()


async def test_an_operator_who_goes_away_keeps_nothing_running(tmp_path: Path) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    async def follow(_: web.Request) -> web.Response:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    path = tmp_path / "gpud.sock"
    async with AsyncExitStack() as stack:
        await listeners.admin(stack, path, application(follow))
        _, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET / HTTP/1.1\r\nHost: gpud\r\n\r\n")
        await began.wait()
        writer.close()
        await writer.wait_closed()
        async with asyncio.timeout(5):
            await ended.wait()


@pytest.mark.parametrize("name", ["missing/gpud.sock", "long" * 50, "."])
async def test_an_admin_socket_that_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    async with AsyncExitStack() as stack:
        with pytest.raises(GpudError, match="admin_socket") as refused:
            await listeners.admin(stack, tmp_path / name, application(hello))
    assert refused.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer hunter2\0x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer " + b"hunter2" * 9000 + b"\r\n\r\n",
        b"hunter2\r\n\r\n",
    ],
    ids=["a NUL", "too long", "no HTTP"],
)
async def test_what_cannot_be_read_is_answered_like_all_else_and_not_quoted(
    server: config.Server, request_head: bytes
) -> None:
    async with AsyncExitStack() as stack:
        await listeners.api(stack, server, None, application(hello))
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request_head)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.startswith((b"HTTP/1.1 400 ", b"HTTP/1.0 400 "))
    assert b"application/problem+json" in head
    told = json.loads(body)
    assert f"X-Request-Id: {told['request_id']}".encode() in head
    assert told["code"] == "invalid_request"
    assert b"hunter2" not in head + body


async def test_a_token_of_sixteen_thousand_characters_is_read(
    server: config.Server, session: aiohttp.ClientSession
) -> None:
    async def length(request: web.Request) -> web.Response:
        return web.Response(text=str(len(request.headers["Authorization"])))

    async with AsyncExitStack() as stack:
        await listeners.api(stack, server, None, application(length))
        headers = {"Authorization": "B" * 16_384}
        async with session.get(f"http://127.0.0.1:{server.port}/", headers=headers) as response:
            assert await response.text() == "16384"
