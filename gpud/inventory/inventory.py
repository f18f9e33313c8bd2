"""The latest view of the host: its cards, and the cores, memory, disk and addresses beside them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import replace
from typing import Final

import structlog

from gpud.config import Config
from gpud.errors import GpudError
from gpud.host import iommu
from gpud.host.capacity import Capacity
from gpud.host.iommu import IommuFacts
from gpud.host.nvml import Nvml, NvmlReport
from gpud.host.pci import NVIDIA_DRIVER, PciTree
from gpud.host.vfio import Handover
from gpud.inventory.bus import Bus
from gpud.inventory.card import Card
from gpud.inventory.facts import Facts, NvmlView, Record
from gpud.inventory.identity import as_it_is, news
from gpud.inventory.merge import merge
from gpud.inventory.obstacles import Obstacles
from gpud.inventory.room import room_for_guests, stand_ins
from gpud.inventory.sighting import Sighting, sightings
from gpud.model import Host, Instance, PciAddress
from gpud.store import Store

_log = structlog.get_logger()

_LOOK_EVERY_S: Final = 15.0
_ASK_NVML_EVERY_S: Final = 60.0
_FIRST_ANSWER_S: Final = 5.0
"""How long the first look waits for NVML; the cards of its driver are not sold until it was heard."""


class Inventory:
    """What this host has, looked at again and again.

    ``host`` and ``cards`` join the last look with the record as it is at the moment, so a quarantine
    or an order counts at once. They may be read on any thread. ``view`` counts the looks;
    ``problem`` tells why the host could not be read when that was last tried.

    Args:
        config: Types, reserve, addresses and stand-ins.
        measure_capacity: Reads the host's capacity.
        read_pci: Reads the PCI functions, and asks each whether it answers.
        nvml: None where NVML is not to be asked.
        store: What is remembered, quarantined and claimed.
        read_iommu: Reads what the IOMMU does.
        domains: Names domains of libvirt by the PCI functions that they have.
        clock: Seconds that only go forward.
        handover: Says what would keep it from taking a card; None where nothing is handed over.
    """

    def __init__(
        self,
        config: Config,
        measure_capacity: Callable[[], Capacity],
        read_pci: Callable[[], Awaitable[PciTree]],
        nvml: Nvml | None,
        store: Store,
        *,
        read_iommu: Callable[[], IommuFacts] = iommu.facts,
        domains: Callable[[], Mapping[PciAddress, str]] = dict,
        clock: Callable[[], float] = time.monotonic,
        handover: Handover | None = None,
    ) -> None:
        self._config = config
        self._measure_capacity = measure_capacity
        self._bus = Bus(read_pci, clock)
        self._read_iommu = read_iommu
        self._nvml = nvml
        self._store = store
        self._domains = domains
        self._obstacles = Obstacles(None if config.gpus.stand_ins else handover)
        self._room = Host()
        self._capacity: Capacity | None = None
        self._facts: Facts | None = None
        self._told = NvmlView(awaited=nvml is not None)
        self._ended: set[str] = set()
        self._look_now = asyncio.Event()
        self.nvml_problem: str | None = None
        self.problem: str | None = "the host has not been looked at yet"
        self.view = 0
        store.subscribe(self._heard)

    @property
    def cards(self) -> tuple[Card, ...]:
        """Every card, sellable or not; none before the first look. With stand-ins, no real ones."""
        facts, record = self._facts, Record.of(self._store)
        if facts is None:
            return ()
        if self._config.gpus.stand_ins:
            return tuple(stand_ins(self._config.gpus.stand_ins, record))
        return merge(facts, record, self._config.gpus)

    @property
    def host(self) -> Host:
        """What can be given to guests, claims not yet taken off."""
        gpus = tuple(gpu for card in self.cards if (gpu := card.gpu) is not None)
        return replace(self._room, gpus=gpus)

    def card(self, address: PciAddress) -> Card | None:
        """The card at ``address``."""
        return next((card for card in self.cards if card.address == address), None)

    def reconfigure(self, config: Config) -> None:
        """Keep for the host what ``config`` says, from now on."""
        self._config = config
        if self._capacity is not None:
            self._room = room_for_guests(config, self._capacity)
            self.view += 1

    async def refresh(self) -> None:
        """Look at the host anew; the first time, NVML is asked too, and waited for a little.

        Raises:
            GpudError, OSError: The host cannot be read; the former view stays.
        """
        try:
            await self._look()
        except (GpudError, OSError) as error:
            self.problem = str(error)
            raise
        self.problem = None

    async def _look(self) -> None:
        if self._facts is None and self._nvml is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_FIRST_ANSWER_S):
                    await self._ask(self._nvml)
        capacity = self._capacity = await asyncio.to_thread(self._measure_capacity)
        isolation = await asyncio.to_thread(self._read_iommu)
        tree = await self._bus.tree()
        facts = Facts(tree, isolation, self._told, self._other_domains())
        cards = merge(facts, Record.of(self._store), self._config.gpus)
        facts = replace(facts, obstacles=await self._obstacles.of(cards, facts))
        await self._take(room_for_guests(self._config, capacity), facts)

    async def run(self) -> None:
        """Keep looking for as long as the daemon lives; NVML has its own, slower rhythm."""
        await asyncio.gather(self._keep_looking(), self._keep_asking())

    async def lost(
        self, addresses: Collection[PciAddress], *, fresh: bool = False
    ) -> list[PciAddress]:
        """Which PCI functions are gone from the bus, or silent for longer than a reset takes.

        Args:
            addresses: The functions.
            fresh: Read the bus after this call, however recently it was read.

        Raises:
            GpudError: The bus cannot be read. Transient.
        """
        return await self._bus.lost(addresses, fresh=fresh)

    async def confirm(self, address: PciAddress) -> bool:
        """Take what is at ``address`` now for right, be it another card than before or none.

        Returns:
            False when there is no card, and none was remembered either.

        Raises:
            GpudError, OSError: The host cannot be read.
        """
        await self.refresh()
        for sighting in self._sightings(self._facts) if self._facts is not None else ():
            if sighting.address == address and (known := as_it_is(sighting)) is not None:
                await self._store.remember_card(known)
                return True
        return await self._store.forget_card(address)

    # -- looking ---------------------------------------------------------------------------------

    async def _keep_looking(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._look_now.wait()
            self._look_now.clear()
            try:
                await self.refresh()
            except (GpudError, OSError) as error:
                _log.error("the host cannot be read", error=str(error))

    async def _keep_asking(self) -> None:
        while self._nvml is not None:
            if not self._told.awaited:
                await asyncio.sleep(_ASK_NVML_EVERY_S)
            try:
                await self._ask(self._nvml)
            except GpudError as error:
                _log.error("the host cannot be read", error=str(error))
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _ask(self, nvml: Nvml) -> None:
        """Ask NVML. That takes as long as it takes; nobody who serves waits for it."""
        before = _with_nvidia_driver(await self._bus.tree())
        report = await nvml.report()
        after = _with_nvidia_driver(await self._bus.tree())
        if report.problem != self.nvml_problem:
            _log.warning("NVML", problem=report.problem, driver=report.driver_version)
        self.nvml_problem = report.problem
        self._told = _view(report, self._told, before & after)
        if self._facts is not None:
            await self._take(self._room, replace(self._facts, nvml=self._told))

    async def _take(self, room: Host, facts: Facts) -> None:
        self._room, self._facts = room, facts
        self.view += 1
        for known in news(self._sightings(facts)):
            _log.info("card learned", gpu=str(known.address), ids=known.ids, uuid=known.uuid)
            try:
                await self._store.remember_card(known)
            except sqlite3.Error as error:  # a full disk, say; the next look tries again
                _log.error("card not remembered", gpu=str(known.address), error=str(error))

    def _sightings(self, facts: Facts) -> tuple[Sighting, ...]:
        return sightings(facts, Record.of(self._store), self._config.gpus)

    def _other_domains(self) -> dict[PciAddress, str]:
        """The domains that have cards, less those that were listed before their instance ended."""
        listed = dict(self._domains())
        self._ended &= set(listed.values())
        return {function: name for function, name in listed.items() if name not in self._ended}

    def _heard(self, instance: Instance) -> None:
        if not instance.live:
            self._ended.add(instance.domain_name)
            self._look_now.set()  # its cards are back with their drivers


def _view(report: NvmlReport, former: NvmlView, driven: frozenset[PciAddress]) -> NvmlView:
    """What to go by after a report.

    Args:
        report: The report.
        former: What was gone by before. An NVML that fails unsays none of it, but for who used a
            card, which nobody could correct.
        driven: The cards that NVIDIA's driver had all the while.
    """
    if report.problem is not None and not report.gpus:
        former_gpus = {one: replace(gpu, processes=()) for one, gpu in former.gpus.items()}
        return NvmlView(former_gpus)
    gpus = {gpu.address: gpu for gpu in report.gpus}
    silent = driven - gpus.keys() if report.problem is None else frozenset()
    return NvmlView(gpus, silent, report.unplaced)


def _with_nvidia_driver(tree: PciTree) -> frozenset[PciAddress]:
    functions = tree.functions.values()
    return frozenset(one.address for one in functions if one.driver == NVIDIA_DRIVER)
