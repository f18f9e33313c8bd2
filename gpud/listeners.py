"""The daemon's three doors: the API, the operator's socket, and Prometheus' page."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from gpud import config
from gpud.errors import Code, GpudError
from gpud.telemetry import Metrics

_BACKLOG = 1024

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


async def api(
    stack: AsyncExitStack, server: config.Server, tls: ssl.SSLContext | None, app: web.Application
) -> None:
    """Open the API's listener until ``stack`` unwinds; requests under way then get their time.

    Raises:
        GpudError: ``CONFIG_INVALID``: the address or port cannot be had.
    """
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=_http_log,
        keepalive_timeout=server.keepalive_timeout_s,
        shutdown_timeout=server.shutdown_timeout_s,
    )
    site = await _prepared(stack, runner, server.listen, server.port, tls)
    await _start(site, f"server: {server.listen} port {server.port}")


async def metrics(
    stack: AsyncExitStack, where: config.Metrics, page: Metrics, update: Callable[[], None]
) -> None:
    """Open Prometheus' listener until ``stack`` unwinds; ``update`` is called before each scrape.

    Raises:
        GpudError: ``CONFIG_INVALID``: the address or port cannot be had.
    """

    async def scrape(_: web.Request) -> web.Response:
        update()
        body = generate_latest(page.registry)
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.router.add_get("/metrics", scrape)
    runner = web.AppRunner(app, access_log=None)
    site = await _prepared(stack, runner, where.listen, where.port, None)
    await _start(site, f"metrics: {where.listen} port {where.port}")


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
    stack.callback(path.unlink, missing_ok=True)
    await web.SockSite(runner, listener).start()


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


async def _prepared(
    stack: AsyncExitStack,
    runner: web.AppRunner,
    listen: str,
    port: int,
    tls: ssl.SSLContext | None,
) -> web.TCPSite:
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    return web.TCPSite(runner, listen, port, ssl_context=tls, backlog=_BACKLOG)


async def _start(site: web.TCPSite, what: str) -> None:
    try:
        await site.start()
    except OSError as error:
        raise GpudError(
            Code.CONFIG_INVALID, f"{what} cannot be listened on: {error.strerror}"
        ) from error
