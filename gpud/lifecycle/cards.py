"""The steps that hand an instance's cards over and take them back, and what they mean for its domain.

A card comes to a guest reset, and comes back from it reset, or it is quarantined. Either way the steps
go on, so that one bad card never keeps the others of its instance from being sold again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from gpud.config import Config, Deadlines
from gpud.errors import Code, GpudError
from gpud.host import capacity, pci
from gpud.host.pci import PciTree
from gpud.host.sysfs import Sysfs
from gpud.host.vfio import Handover
from gpud.hypervisor.domains import Domain
from gpud.hypervisor.domainxml import DomainSpec, PassedCard
from gpud.hypervisor.passthroughxml import mmio_window_mib, start_timeout_s
from gpud.inventory import Inventory
from gpud.lifecycle.cleaning import Cleaner, Drivers
from gpud.lifecycle.outcome import Fail, Hop, Outcome
from gpud.model import Gpu, Grant, Instance, PciAddress, Step
from gpud.store import Store

REBOOTED = "the server was rebooted meanwhile"

Act = Callable[[Gpu, Drivers], Awaitable[None]]


class CardSteps:
    """The functions of the steps ``check_gpus``, ``bind_gpus``, ``clean_gpus`` and ``return_gpus``."""

    def __init__(
        self,
        config: Config,
        store: Store,
        inventory: Inventory,
        sysfs: Sysfs,
        handover: Handover,
        cleaner: Cleaner,
    ) -> None:
        self._config = config
        self._store = store
        self._inventory = inventory
        self._sysfs = sysfs
        self._handover = handover
        self._cleaner = cleaner

    async def check_gpus(self, instance: Instance) -> Outcome:
        """See that every function may be taken, and write down which driver has it now."""
        functions = functions_of(instance.grant)
        if not functions:
            return Hop(Step.BIND_GPUS)
        if lost := await self.lost(instance, fresh=True):
            return lost
        await self._inventory.refresh()
        if faults := self._faults(instance):
            raise GpudError(Code.GPU_UNUSABLE, "; ".join(faults))
        for function, domain in (await self._elsewhere(instance)).items():
            raise GpudError(Code.GPU_BUSY, f"{function} is in use by domain {domain}")
        told = await self._cleaner.ask_nvml()
        used_by = {gpu.address: gpu.processes for gpu in told}
        persistence_off = [gpu.address for gpu in told if gpu.persistence is False]
        await self._handover.check(functions, used_by, persistence_off)
        # When a guest is started again in the same boot, they are on vfio-pci: the first note stays.
        if instance.drivers_noted_in == self._cleaner.boot_id:
            return Hop(Step.BIND_GPUS)
        former = self._handover.former_drivers(functions)
        changes = {"former_drivers": former, "drivers_noted_in": self._cleaner.boot_id}
        return Hop(Step.BIND_GPUS, changes=changes)

    async def bind_gpus(self, instance: Instance) -> Outcome:
        """Take every function from its driver; before the guest's first start they are reset, too."""
        if self.rebooted_since_check(instance):
            return Hop(Step.CHECK_GPUS, REBOOTED)
        # A guest that has run gets its own cards back, with what it left in them.
        first_time = instance.running_at is None
        faults = await self._each(instance, self._clean if first_time else self._take)
        if not faults:
            return Hop(Step.START_DOMAIN)
        why = "; ".join(f"GPU {address}: {fault}" for address, fault in faults.items())
        if not first_time:
            raise GpudError(Code.GPU_UNUSABLE, why)
        return Fail("its GPUs could not be handed over", why, faults)

    def rebooted_since_check(self, instance: Instance) -> bool:
        """Whether the server was rebooted since ``check_gpus``, which gave the cards to their drivers."""
        return bool(instance.former_drivers) and (
            instance.drivers_noted_in != self._cleaner.boot_id
        )

    async def clean_gpus(self, instance: Instance) -> Outcome:
        """Reset what the guest had, and see that it is alive and the same."""
        faults = await self._each(instance, self._clean)
        return Hop(Step.RETURN_GPUS, quarantine=faults)

    async def return_gpus(self, instance: Instance) -> Outcome:
        """Give the cards back to the drivers they came with; the commit after this frees all claims."""
        faults = await self._each(instance, self._give_back)
        well = [gpu.address for gpu in self._clean_gpus_of(instance) if gpu.address not in faults]
        sick = await self._cleaner.sick(instance.former_drivers, well)
        return Hop(Step.ENDED, quarantine=faults | sick)

    async def lost(self, instance: Instance, *, fresh: bool = False) -> Fail | None:
        """Whether a card of the instance is gone from the bus: its guest cannot be helped then."""
        functions = functions_of(instance.grant)
        gone = await self._inventory.lost(functions, fresh=fresh) if functions else []
        if not gone:
            return None
        return Fail("one of its GPUs fell off the bus", f"gone: {', '.join(map(str, gone))}")

    async def placed(self, spec: DomainSpec, instance: Instance) -> DomainSpec:
        """Add to a domain the instance's cards, and where on the host it is to run."""
        grant = instance.grant
        tree = await asyncio.to_thread(pci.read, self._sysfs.root)
        bars = {function: _window_bars(tree, function) for function in functions_of(grant)}
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
        """Do something with every card that was noted and has no fault, side by side.

        A card that another domain has got hold of is not touched; that is its fault. That the record
        cannot be written, or that the server has no process to spare, is no card's fault.
        """
        elsewhere = await self._elsewhere(instance) if instance.former_drivers else {}
        faults = {
            gpu.address: f"{function} is in use by domain {elsewhere[function]}"
            for gpu in self._clean_gpus_of(instance)
            for function in gpu.functions
            if function in elsewhere
        }
        gpus = [gpu for gpu in self._clean_gpus_of(instance) if gpu.address not in faults]
        acts = [act(gpu, _former(instance, gpu)) for gpu in gpus]
        results = await asyncio.gather(*acts, return_exceptions=True)
        for gpu, result in zip(gpus, results, strict=True):
            if isinstance(result, GpudError) and not _is_the_servers(result):
                faults[gpu.address] = result.detail
            elif isinstance(result, BaseException):
                raise result
        return faults

    async def _elsewhere(self, instance: Instance) -> dict[PciAddress, str]:
        holders = await self._cleaner.domains_of(functions_of(instance.grant))
        return {one: name for one, name in holders.items() if name != instance.domain_name}

    def _clean_gpus_of(self, instance: Instance) -> list[Gpu]:
        """The cards that were noted, less those in which gpud itself found a fault."""
        return [
            gpu
            for gpu in instance.grant.gpus
            if _former(instance, gpu) and not self._found_bad(gpu.address)
        ]

    def _found_bad(self, address: PciAddress) -> bool:
        quarantine = self._store.quarantines.get(address)
        return quarantine is not None and not quarantine.by_operator

    async def _take(self, _gpu: Gpu, former: Drivers) -> None:
        await self._cleaner.take(former)

    async def _clean(self, gpu: Gpu, former: Drivers) -> None:
        await self._cleaner.clean(gpu.address, former)

    async def _give_back(self, _gpu: Gpu, former: Drivers) -> None:
        await self._cleaner.give_back(former)

    def _faults(self, instance: Instance) -> list[str]:
        faults = []
        cards = {card.address: card for card in self._inventory.cards}
        for gpu in instance.grant.gpus:
            card = cards.get(gpu.address)
            if card is None:
                told: tuple[str, ...] = ("it is not on the bus",)
            else:
                told = card.first_faults if instance.running_at is None else card.faults
            faults += [f"GPU {gpu.address}: {fault}" for fault in told]
        return faults


