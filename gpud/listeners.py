"""The daemon's three doors: the API, the operator's socket, and the one for who watches it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from http import HTTPStatus
from pathlib import Path

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from gpud import config
from gpud.api.auth_token import MAX_HEADER_CHARS
from gpud.api.gate import new_request_id
from gpud.api.problem import problem
from gpud.crowd import Crowd
from gpud.errors import Code, GpudError
from gpud.watch.health import Problems

_BACKLOG = 128
_FIELD_BYTES = 2 * MAX_HEADER_CHARS
"""Of one header. What is longer cannot be read; a token that is too long is one that is refused."""

_log = structlog.get_logger()


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


class _Handler(web.RequestHandler):
    """Answers also what cannot be read as everything else is answered, and without quoting it."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Log the error and make the answer; aiohttp's own would repeat the header at fault."""
        super().handle_error(request, status, exc, message)
        if status == HTTPStatus.INTERNAL_SERVER_ERROR:
            error = GpudError(Code.INTERNAL, "internal")
        else:
            error = GpudError(Code.INVALID_REQUEST, "the request is no HTTP that can be read")
        request_id = new_request_id()
        response = problem(error, request_id)
        response.headers["X-Request-Id"] = request_id
        response.force_close()
        return response


async def api(
    stack: AsyncExitStack, server: config.Server, tls: ssl.SSLContext | None, app: web.Application
) -> Crowd:
    """Open the API's listener until ``stack`` unwinds; requests under way then get their time.

    Returns:
        Its connections.

    Raises:
        GpudError: ``CONFIG_INVALID``: the address or port cannot be had.
    """
    crowd = Crowd(server, tls)
    app.middlewares.insert(0, crowd.watch)
    runner = web.AppRunner(app, shutdown_timeout=server.shutdown_timeout_s)
    await runner.setup()
    assert runner.server is not None  # noqa: S101 - it has just been set up
    new_handler = partial(
        _Handler,
        runner.server,
        loop=asyncio.get_running_loop(),
        access_log=None,  # type: ignore[arg-type]  # as `AppRunner` passes it for none
        logger=_http_log,
        keepalive_timeout=server.keepalive_timeout_s,
        max_field_size=_FIELD_BYTES,
    )
    stack.push_async_callback(crowd.close)
    stack.push_async_callback(runner.cleanup)
    for listener in await _listen(server):
        stack.callback(crowd.dismiss, listener)
        crowd.welcome(listener, new_handler)
    return crowd


async def _listen(server: config.Server) -> list[socket.socket]:
    """A listening socket for each address that ``server.listen`` stands for."""
    listeners = []
    with ExitStack() as opened:
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                server.listen, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            for family, _, _, _, address in dict.fromkeys(found):
                listener = socket.create_server(address, family=family, backlog=_BACKLOG)
                listeners.append(opened.enter_context(listener))
                listener.setblocking(False)  # noqa: FBT003 - the signature of a socket
        except OSError as error:
            raise _taken("server", server.listen, server.port, error) from error
        opened.pop_all()
    return listeners


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
        transient=True,  # an address may come up later, and a port become free
    )


def _verdict(problems: Problems) -> web.Response:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    return web.json_response({"problems": dict(problems)}, status=status)
