"""Cards that are still bound for a guest although nobody has them.

The kernel does not tell who bound a function to vfio-pci. The record does: it has the driver that gpud
found when it last took the function in this boot of the server. What had another driver then, and is
with vfio-pci now, was not brought back, or was bound so by the operator since; nothing tells these two
apart, so it is shown and not touched. What came with vfio-pci, or was not taken in this boot, is as
the operator wants it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

import structlog

from gpud.host.pci import VFIO_PCI
from gpud.host.sysfs import Sysfs
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.lifecycle.cards import held_functions
from gpud.model import Instance, PciAddress, Quarantine
from gpud.store import Store

_log = structlog.get_logger()

OVERRIDE_S: Final = 5.0
"""How long the kernel may take to tell of an override."""
_LOOKED_BACK: Final = 1000


def noted_drivers(instances: Iterable[Instance], boot_id: str) -> dict[PciAddress, str]:
    """The driver that each function had when it was last taken in this boot; no name for none.

    Args:
        instances: In the order in which they were accepted.
        boot_id: Of the present boot.
    """
    noted: dict[PciAddress, str] = {}
    for instance in instances:
        if instance.drivers_noted_in == boot_id:
            noted |= instance.former_drivers
    return noted


def candidates(
    noted: Mapping[PciAddress, str],
    held: Collection[PciAddress],
    quarantines: Iterable[Quarantine],
) -> list[PciAddress]:
    """Functions that had another driver than vfio-pci, and should have it again.

    Args:
        noted: From :func:`noted_drivers`.
        held: Functions that a live instance or a domain has.
        quarantines: Cards that wait for the operator stay as they are.
    """
    waiting = list(quarantines)
    slots = {one.address.slot for one in waiting}
    kept = {*held, *(function for one in waiting for function in one.former_drivers)}
    return sorted(
        function
        for function, driver in noted.items()
        if driver != VFIO_PCI and function not in kept and function.slot not in slots
    )


def strays(
    noted: Mapping[PciAddress, str],
    held: Collection[PciAddress],
    quarantines: Iterable[Quarantine],
    drivers: Mapping[PciAddress, str | None],
    overrides: Mapping[PciAddress, str],
) -> list[PciAddress]:
    """Those candidates that vfio-pci has, or is to have next."""
    return [
        function
        for function in candidates(noted, held, quarantines)
        if VFIO_PCI in {drivers.get(function), overrides.get(function)}
    ]


class StrayWatch:
    """Tells of strays, each once for as long as it is one.

    Args:
        store: Who has what, and had.
        hypervisor: Knows which domain has which function.
        sysfs: The tree.
        boot_id: Of the server's present boot.
    """

    def __init__(self, store: Store, hypervisor: Hypervisor, sysfs: Sysfs, boot_id: str) -> None:
        self._store = store
        self._hypervisor = hypervisor
        self._sysfs = sysfs
        self._boot_id = boot_id
        self._told: set[PciAddress] = set()

    async def look(self) -> None:
        """Look at all functions that were taken in this boot.

        Raises:
            GpudError: libvirt could not be asked, or the functions not be read.
        """
        noted = noted_drivers(reversed(await self._store.recent(_LOOKED_BACK)), self._boot_id)
        passed = await self._hypervisor.passed_functions()
        quarantines = self._store.quarantines.values()
        idle = candidates(noted, self._held() | passed.keys(), quarantines)
        overrides = await self._sysfs.overrides(idle, OVERRIDE_S)
        drivers = {one: self._sysfs.driver(one) for one in idle}
        # Again who has what: an order may have come meanwhile.
        found = strays(noted, self._held() | passed.keys(), quarantines, drivers, overrides)
        for function in set(found) - self._told:
            _log.error("bound to vfio-pci by nobody", function=str(function), had=noted[function])
            why = f"bound to {VFIO_PCI} by nobody; shown by `gpud check`, and left as it is"
            await self._store.note(why, gpu=function, was=noted[function], became=VFIO_PCI)
        self._told = set(found)

    def _held(self) -> set[PciAddress]:
        return held_functions(self._store.live.values())
