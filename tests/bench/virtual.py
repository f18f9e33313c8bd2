"""libvirt's own word on when a guest has started: the same for every side."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpud.configfile import load_config
from gpud.hypervisor.events import DomainEvent
from gpud.hypervisor.libvirtd import Hypervisor
from tests.machine.server import DEMO_CONFIG


class Starts:
    """When which domain was started."""

    def __init__(self, domain_type: str) -> None:
        self.domain_type = domain_type
        self._at: dict[uuid.UUID, float] = {}
        self._heard = asyncio.Event()

    def hear(self, domain: uuid.UUID, event: DomainEvent, _detail: str) -> None:
        if event is DomainEvent.STARTED:
            self._at[domain] = time.perf_counter()
            self._heard.set()

    async def of(self, domain: uuid.UUID, timeout_s: float = 120) -> float:
        """When the domain's QEMU was running, by ``time.perf_counter``."""
        async with asyncio.timeout(timeout_s):
            while domain not in self._at:
                self._heard.clear()
                await self._heard.wait()
        return self._at[domain]


@asynccontextmanager
async def watched_starts() -> AsyncIterator[Starts]:
    """Listens to libvirt's events."""
    hypervisor = Hypervisor(load_config(DEMO_CONFIG).libvirt.uri, call_timeout_s=30, threads=4)
    connection = asyncio.create_task(hypervisor.run())
    try:
        await hypervisor.wait_available()
        starts = Starts(await hypervisor.kind())
        hypervisor.subscribe(starts.hear)
        yield starts
    finally:
        connection.cancel()
        await asyncio.gather(connection, return_exceptions=True)