def _is_the_servers(error: GpudError) -> bool:
    return error.transient or error.code is Code.RECORD_UNAVAILABLE


def functions_of(grant: Grant) -> list[PciAddress]:
    """Every PCI function that a grant's cards come with; none for stand-ins."""
    return [function for gpu in grant.gpus for function in gpu.functions]


def held_functions(instances: Iterable[Instance]) -> set[PciAddress]:
    """Every PCI function that one of the instances was given."""
    return {function for instance in instances for function in functions_of(instance.grant)}


def unplugged(instance: Instance, domain: Domain) -> Fail | None:
    """Whether the instance's domain has lost a card, which may be back on the bus by now."""
    gone = [one for one in functions_of(instance.grant) if one not in domain.passed]
    if not gone:
        return None
    why = f"its domain has no longer: {', '.join(map(str, gone))}"
    return Fail("one of its GPUs fell off the bus", why)


def start_time_limit_s(base_s: float, grant: Grant) -> float:
    """How long the start of a guest with this grant may take, in seconds."""
    cards = sum(bool(gpu.functions) for gpu in grant.gpus)
    return start_timeout_s(base_s, grant.shape.memory_mib, cards)


def step_limit_s(deadlines: Deadlines, instance: Instance) -> float | None:
    """How long the instance may be in its step, in seconds; None for a step without a limit."""
    limit_s = deadlines.of(instance.step)
    if limit_s is None or instance.step is not Step.START_DOMAIN:
        return limit_s
    return start_time_limit_s(limit_s, instance.grant)


def _former(instance: Instance, gpu: Gpu) -> dict[PciAddress, str]:
    """The drivers that were noted of a card's functions."""
    noted = instance.former_drivers
    return {function: noted[function] for function in gpu.functions if function in noted}


def _window_bars(tree: PciTree, address: PciAddress) -> list[int]:
    function = tree.get(address)
    bars = function.bars if function is not None else ()
    return [bar.size_bytes for bar in bars if bar.is_64bit and bar.prefetchable]
