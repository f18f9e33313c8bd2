"""The connections of the API's listener: how many there may be, and how long each may take to ask.

They are accepted here and not by ``asyncio.Server``, which shows a connection only once its TLS
handshake is over: whoever opens connections and says nothing would be counted by nobody. It also lets
each new connection have the certificate of the moment.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import ssl
import sys
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import structlog
from aiohttp import web

from gpud.api.origin import Origin, parse_address, trusted
from gpud.config import Server

_log = structlog.get_logger()

_ACCEPT_AGAIN_S: Final = 1.0
_AT_ONCE: Final = 100
"""Of more, those who were let in before are seen to first."""

_TURNS: Final = 16
"""The loop takes six turns to let a caller in and have the request that he came with under way, and in
each of them two listeners may let others in. Against a TLS handshake, which takes round trips, no number
of turns is enough."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
NewHandler = Callable[[], web.RequestHandler]


class Visitor(asyncio.Protocol):
    """A connection: hands everything on to aiohttp's handler, and knows where it stands.

    Attributes:
        site: Whose it is, as far as the network tells.
        task: Sees it through, and ends it when cancelled.
        busy: Whether a request is under way.
        asked: Set by its first request, or its end.
        gone: Set by its end.
    """

    task: asyncio.Task[None]

    def __init__(self, handler: web.RequestHandler, site: str) -> None:
        self.site = site
        self.busy = False
        self.asked = asyncio.Event()
        self.gone = asyncio.Event()
        self._handler = handler
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is over."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - TCP, with or without TLS
        self._transport = transport
        self._handler.connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """It has ended."""
        self._handler.connection_lost(exc)
        self.asked.set()
        self.gone.set()

    def data_received(self, data: bytes) -> None:
        """Some bytes came."""
        self._handler.data_received(data)

    def eof_received(self) -> None:
        """No more will come."""
        self._handler.eof_received()

    def pause_writing(self) -> None:
        """The other side does not keep up."""
        self._handler.pause_writing()

    def resume_writing(self) -> None:
        """It does again."""
        self._handler.resume_writing()

    def cut(self) -> None:
        """End it at once, without a goodbye that the other side could draw out."""
        if self._transport is not None:
            self._transport.abort()


class Crowd:
    """Bounds connections, in all and for each address, and the time until a connection's first request.

    One connection too many costs the oldest idle one its place: a crowd that says nothing keeps nobody
    out who has something to say. When none is idle, the new one is turned away. A request after the
    first has until ``keepalive_timeout_s`` after the answer before it, which is aiohttp's to watch.

    Args:
        server: The bounds. Connections of trusted proxies, which carry many callers, count in all only.
        tls: For new connections; None for plain HTTP.
    """

    def __init__(self, server: Server, tls: ssl.SSLContext | None) -> None:
        self._server = server
        self._tls = tls
        self._visitors: dict[Visitor, None] = {}
        self._by_site: defaultdict[str, dict[Visitor, None]] = defaultdict(dict)
        self._by_handler: dict[web.RequestHandler, Visitor] = {}

    def reconfigure(self, server: Server, tls: ssl.SSLContext | None) -> None:
        """Go by these from the next connection on; those that are open stay."""
        self._server = server
        self._tls = tls

    @web.middleware
    async def watch(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note on which connections a request is under way."""
        visitor = self._by_handler.get(request.protocol)
        if visitor is None:
            raise ConnectionResetError
        visitor.asked.set()
        visitor.busy = True
        try:
            return await handler(request)
        finally:
            visitor.busy = False

    def welcome(self, listener: socket.socket, new_handler: NewHandler) -> None:
        """Let callers in until :meth:`dismiss`.

        Args:
            listener: Bound, listening and not blocking.
            new_handler: Makes aiohttp's handler of a connection.
        """
        if listener.fileno() >= 0:  # else it was closed during a pause
            loop = asyncio.get_running_loop()
            loop.add_reader(listener, self._accept, listener, new_handler)

    def dismiss(self, listener: socket.socket) -> None:
        """Let nobody in any more, and close ``listener``."""
        asyncio.get_running_loop().remove_reader(listener)
        listener.close()

    async def close(self) -> None:
        """Cut what is still open."""
        tasks = [visitor.task for visitor in self._visitors]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, listener: socket.socket, new_handler: NewHandler) -> None:
        for _ in range(self._at_once()):
            try:
                connection, peername = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # no file descriptor left, say
                _log.error("no connection can be accepted", error=error.strerror)
                loop = asyncio.get_running_loop()
                loop.remove_reader(listener)
                loop.call_later(_ACCEPT_AGAIN_S, self.welcome, listener, new_handler)
                return
            connection.setblocking(False)  # noqa: FBT003 - the signature of a socket
            self._admit(connection, peername[0], new_handler)

    def _at_once(self) -> int:
        """So few that, with places enough, a request that came with its connection is always read."""
        places = min(most_connections(), self._server.max_connections_per_address)
        return max(1, min(_AT_ONCE, places // _TURNS))

    def _admit(self, connection: socket.socket, peer: str, new_handler: NewHandler) -> None:
        address = parse_address(peer)
        site = Origin(address, "").site
        by_proxy = address is not None and trusted(address, self._server)
        most_of_one = sys.maxsize if by_proxy else self._server.max_connections_per_address
        if not (
            self._make_room(self._by_site.get(site, {}), most_of_one)
            and self._make_room(self._visitors, most_connections())
        ):
            connection.close()
            return
        handler = new_handler()
        visitor = Visitor(handler, site)
        self._visitors[visitor] = self._by_site[site][visitor] = None
        self._by_handler[handler] = visitor
        visitor.task = asyncio.create_task(self._see_through(visitor, connection))
        visitor.task.add_done_callback(partial(self._part, visitor, handler, connection))

    def _make_room(self, among: Mapping[Visitor, None], most: int) -> bool:
        """Whether there is room for one more, now or after the oldest idle one had to go."""
        if len(among) < most:
            return True
        oldest = next((visitor for visitor in among if not visitor.busy), None)
        if oldest is None:
            return False
        self._count_out(oldest)
        oldest.task.cancel()
        return True

    def _count_out(self, visitor: Visitor) -> None:
        self._visitors.pop(visitor, None)
        there = self._by_site[visitor.site]
        there.pop(visitor, None)
        if not there:
            del self._by_site[visitor.site]

    async def _see_through(self, visitor: Visitor, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._server.header_timeout_s):
                await loop.connect_accepted_socket(lambda: visitor, connection, ssl=self._tls)
                await visitor.asked.wait()
        except OSError:  # a TimeoutError and what TLS finds wrong are both of this kind
            return
        await visitor.gone.wait()

    def _part(
        self,
        visitor: Visitor,
        handler: web.RequestHandler,
        connection: socket.socket,
        _: asyncio.Task[None],
    ) -> None:
        """Let go of a connection, in whatever state it is, even if its task never got to begin."""
        visitor.cut()
        connection.close()
        del self._by_handler[handler]
        self._count_out(visitor)


def most_connections() -> int:
    """A quarter of the process' file descriptors; the others are for disks, seeds and children."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if limit == resource.RLIM_INFINITY else max(1, limit // 4)
