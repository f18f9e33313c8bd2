"""The connection to libvirt: kept open, opened again when it breaks, and asked whether it answers.

There is one connection for everything. The daemon's restart breaks it and loses events, so whoever
watches guests looks at them again after each ``on_connect``. When libvirt still holds the connection but
does not answer (a wedged daemon), a second one would meet the same silence: the hypervisor is then called
unavailable until the question that hangs has been answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar
from uuid import UUID

import libvirt
import structlog

from gpud.errors import Code, GpudError
from gpud.hypervisor.calls import Calls
from gpud.hypervisor.events import DomainEvent, name_event, start_event_loop
from gpud.hypervisor.faults import connection_lost, translate, unavailable
from gpud.telemetry import Metrics

log = structlog.get_logger()

T = TypeVar("T")
EventCallback = Callable[[UUID, DomainEvent, str], None]

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
PROBE_PERIOD_S: Final = 10.0
_KEEPALIVE_INTERVAL_S = 5
_KEEPALIVE_COUNT = 3
_GOODBYE_S = 2.0


class Connection:
    """The way to libvirt. :meth:`run` keeps it open; everything else goes through :meth:`call`."""

    def __init__(self, uri: str, call_timeout_s: float, threads: int, metrics: Metrics) -> None:
        self.calls: Final = Calls(threads)
        self._uri = uri
        self._call_timeout_s = call_timeout_s
        self._metrics = metrics
        self._current: libvirt.virConnect | None = None
        self._answers = asyncio.Event()
        self._look_again = asyncio.Event()
        self._event_id = -1
        self._on_disconnect: list[Callable[[], None]] = []
        self._on_connect: list[Callable[[], None]] = []
        self._on_event: list[EventCallback] = []

    @property
    def available(self) -> bool:
        """Whether libvirt is connected and answers."""
        return self._answers.is_set()

    async def wait_available(self) -> None:
        """Wait until libvirt is connected and answers."""
        await self._answers.wait()

    def is_current(self, connection: libvirt.virConnect) -> bool:
        """Tell whether ``connection``, which a call was given, is still the one in use."""
        return connection is self._current

    def on_disconnect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the event loop after each time that the connection has been lost."""
        self._on_disconnect.append(callback)

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the event loop after each time that the connection has been opened."""
        self._on_connect.append(callback)

    def subscribe(self, callback: EventCallback) -> None:
        """Call ``callback(uuid, event, detail)`` on the event loop for each lifecycle event."""
        self._on_event.append(callback)

    async def run(self) -> None:
        """Keep the connection open until cancelled."""
        failures = 0
        while True:
            try:
                connection = await self._open()
            except libvirt.libvirtError as error:
                failures += 1
                problem = translate(error, f"open {self._uri}", Code.HYPERVISOR_UNAVAILABLE)
                log.warning("libvirt cannot be reached", problem=str(problem), failures=failures)
            else:
                failures = 0
                await self._serve(connection)
            await asyncio.sleep(_pause_s(failures))

    async def call(
        self,
        name: str,
        key: str,
        what: str,
        act: Callable[[libvirt.virConnect], T],
        code: Code = Code.GUEST_FAILED,
        timeout_s: float | None = None,
    ) -> T:
        """Run ``act(connection)`` in a thread, after any earlier call with the same key.

        Args:
            name: Of the call, for the metrics; one of a few.
            key: What the call concerns, such as a guest: calls with one key follow each other.
            what: What is done to which thing, for the error: ``start guest 6f0c…``.
            act: The libvirt calls; may block.
            code: Code of the error for a failure that is not the connection's.
            timeout_s: How long to wait where that is longer than for other calls.

        Raises:
            GpudError: The call failed; HYPERVISOR_UNAVAILABLE when libvirt is away or does not answer.
        """
        limit_s = max(self._call_timeout_s, timeout_s or 0)
        began = time.monotonic()
        try:
            result = await self.calls.run(key, lambda: act(self._connected(what)), limit_s)
        except libvirt.libvirtError as error:
            if connection_lost(error):
                self._look_again.set()
            problem = translate(error, what, code)
            self._account(name, _outcome(problem), began)
            raise problem from error
        except GpudError as problem:
            self._account(name, _outcome(problem), began)
            raise
        except TimeoutError:
            self._look_again.set()
            self._account(name, "timeout", began)
            detail = f"libvirt has not finished within {limit_s:g} s to {what}"
            raise unavailable(
                detail, "gpud tries again; if it stays so, restart libvirtd"
            ) from None
        self._account(name, "ok", began)
        return result

    def _account(self, name: str, outcome: str, began: float) -> None:
        self._metrics.libvirt_calls.labels(name, outcome).inc()
        self._metrics.libvirt_call_seconds.labels(name).observe(time.monotonic() - began)

    def _connected(self, what: str) -> libvirt.virConnect:
        if self._current is None:
            raise unavailable(f"libvirt is not connected, cannot {what}")
        return self._current

    async def _open(self) -> libvirt.virConnect:
        loop = asyncio.get_running_loop()

        def on_event(
            _connection: object, domain: libvirt.virDomain, event: int, detail: int, _opaque: None
        ) -> None:
            _hand_over(loop, self._tell, UUID(bytes=domain.UUID()), *name_event(event, detail))

        def on_close(_connection: object, _reason: int, _opaque: None) -> None:
            _hand_over(loop, self._look_again.set)

        def open_connection() -> libvirt.virConnect:
            start_event_loop()
            connection = libvirt.open(self._uri)
            with contextlib.suppress(libvirt.libvirtError):  # drivers without a daemon have neither
                connection.setKeepAlive(_KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT)
                connection.registerCloseCallback(on_close, None)
            self._event_id = connection.domainEventRegisterAny(
                None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, on_event, None
            )
            return connection

        # No limit: only run() waits for this, and an open that is given up could not be undone.
        return await self.calls.run("connect", open_connection, timeout_s=None)

    async def _serve(self, connection: libvirt.virConnect) -> None:
        self._current = connection
        log.info("libvirt connected", uri=self._uri)
        try:
            await self._watch(connection)
        finally:
            self._current = None
            self._answers.clear()
            _tell_all(self._on_disconnect)
            await self._dismiss(connection)

    async def _watch(self, connection: libvirt.virConnect) -> None:
        """Ask again and again whether libvirt answers; return when the connection is lost."""
        greeted = False
        while True:
            self._look_again.clear()
            try:
                await self.calls.run("probe", connection.getLibVersion, self._call_timeout_s)
            except TimeoutError:
                self._answers.clear()
                log.warning("libvirt does not answer", timeout_s=self._call_timeout_s)
            except libvirt.libvirtError as error:
                log.warning("libvirt connection lost", problem=str(error))
                return
            else:
                self._answers.set()
                if not greeted:
                    _tell_all(self._on_connect)
                    greeted = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PROBE_PERIOD_S):
                    await self._look_again.wait()

    async def _dismiss(self, connection: libvirt.virConnect) -> None:
        def close() -> None:
            # Registered callbacks hold the connection open, also one that is broken.
            with contextlib.suppress(libvirt.libvirtError):
                connection.domainEventDeregisterAny(self._event_id)
            with contextlib.suppress(libvirt.libvirtError):
                connection.unregisterCloseCallback()
            with contextlib.suppress(libvirt.libvirtError):
                connection.close()

        with contextlib.suppress(TimeoutError):
            await self.calls.run("dismiss", close, _GOODBYE_S)

    def _tell(self, uuid: UUID, event: DomainEvent, detail: str) -> None:
        _tell_all(self._on_event, uuid, event, detail)


def _outcome(problem: GpudError) -> str:
    return "unavailable" if problem.code is Code.HYPERVISOR_UNAVAILABLE else "failed"


def _tell_all(listeners: Sequence[Callable[..., None]], *news: object) -> None:
    for listener in listeners:
        try:
            listener(*news)
        except Exception:  # one listener's fault must not take the others' news
            log.exception("listener failed", listener=repr(listener))


def _hand_over(
    loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *arguments: object
) -> None:
    """Pass news from libvirt's event thread to the event loop, if that one still runs."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *arguments)


def _pause_s(failures: int) -> float:
    """Give the seconds before the next try: doubling, and spread so that hosts do not march in step."""
    longest: float = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(failures, 10))
    return longest * random.uniform(0.5, 1)  # noqa: S311 - not a secret
