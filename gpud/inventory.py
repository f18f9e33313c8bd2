"""What this host has for sale: its GPUs, and the cores, memory, disk and addresses beside them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from gpud.config import Config, StandIns
from gpud.errors import GpudError
from gpud.host.capacity import Capacity
from gpud.model import Gpu, Host, PciAddress

_log = structlog.get_logger()

_REFRESH_S = 15.0

# PCI domains of real machines have 16 bits, or start at 0x10000 behind Intel VMD; this is neither.
_STAND_IN_DOMAIN = 0xFFFFFFFF


class Inventory:
    """The latest view of the host: ``host``, and ``view``, which counts the looks taken.

    Args:
        config: Reserve, addresses and stand-ins.
        measure: Reads the host's capacity; may block for a moment, so it runs in a thread.
    """

    def __init__(self, config: Config, measure: Callable[[], Capacity]) -> None:
        self._config = config
        self._measure = measure
        self._gpus = tuple(_stand_ins(config.gpus.stand_ins))
        self.host = Host()
        self.view = 0

    async def refresh(self) -> None:
        """Look at the host anew.

        Raises:
            GpudError, OSError: Its capacity cannot be read; the former view stays.
        """
        capacity = await asyncio.to_thread(self._measure)
        reserve, network = self._config.host_reserve, self._config.network
        self.host = Host(
            gpus=self._gpus,
            cpu_cores=max(0, capacity.cpu_cores - reserve.cpu_cores),
            memory_mib=max(0, capacity.memory_mib - round(reserve.memory_gib * 1024)),
            storage_gib=max(0, capacity.storage_gib - reserve.storage_gib),
            addresses=tuple(network.guest_addresses) if network.mode == "network" else None,
        )
        self.view += 1

    async def run(self) -> None:
        """Refresh for as long as the daemon lives."""
        while True:
            await asyncio.sleep(_REFRESH_S)
            try:
                await self.refresh()
            except (GpudError, OSError) as error:
                _log.error("the host's capacity cannot be read", error=str(error))


def _stand_ins(configured: list[StandIns]) -> list[Gpu]:
    types = [group.gpu_type for group in configured for _ in range(group.count)]
    return [
        Gpu(PciAddress(_STAND_IN_DOMAIN, number, 0, 0), gpu_type, stand_in=True)
        for number, gpu_type in enumerate(types)
    ]
