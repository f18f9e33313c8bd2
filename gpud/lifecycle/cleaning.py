"""What is done to one card between two guests: reset, proof that it is sane, and the way back.

Nothing here guesses: what cannot be seen to be well raises, and the caller quarantines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Final
from weakref import WeakValueDictionary

import structlog

from gpud.errors import Code, GpudError
from gpud.host import pci
from gpud.host.nvml import Nvml, NvmlGpu, NvmlReport
from gpud.host.sysfs import Sysfs
from gpud.host.vfio import Handover
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.model import PciAddress
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

_IDLE_MEMORY_MIB: Final = 64
"""What a driver may keep of an idle card's memory for itself; more is somebody's."""
_ASK_AGAIN_S: Final = 5.0

Drivers = Mapping[PciAddress, str]


class Cleaner:
    """Takes cards for guests and gives them back clean.

    Args:
        store: Where a reset is written down before it is begun, and quarantines are.
        sysfs: The tree.
        handover: Acts on PCI functions.
        nvml: None where NVML is not to be asked.
        hypervisor: Knows which domain has which function.
        boot_id: Of the server's present boot.
        metrics: Where resets are counted.
    """

    def __init__(
        self,
        store: Store,
        sysfs: Sysfs,
        handover: Handover,
        nvml: Nvml | None,
        hypervisor: Hypervisor,
        boot_id: str,
        metrics: Metrics,
    ) -> None:
        self._store = store
        self._sysfs = sysfs
        self._handover = handover
        self._nvml = nvml
        self._hypervisor = hypervisor
        self.boot_id = boot_id
        self._metrics = metrics
        self._releases: WeakValueDictionary[PciAddress, asyncio.Lock] = WeakValueDictionary()

    async def ask_nvml(self) -> Sequence[NvmlGpu]:
        """What NVML says of the cards that it sees at the moment."""
        return (await self._report()).gpus

    async def domains_of(self, functions: Collection[PciAddress]) -> dict[PciAddress, str]:
        """Those functions that a domain has, each with its domain's name.

        Raises:
            GpudError: libvirt cannot be asked.
        """
        passed = await self._hypervisor.passed_functions()
        return {one: passed[one] for one in functions if one in passed}

    async def take(self, functions: Collection[PciAddress]) -> None:
        """Bind to vfio-pci what is not bound to it yet.

        Raises:
            GpudError: A function could not be bound.
        """
        async with self._nvml_closed():
            await self._handover.bind(functions)

    async def clean(self, gpu: PciAddress, functions: Collection[PciAddress]) -> None:
        """Take a card that no domain has, reset it, and see that it is alive and the same.

        Raises:
            GpudError: It is not, or its last reset took the server down.
        """
        begun_in = self._store.resets_begun.get(gpu, self.boot_id)
        if begun_in != self.boot_id:
            raise _unusable(f"the server went down while {gpu} was being reset")
        await self.take(functions)
        before = await asyncio.to_thread(pci.read, self._sysfs.root)
        await self._store.begin_reset(gpu, self.boot_id)
        try:
            methods = await self._handover.reset(functions)
        except GpudError:
            self._metrics.resets.labels("unknown", "failed").inc()
            await self._store.end_reset(gpu)
            raise
        await self._store.end_reset(gpu)
        _log.info("GPU reset", methods={str(one): method for one, method in methods.items()})
        try:
            await self._prove_sane(gpu, functions, methods, before)
        except GpudError:
            self._count_resets(methods, "unproven")
            raise
        self._count_resets(methods, "ok")

    async def _prove_sane(
        self,
        gpu: PciAddress,
        functions: Collection[PciAddress],
        methods: Mapping[PciAddress, str],
        before: pci.PciTree,
    ) -> None:
        function = before.get(gpu)
        if methods.get(gpu) == "pm" and function is not None and function.is_nvidia:
            raise _unusable(
                f"{gpu} has no reset but a change of its power state, which proves nothing"
            )
        await self._handover.verify(functions, before)

    def _count_resets(self, methods: Mapping[PciAddress, str], outcome: str) -> None:
        for method in methods.values():
            self._metrics.resets.labels(method, outcome).inc()

    async def give_back(self, former: Drivers) -> None:
        """Give functions back to the drivers they came with.

        Raises:
            GpudError: One did not get its driver back.
        """
        async with self._nvml_closed():
            await self._handover.give_back(former)

    async def sick(self, former: Drivers, gpus: Iterable[PciAddress]) -> dict[PciAddress, str]:
        """Those GPUs, of those back with NVIDIA's driver, that NVML does not find idle and well."""
        watched = [gpu for gpu in gpus if former.get(gpu) == pci.NVIDIA_DRIVER]
        if self._nvml is None or not watched:
            return {}
        report = await self._report()
        if not set(watched) <= {gpu.address for gpu in report.gpus}:
            await asyncio.sleep(_ASK_AGAIN_S)  # eight cards may take their time to come up
            report = await self._report()
        told = {gpu.address: _sickness(gpu) for gpu in report.gpus}
        unseen = [f"NVML does not see it after its guest: {report.problem or 'no reason given'}"]
        faults = {gpu: "; ".join(told.get(gpu, unseen)) for gpu in watched}
        return {gpu: fault for gpu, fault in faults.items() if fault}

    async def release(self, gpu: PciAddress) -> bool:
        """End a quarantine. What a guest had is cleaned first, and given back to its drivers.

        One at a time for each card: a second would go on cleaning what the first has let be sold.

        Returns:
            False when the card is not quarantined.

        Raises:
            GpudError: An instance has the card, or it is not well: it stays quarantined.
        """
        async with self._releases.setdefault(gpu, asyncio.Lock()):
            return await self._release(gpu)

    async def _release(self, gpu: PciAddress) -> bool:
        holder = self._holder(gpu)
        if holder is not None:
            raise GpudError(
                Code.GPU_BUSY,
                f"instance {holder} has GPU {gpu}",
                hint="release it when that has ended",
            )
        quarantine = self._store.quarantines.get(gpu)
        if quarantine is not None and quarantine.former_drivers:
            former = quarantine.former_drivers
            for function, domain in (await self.domains_of(former)).items():
                raise GpudError(Code.GPU_BUSY, f"{function} is in use by domain {domain}")
            await self._store.end_reset(gpu)  # the operator has seen that the server survived it
            await self.clean(gpu, former)
            await self.give_back(former)
            for fault in (await self.sick(former, [gpu])).values():
                raise _unusable(f"GPU {gpu}: {fault}")
        return await self._store.release(gpu)

    def _holder(self, gpu: PciAddress) -> str | None:
        for instance in self._store.live.values():
            if any(one.address == gpu for one in instance.grant.gpus):
                return instance.upstream_id
        return None

    async def _report(self) -> NvmlReport:
        return NvmlReport() if self._nvml is None else await self._nvml.report()

    def _nvml_closed(self) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._nvml is None else self._nvml.closed()


def _sickness(gpu: NvmlGpu) -> list[str]:
    """What an idle card must not show."""
    found = list(gpu.unhealthy)
    found += [f"used by process {process.pid} ({process.name})" for process in gpu.processes]
    if not gpu.processes and (gpu.memory_used_mib or 0) > _IDLE_MEMORY_MIB:
        found.append(f"{gpu.memory_used_mib} MiB of its memory are still in use")
    if gpu.mig_enabled:
        found.append("its guest switched MIG on (nvidia-smi -mig 0)")
    if gpu.ecc_pending:
        found.append("its guest changed the ECC mode (nvidia-smi -e 1)")
    return found


def _unusable(detail: str) -> GpudError:
    return GpudError(Code.GPU_UNUSABLE, detail)
