"""The daemon's three doors: the API, the operator's socket, and the one for who watches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from http import HTTPStatus
from pathlib import Path

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from gpud import config
from gpud.errors import Code, GpudError
from gpud.watch.health import Problems

_BACKLOG = 128
"""Also how many connections are let in at once, before the next look at how many there are."""

_log = structlog.get_logger()

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _WithoutValues(logging.Filter):
    """Says that a request failed below the routes, not with what: aiohttp quotes the line it could
    not read, and that may be the one with the token.
    """  # noqa: D205 - one sentence

    def filter(self, record: logging.LogRecord) -> bool:
        """Log the kind of the error, and stop the record."""
        error = record.exc_info[1] if record.exc_info else None
        _log.info("request could not be read", error=type(error).__name__)
        return False


_http_log = logging.getLogger("gpud.http")
_http_log.addFilter(_WithoutValues())


async def api(
    stack: AsyncExitStack, server: config.Server, tls: ssl.SSLContext | None, app: web.Application
) -> None:
    """Open the API's listener until ``stack`` unwinds; requests under way then get their time.

    Raises:
        GpudError: ``CONFIG_INVALID``: the address or port cannot be had.
    """
    crowd = _Crowd(_most_connections())
    app.middlewares.insert(0, crowd.watch)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_http_log,
        keepalive_timeout=server.keepalive_timeout_s,
        shutdown_timeout=server.shutdown_timeout_s,
    )
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        listening = await asyncio.get_running_loop().create_server(
            partial(crowd.admit, runner),
            server.listen,
            server.port,
            ssl=tls,
            backlog=_BACKLOG,
        )
    except OSError as error:
        raise _taken("server", server.listen, server.port, error) from error
    stack.callback(listening.close)


async def metrics(
    stack: AsyncExitStack,
    where: config.Metrics,
    page: Callable[[], Awaitable[bytes]],
    alive: Callable[[], Awaitable[Problems]],
    ready: Callable[[], Awaitable[Problems]],
) -> None:
    """Open the listener for Prometheus and for health checks until ``stack`` unwinds.

    Args:
        stack: Closes it.
        where: Address and port.
        page: Makes ``/metrics``.
        alive: What is wrong, for ``/healthz``: 200 for nothing, 503 for anything.
        ready: Likewise for ``/readyz``.

    Raises:
        GpudError: ``CONFIG_INVALID``: the address or port cannot be had.
    """

    async def scrape(_: web.Request) -> web.Response:
        headers = {"Content-Type": CONTENT_TYPE_PLAIN_0_0_4}
        return web.Response(body=await page(), headers=headers)

    async def healthz(_: web.Request) -> web.Response:
        return _verdict(await alive())

    async def readyz(_: web.Request) -> web.Response:
        return _verdict(await ready())

    app = web.Application()
    app.add_routes(
        [web.get("/metrics", scrape), web.get("/healthz", healthz), web.get("/readyz", readyz)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, where.listen, where.port).start()
    except OSError as error:
        raise _taken("metrics", where.listen, where.port, error) from error


async def admin(stack: AsyncExitStack, path: Path, app: web.Application) -> None:
    """Open the operator's socket until ``stack`` unwinds: for the daemon's user and group alone.

    Raises:
        GpudError: ``CONFIG_INVALID``: the socket cannot be made there.
    """
    # Without cancellation, who follows a silent console and goes away would be served for ever.
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    listener = _unix_socket(path)
    stack.callback(_remove_socket, path)
    await web.SockSite(runner, listener).start()


def _most_connections() -> int:
    """A quarter of the process' file descriptors; the others are for disks, seeds and children."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 4)


class _Crowd:
    """Bounds how many connections there are. One too many costs the oldest idle ones their place: a
    crowd that says nothing keeps nobody out who has something to say.
    """  # noqa: D205 - two sentences

    def __init__(self, most: int) -> None:
        self._most = most
        self._busy: set[asyncio.BaseProtocol] = set()

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note on which connections a request is under way."""
        self._busy.add(request.protocol)
        try:
            return await handler(request)
        finally:
            self._busy.discard(request.protocol)

    def admit(self, runner: web.AppRunner) -> asyncio.Protocol:
        """Let one more in.

        Raises:
            ConnectionError: The listener is being closed.
        """
        server = runner.server
        if server is None:
            raise ConnectionError("the listener is being closed")
        connections = server.connections
        if (too_many := len(connections) + 1 - self._most) > 0:
            idle = [one for one in connections if one not in self._busy]
            for oldest in idle[:too_many]:
                oldest.force_close()
        return server()


def _remove_socket(path: Path) -> None:
    with contextlib.suppress(OSError):  # the next daemon removes it too: no reason to end badly
        path.unlink()


def _unix_socket(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Of an earlier daemon; the state's lock tells that it no longer runs.
        if path.is_socket():
            path.unlink()
        listener.bind(str(path))
        path.chmod(0o660)
    except OSError as error:
        listener.close()
        raise GpudError(
            Code.CONFIG_INVALID,
            f"admin_socket: {path} cannot be made: {error.strerror or error}",
            hint="its path must be free, and has at most 107 characters",
        ) from error
    return listener


def _taken(section: str, listen: str, port: int, error: OSError) -> GpudError:
    return GpudError(
        Code.CONFIG_INVALID,
        f"{section}: {listen} port {port} cannot be listened on: {error.strerror}",
    )


def _verdict(problems: Problems) -> web.Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    return web.json_response({"problems": dict(problems)}, status=status)
