"""Which driver a PCI function is bound to, and how that is changed.

Through ``driver_override``, which concerns one function alone. ``new_id`` would make vfio-pci take every
card of a model, those that the host uses included.

``driver_override`` itself is never read: the kernel lets a reader of it wait, beyond the reach of any
signal, for as long as the function's driver is being unbound.
"""

from __future__ import annotations

from functools import partial

from gpud.errors import Code, GpudError
from gpud.host.blockers import awake_files
from gpud.host.patience import Limits, Patience
from gpud.host.pci import VFIO_PCI
from gpud.host.sysfs import DRIVERS, DRIVERS_PROBE, Sysfs, SysfsError, attribute
from gpud.model import PciAddress


class Binding:
    """Changes drivers, one function at a time. Every act can be repeated after a crash inside it.

    Args:
        sysfs: The tree.
        limits: How long things may take.
        patience: Waits for a driver to show up.
    """

    def __init__(self, sysfs: Sysfs, limits: Limits, patience: Patience) -> None:
        self._sysfs = sysfs
        self._limits = limits
        self._patience = patience

    async def take(self, address: PciAddress) -> None:
        """Bind a function to ``vfio-pci`` and keep it out of D3. Its override then stays.

        Nothing is written about the driver of a function that has ``vfio-pci`` already, whether by
        an override or because the module was told its ids at boot.

        Raises:
            GpudError: ``gpu_unusable``: its driver did not let go, or vfio-pci did not take it.
        """
        await self._keep_awake(address)
        driver = self._sysfs.driver(address)
        if driver == VFIO_PCI:
            return
        await self._override(address, VFIO_PCI)
        await self._unbind(address, driver)
        await self._probe(address, VFIO_PCI)
        await self._keep_awake(address)  # again, because vfio-pci lets what it takes go to D3

    async def give(self, address: PciAddress, driver: str) -> None:
        """Bind a function to ``driver``, or leave it without one where that is empty.

        The override names the driver until it has the function, so that no other can snatch it: not
        even vfio-pci, where it was told the card's ids. Thereafter nothing is overridden.

        Raises:
            GpudError: ``gpu_unusable``: vfio-pci did not let go, or ``driver`` did not take it.
        """
        bound = self._sysfs.driver(address)
        if bound != (driver or None):
            await self._override(address, driver)
            await self._unbind(address, bound)
            if driver:
                await self._probe(address, driver)
        await self._override(address, "")

    async def _keep_awake(self, address: PciAddress) -> None:
        for path, content in awake_files(self._sysfs, address):
            await self._sysfs.write(path, content, self._limits.write_s)

    async def _override(self, address: PciAddress, driver: str) -> None:
        """Let only ``driver`` have the function; with an empty name, which is a newline, any."""
        path = attribute(address, "driver_override")
        await self._sysfs.write(path, f"{driver}\n", self._limits.write_s)

    async def _unbind(self, address: PciAddress, driver: str | None) -> None:
        if driver is None:
            return
        try:
            await self._sysfs.write(
                DRIVERS / driver / "unbind", str(address), self._limits.driver_s
            )
        except SysfsError as error:
            raise GpudError(
                Code.GPU_UNUSABLE,
                f"{driver} did not let go of {address}: {error.detail}",
                hint="look at dmesg; if something still has it open, only a reboot frees it",
            ) from error

    async def _probe(self, address: PciAddress, driver: str) -> None:
        """Offer the function to the one driver that may have it, and see that it has taken it.

        The kernel calls a probe a success also when no driver took the function.
        """
        hint = f"look at dmesg, and see that the module of {driver} is loaded"
        try:
            await self._sysfs.write(DRIVERS_PROBE, str(address), self._limits.driver_s)
        except SysfsError as error:
            detail = f"{driver} did not take {address}: {error.detail}"
            raise GpudError(Code.GPU_UNUSABLE, detail, hint=hint) from error
        if not await self._patience.until(
            partial(self._has_driver, address, driver), self._limits.settle_s
        ):
            now = self._sysfs.driver(address) or "no driver"
            detail = f"{driver} did not take {address}, which has {now} now"
            raise GpudError(Code.GPU_UNUSABLE, detail, hint=hint)

    async def _has_driver(self, address: PciAddress, driver: str) -> bool:
        return self._sysfs.driver(address) == driver
