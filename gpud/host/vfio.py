"""The hand-over of PCI functions between the host's drivers and guests, and back.

Each act says what it leaves behind, looks before it writes, and can be repeated after a crash at any
point of it. None rolls anything back: the way back is :meth:`Handover.give_back`, like after any guest.

Companions (audio, USB, UCSI) leave before their card's first function, the GPU, and return after it:
they draw their power through it, and Linux suspends and shuts down consumers before suppliers too. A GPU
whose driver does not let go is found last, when there is little to take back.

The caller closes its own handles (NVML) first, and hands over what nobody holds: see ``check``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from gpud.errors import Code, GpudError
from gpud.host import alive, blockers, iommu, livebus
from gpud.host.binding import Binding
from gpud.host.holders import Holders, Process
from gpud.host.iommu import IommuFacts
from gpud.host.obstacle import Obstacle
from gpud.host.patience import DEFAULT_LIMITS, Limits, Patience
from gpud.host.pci import VFIO_PCI, PciFunction, PciTree
from gpud.host.reset import Resets
from gpud.host.sysfs import Sysfs, SysfsError, attribute
from gpud.model import PciAddress


class Handover:
    """Gives functions to ``vfio-pci``, and back to the drivers they came with.

    Args:
        sysfs: The tree.
        proc: Where procfs is.
        limits: How long things may take.
        sleep: Waits for seconds.
        clock: Seconds that only go forward.
    """

    def __init__(
        self,
        sysfs: Sysfs,
        proc: Path = Path("/proc"),
        limits: Limits = DEFAULT_LIMITS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sysfs = sysfs
        self._proc = proc
        self._limits = limits
        self._patience = Patience(sleep, clock)
        self._binding = Binding(sysfs, limits, self._patience)
        self._resets = Resets(sysfs, limits)

    async def check(
        self,
        functions: Sequence[PciAddress],
        used_by: Mapping[PciAddress, Sequence[Process]],
        persistence_off: Collection[PciAddress] = (),
    ) -> None:
        """Read the host anew, and see that nothing forbids a bind.

        Args:
            functions: All that would be handed over together.
            used_by: What NVML says of processes that use a GPU.
            persistence_off: The GPUs of which NVML says that they are not in persistence mode.

        Raises:
            GpudError: ``gpu_unusable`` with all that forbids it, or else ``gpu_busy`` with who has the
                functions open. Transient when the host cannot be read.
        """
        tree = await livebus.read(self._sysfs)
        facts = await asyncio.to_thread(iommu.facts, self._sysfs.root, self._proc)
        look = partial(blockers.blockers, self._sysfs, functions, tree, facts)
        if found := await asyncio.to_thread(look):
            raise GpudError(Code.GPU_UNUSABLE, "; ".join(map(str, found)))
        holders = await asyncio.to_thread(Holders, self._proc, used_by, persistence_off)
        look = partial(blockers.in_use, self._sysfs, functions, tree, holders)
        if found := await asyncio.to_thread(look):
            raise GpudError(Code.GPU_BUSY, "; ".join(map(str, found)))

    def obstacles(
        self,
        sets: Iterable[tuple[PciAddress, ...]],
        tree: PciTree,
        facts: IommuFacts,
        persistence_off: Collection[PciAddress] = (),
    ) -> dict[tuple[PciAddress, ...], tuple[Obstacle, ...]]:
        """What ``check`` would say of each of several sets, but for processes that only NVML sees.

        Processes are looked at once for all. Not for an event loop: it reads much of procfs.

        Args:
            sets: Functions that would be handed over together, once for each.
            tree: The host's PCI functions, read just now.
            facts: What its IOMMU does.
            persistence_off: As for ``check``.
        """
        holders = Holders(self._proc, {}, persistence_off)
        return {
            functions: (
                *blockers.blockers(self._sysfs, functions, tree, facts),
                *blockers.in_use(self._sysfs, functions, tree, holders),
            )
            for functions in sets
        }

    def former_drivers(self, functions: Iterable[PciAddress]) -> dict[PciAddress, str]:
        """The driver that each function has now; an empty name where it has none. Changes nothing.

        Raises:
            GpudError: ``gpu_unusable``: a function is gone.
        """
        former = {}
        for address in functions:
            self._present(address)
            former[address] = self._sysfs.driver(address) or ""
        return former

    async def bind(self, functions: Iterable[PciAddress]) -> None:
        """Bind functions to ``vfio-pci``, and keep them out of D3. Bridges are left alone.

        Raises:
            GpudError: ``gpu_unusable``: a function is gone, or its driver or vfio-pci did not do it.
        """
        for address in _companions_first(functions):
            self._present(address)
            if not self._is_bridge(address):
                await self._binding.take(address)

    async def reset(self, functions: Iterable[PciAddress]) -> dict[PciAddress, str]:
        """Reset functions, a card's first before its companions, and wait until they answer.

        Returns:
            The method that was used for each; ``pm`` proves little about a real GPU. Companions
            without any are not in it.

        Raises:
            GpudError: ``gpu_unusable``: a function is gone, cannot be reset or does not come back.
        """
        limits = self._limits
        methods = {}
        for address in _gpu_first(functions):
            self._present(address)
            method = await self._resets.reset(address)
            if method is not None:
                methods[address] = method
            if not await self._patience.until(partial(self._answers, address), limits.settle_s):
                raise _unusable(
                    f"{address} does not answer {limits.settle_s:g} s after its reset",
                    "look at dmesg; a power cycle of the server may bring it back",
                )
        return methods

    async def verify(
        self,
        functions: Iterable[PciAddress],
        expected: PciTree | Mapping[PciAddress, PciFunction],
    ) -> None:
        """See that functions are alive and the same: config space, ids, BARs, power state, group.

        Args:
            functions: What to look at.
            expected: What was there before the guest, at least of these functions.

        Raises:
            GpudError: ``gpu_unusable`` with everything that is wrong.
        """
        before = expected.functions if isinstance(expected, PciTree) else expected
        wrong = []
        for address in functions:
            self._present(address)
            if address not in before:
                raise _unusable(f"{address} has nothing to be compared with", "")
            header = await self._sysfs.config_header(address, self._limits.write_s)
            wrong += [
                f"{address}: {fault}"
                for fault in alive.faults(self._sysfs, header, before[address])
            ]
        if wrong:
            raise _unusable("; ".join(wrong), "look at dmesg before it is released")

    async def give_back(self, former: Mapping[PciAddress, str]) -> None:
        """Give functions back to the drivers they came with.

        A function that came with ``vfio-pci`` is on it since boot, and stays; one that came without
        a driver is left without.

        Args:
            former: What ``former_drivers`` found before the bind.

        Raises:
            GpudError: ``gpu_unusable``: a function is gone, or did not get its very driver back.
        """
        for address in _gpu_first(former):
            self._present(address)
            if self._is_bridge(address):
                continue
            if former[address] == VFIO_PCI:
                await self._binding.take(address)
            else:
                await self._binding.give(address, former[address])

    async def _answers(self, address: PciAddress) -> bool:
        try:
            return alive.answers(await self._sysfs.config_header(address, self._limits.write_s))
        except SysfsError as error:
            if error.errno is None:
                raise
            return False

    def _present(self, address: PciAddress) -> None:
        if not self._sysfs.exists(attribute(address, "vendor")):
            raise _unusable(
                f"{address} is gone from the bus", "it was taken out, or died; look at dmesg"
            )

    def _is_bridge(self, address: PciAddress) -> bool:
        return (self._sysfs.text(attribute(address, "class")) or "").startswith("0x0604")


def _companions_first(functions: Iterable[PciAddress]) -> list[PciAddress]:
    return sorted(functions, key=lambda address: (-address.function, address))


def _gpu_first(functions: Iterable[PciAddress]) -> list[PciAddress]:
    return sorted(functions, key=lambda address: (address.function, address))


def _unusable(detail: str, hint: str) -> GpudError:
    return GpudError(Code.GPU_UNUSABLE, detail, hint=hint)
