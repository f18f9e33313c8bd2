"""Listens to running guests: what they print, and what they report of their startup script.

Everything a guest sends is a tenant's word. A report only counts towards its own instance, lines have
a length limit, and of what a flooding guest sends faster than it is read the oldest is dropped.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from uuid import UUID

import structlog

from gpud.errors import GpudError
from gpud.guest.console import ConsoleLogs
from gpud.hypervisor.domains import Domain, DomainState
from gpud.hypervisor.events import DomainEvent
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.hypervisor.stream import GuestStream
from gpud.model import Instance
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

_REPORT = re.compile(
    rb"^gpud1 (started|exited) ([0-9a-f-]{36})(?: ([0-9]{1,3}))?\r?$", re.MULTILINE
)
_MAX_LINE_BYTES = 256
Opener = Callable[[UUID], Awaitable[GuestStream]]
Reader = Callable[[Instance, GuestStream], Awaitable[None]]

_PAUSE_S = 0.05
_PAUSE_AFTER_REPORT_S = 0.5
_BOOT_EVERY_S = 60.0


class GuestWatch:
    """Keeps one reader on the console and one on the report channel of every guest it is given."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        store: Store,
        consoles: ConsoleLogs,
        metrics: Metrics,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hypervisor = hypervisor
        self._store = store
        self._consoles = consoles
        self._metrics = metrics
        self._monotonic = monotonic
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._counted_at: dict[str, float] = {}
        self._powered_off: set[UUID] = set()
        self._paused: set[str] = set()
        self._refused: dict[tuple[str, str], str] = {}

    def attach(self, instance: Instance) -> None:
        """See that both readers of the instance's guest run; those that run already are left alone."""
        readers: dict[str, tuple[Opener, Reader]] = {
            "console": (self._hypervisor.console, self._keep_console),
            "channel": (self._hypervisor.channel, self._take_reports),
        }
        for name, (opener, reader) in readers.items():
            task = self._tasks.get((instance.upstream_id, name))
            if task is None or task.done():
                self._tasks[instance.upstream_id, name] = asyncio.create_task(
                    self._listen(instance, name, opener, reader)
                )

    def unheard(self, upstream_id: str) -> str:
        """Why the reports of a guest that runs cannot be read; empty when they can."""
        return self._refused.get((upstream_id, "channel"), "")

    async def detach(self, upstream_id: str) -> None:
        """Stop both readers of a guest."""
        self._counted_at.pop(upstream_id, None)
        self._paused.discard(upstream_id)
        keys = [key for key in self._tasks if key[0] == upstream_id]
        await self._end(keys)
        for key in keys:
            self._refused.pop(key, None)

    def hear(self, domain_uuid: UUID, event: DomainEvent, detail: str) -> None:
        """Take note of a lifecycle event: only it tells a power-off from a crash or a lost host."""
        if event is DomainEvent.STOPPED and detail == "shutdown":
            self._powered_off.add(domain_uuid)
        elif event is DomainEvent.STARTED:
            self._powered_off.discard(domain_uuid)

    def powered_off(self, instance: Instance) -> bool:
        """Whether the guest was seen to power itself off since its last start."""
        return instance.domain_uuid in self._powered_off

    async def see(self, domain: Domain, instance: Instance) -> None:
        """Tell once that a guest is paused, and once that it goes on.

        QEMU pauses a guest whose disk cannot be written, and leaves the rest to others. Resumed, it tries
        the same write again; while there is still no room, it is paused again and nothing is lost. One
        that the operator paused stays so.
        """
        if domain.io_error:
            await self._hypervisor.resume(domain.uuid)
        upstream_id = instance.upstream_id
        paused = domain.state is DomainState.PAUSED
        if paused is (upstream_id in self._paused):
            return
        if paused:
            self._paused.add(upstream_id)
            by_qemu = "by QEMU, because its disk cannot be written; it goes on when it can"
            how = by_qemu if domain.io_error else "by hand"
            _log.error("guest is paused; `gpud check` says what to do", how=how)
            why = f"its domain is paused {how}"
            await self._store.note(why, upstream_id=upstream_id, became="paused")
        else:
            self._paused.discard(upstream_id)
            _log.info("guest goes on")
            why = "its domain was resumed"
            await self._store.note(why, upstream_id=upstream_id, became="resumed")

    async def close(self) -> None:
        """Stop all readers. The guests do not notice: what they report waits for the next reader."""
        await self._end(list(self._tasks))

    async def _end(self, keys: list[tuple[str, str]]) -> None:
        tasks = [self._tasks.pop(key) for key in keys]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, instance: Instance, name: str, opener: Opener, reader: Reader) -> None:
        """Run one reader until its stream ends; the next :meth:`attach` starts it anew."""
        key = (instance.upstream_id, name)
        try:
            stream = await opener(instance.domain_uuid)
            self._refused.pop(key, None)
            await reader(instance, stream)
        except GpudError as error:
            if await self._runs(instance):
                self._refuse(key, error)
        except OSError as error:
            _log.error("guest output lost", stream=name, error=error.strerror)
        except Exception:  # noqa: BLE001 - logged; the next attach starts the reader anew
            _log.exception("guest reader failed", stream=name)

    async def _runs(self, instance: Instance) -> bool:
        try:
            return await self._hypervisor.find(instance.domain_uuid) is not None
        except GpudError:  # libvirt is away, which its connection tells
            return False

    def _refuse(self, key: tuple[str, str], error: GpudError) -> None:
        """Tell, each reason once: it is tried again at every look at the guest."""
        if self._refused.get(key) != error.detail:
            self._refused[key] = error.detail
            _log.warning("a running guest cannot be heard", stream=key[1], error=str(error))

    async def _keep_console(self, instance: Instance, stream: GuestStream) -> None:
        async with aclosing(_chunks(stream)) as chunks:
            async for output in chunks:
                await asyncio.to_thread(self._consoles.append, instance.upstream_id, output)

    async def _take_reports(self, instance: Instance, stream: GuestStream) -> None:
        rest = b""
        async with aclosing(_chunks(stream)) as chunks:
            async for chunk in chunks:
                lines, _, rest = (rest + chunk).rpartition(b"\n")
                rest = rest[-_MAX_LINE_BYTES:]
                for found in _REPORT.finditer(lines):
                    await self._take(instance.upstream_id, *found.groups())
                    await asyncio.sleep(_PAUSE_AFTER_REPORT_S)

    async def _take(
        self, upstream_id: str, what: bytes, boot_id: bytes, exit_code: bytes | None
    ) -> None:
        """Record a report. Guests repeat them, so one that was recorded before is the usual case."""
        if what == b"started":
            await self._count_boot(upstream_id, boot_id.decode())
        elif exit_code is not None:
            code = int(exit_code)
            if await self._store.script_exited(upstream_id, code):
                self._metrics.script_exits.labels("ok" if code == 0 else "failed").inc()
                _log.info("startup script ended", exit_code=code)

    async def _count_boot(self, upstream_id: str, boot_id: str) -> None:
        """Count a boot, but not more than one a minute: a tenant could make up boots without end.

        One that is passed over for that is not lost, since the guest says it again.
        """
        instance = self._store.live.get(upstream_id)
        if instance is None or instance.boot_id == boot_id:
            return
        now = self._monotonic()
        if now - self._counted_at.get(upstream_id, -_BOOT_EVERY_S) >= _BOOT_EVERY_S:
            await self._store.guest_booted(upstream_id, boot_id)
            self._counted_at[upstream_id] = now


async def _chunks(stream: GuestStream) -> AsyncGenerator[bytes, None]:
    try:
        while chunk := await stream.read():
            yield chunk
            await asyncio.sleep(_PAUSE_S)
    finally:
        await stream.close()
