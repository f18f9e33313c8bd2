"""The steps that hand an instance's cards over and take them back, and what they mean for its domain.

A card is given back clean or it is quarantined. Either way the steps go on, so that one bad card never
keeps the others of its instance from being sold again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Final

import structlog

from gpud.config import Config
from gpud.errors import Code, GpudError
from gpud.host import capacity, pci
from gpud.host.blockers import VFIO_PCI
from gpud.host.nvml import Nvml, NvmlGpu
from gpud.host.pci import PciTree
from gpud.host.sysfs import Sysfs
from gpud.host.vfio import Handover
from gpud.hypervisor.domainxml import DomainSpec, PassedCard
from gpud.hypervisor.passthroughxml import mmio_window_mib, start_timeout_s
from gpud.inventory import Inventory
from gpud.lifecycle.outcome import Fail, Hop, Outcome
from gpud.model import Grant, Instance, PciAddress, Step
from gpud.store import Store

_log = structlog.get_logger()

NVIDIA: Final = "nvidia"
"""The driver through which NVML sees a card."""

_IDLE_MEMORY_MIB: Final = 64
"""What a driver may keep of an idle card's memory for itself; more is somebody's."""

Drivers = Mapping[PciAddress, str]
Act = Callable[[Drivers], Awaitable[None]]


class CardSteps:
    """The functions of the steps ``check_gpus``, ``bind_gpus``, ``clean_gpus`` and ``return_gpus``."""

    def __init__(
        self,
        config: Config,
        store: Store,
        inventory: Inventory,
        sysfs: Sysfs,
        handover: Handover,
        nvml: Nvml | None,
    ) -> None:
        self._sysfs = sysfs
        self._config = config
        self._store = store
        self._inventory = inventory
        self._handover = handover
        self._nvml = nvml

    async def check_gpus(self, instance: Instance) -> Outcome:
        """See that every function may be taken, and write down which driver has it now."""
        functions = functions_of(instance.grant)
        if not functions:
            return Hop(Step.BIND_GPUS)
        await self._inventory.refresh()
        if faults := self._faults(instance):
            raise GpudError(Code.GPU_UNUSABLE, "; ".join(faults))
        used_by = {gpu.address: gpu.processes for gpu in await self._ask_nvml()}
        await self._handover.check(functions, used_by)
        # After a restart of the guest the first note stays: it tells the drivers they came with.
        former = instance.former_drivers or self._handover.former_drivers(functions)
        return Hop(Step.BIND_GPUS, changes={"former_drivers": former})

    async def bind_gpus(self, instance: Instance) -> Outcome:
        """Take every function from its driver and give it to vfio-pci."""
        if functions := functions_of(instance.grant):
            async with self._nvml_closed():
                await self._handover.bind(functions)
        return Hop(Step.START_DOMAIN)

    async def clean_gpus(self, instance: Instance) -> Outcome:
        """Reset what the guest had, and see that it is alive and the same."""
        return Hop(Step.RETURN_GPUS, quarantine=await self._each(instance, self._clean))

    async def return_gpus(self, instance: Instance) -> Outcome:
        """Give the cards back to the drivers they came with; the commit after this frees all claims."""
        if not instance.former_drivers:
            return Hop(Step.ENDED)
        async with self._nvml_closed():
            faults = await self._each(instance, self._handover.give_back)
        if NVIDIA in instance.former_drivers.values():
            sick = {gpu.address: "; ".join(_sickness(gpu)) for gpu in await self._ask_nvml()}
            ours = {gpu.address for gpu in instance.grant.gpus}
            faults = {at: why for at, why in sick.items() if why and at in ours} | faults
        return Hop(Step.ENDED, quarantine=faults)

    async def lost(self, instance: Instance) -> Fail | None:
        """Whether a card of a running instance is gone: the guest cannot be helped then."""
        functions = functions_of(instance.grant)
        gone = await self._inventory.lost(functions) if functions else []
        if not gone:
            return None
        return Fail(
            "one of its GPUs fell off the bus", f"gone from the bus: {', '.join(map(str, gone))}"
        )

    async def placed(self, spec: DomainSpec, instance: Instance) -> DomainSpec:
        """Add to a domain the instance's cards, and where on the host it is to run."""
        grant = instance.grant
        functions = functions_of(grant)
        tree = await asyncio.to_thread(pci.read, self._sysfs.root)
        bars = {one: _window_bars(tree, one) for one in functions}
        several_nodes = len(self._inventory.host.nodes) > 1
        nodes = grant.nodes if several_nodes else ()
        memory_from = sorted(node.number for node in nodes if node.memory_mib)
        cores_from = sorted(node.number for node in nodes if node.cpu_cores)
        cpus = [capacity.cpus(number, self._sysfs.root) for number in cores_from]
        return replace(
            spec,
            cards=tuple(PassedCard(gpu.functions) for gpu in grant.gpus if gpu.functions),
            rombar=self._config.gpus.rombar,
            mmio_window_mib=mmio_window_mib(bars),
            cpuset=",".join(cpus) or None,
            nodeset=",".join(map(str, memory_from)) or None,
            hugepage_kib=self._config.guest.hugepage_kib,
        )

    async def _each(self, instance: Instance, act: Act) -> dict[PciAddress, str]:
        """Do something with every card that was taken and is not quarantined; returns what failed."""
        faults = {}
        for gpu in instance.grant.gpus:
            former = {
                function: instance.former_drivers[function]
                for function in gpu.functions
                if function in instance.former_drivers
            }
            if not former or gpu.address in self._store.quarantines:
                continue
            try:
                await act(former)
            except GpudError as error:
                faults[gpu.address] = error.detail
        return faults

    async def _clean(self, former: Drivers) -> None:
        now = self._handover.former_drivers(former)
        taken = [function for function, driver in now.items() if driver == VFIO_PCI]
        before = await asyncio.to_thread(pci.read, self._sysfs.root)
        methods = await self._handover.reset(taken)
        await self._handover.verify(taken, before)
        named = {str(function): method for function, method in methods.items()}
        _log.info("GPU reset", functions=named)

    async def _ask_nvml(self) -> Sequence[NvmlGpu]:
        return () if self._nvml is None else (await self._nvml.report()).gpus

    def _nvml_closed(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._nvml is None else self._nvml.closed()

    def _faults(self, instance: Instance) -> list[str]:
        faults = []
        for gpu in instance.grant.gpus:
            card = self._inventory.card(gpu.address)
            told = ("it is not on the bus",) if card is None else card.faults
            faults += [f"GPU {gpu.address}: {fault}" for fault in told]
        return faults


def functions_of(grant: Grant) -> list[PciAddress]:
    """Every PCI function that a grant's cards come with; none for stand-ins."""
    return [function for gpu in grant.gpus for function in gpu.functions]


def start_time_limit_s(base_s: float, grant: Grant) -> float:
    """How long the start of a guest with this grant may take, in seconds."""
    cards = sum(bool(gpu.functions) for gpu in grant.gpus)
    return start_timeout_s(base_s, grant.shape.memory_mib, cards)


def _sickness(gpu: NvmlGpu) -> list[str]:
    """What an idle card must not show."""
    found = list(gpu.unhealthy)
    found += [f"used by process {process.pid} ({process.name})" for process in gpu.processes]
    if not gpu.processes and (gpu.memory_used_mib or 0) > _IDLE_MEMORY_MIB:
        found.append(f"{gpu.memory_used_mib} MiB of its memory are still in use")
    return found


def _window_bars(tree: PciTree, address: PciAddress) -> list[int]:
    function = tree.get(address)
    bars = function.bars if function is not None else ()
    return [bar.size_bytes for bar in bars if bar.is_64bit and bar.prefetchable]
