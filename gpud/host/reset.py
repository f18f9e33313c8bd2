"""Which reset a PCI function gets between two guests, and how it is asked for.

The kernel lists what it can do to a function in ``reset_method`` (Linux 5.15 and later), in the order
in which it would try: gentlest first. Between two tenants the strongest is wanted:

1. ``device_specific``: written for this very device because the standard ways fail on it.
2. ``bus``, ``cxl_bus``: a hot reset through the bridge above. Nothing of the card stays as it was,
   and it is what makes a GPU's firmware boot again and clear its memory. Only for a function that is
   alone below its bridge, and not for cards the kernel knows to die of it.
3. ``acpi``: the firmware's own way (``_RST``), on boards that have one.
4. ``flr``, ``af_flr``: the function resets itself; how thoroughly is up to its maker.
5. ``pm``: to D3hot and back. PCI leaves open what that resets, so it proves little about a GPU.

So the functions of a GPU with companions, which share a bus, are reset one by one with what each has.
All of them at once, through the bridge, would take VFIO's hot reset (``VFIO_DEVICE_PCI_HOT_RESET``),
which wants ``/dev/vfio/GROUP`` open for each group below the bridge. That file belongs to QEMU's user,
not to gpud. QEMU asks for just that by itself at the start and the reset of a guest that has all the
functions below the bridge, which is one more reason to hand them over together.

The list may promise too much. It is made when a function is found, so the first of several has ``bus`` on
it, which turns out (EINVAL) when it is asked for. And a method may find out that it does not apply, or
could not be confirmed (ENOTTY), like ``bus`` below a bridge that does not report its link. In both
cases the next best is used, as the kernel itself would, but only while the function still answers. Any
other failure is final: a card that its reset does not bring back is not to be asked again and again.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Final

import structlog

from gpud.errors import Code, GpudError
from gpud.host.alive import answers
from gpud.host.patience import Limits
from gpud.host.sysfs import Sysfs, SysfsError, attribute
from gpud.model import PciAddress

STRONGEST_FIRST: Final = ("device_specific", "bus", "cxl_bus", "acpi", "flr", "af_flr", "pm")
"""Names of ``reset_method``, in the order in which gpud prefers them."""

KERNELS_CHOICE: Final = "kernel's choice"
"""The method of a kernel that resets but does not tell how (before 5.15)."""

_RANK: Final = {name: float(rank) for rank, name in enumerate(STRONGEST_FIRST)}
_UNKNOWN_RANK: Final = _RANK["pm"] - 0.5  # a name from a newer kernel is no worse than that

_MAYBE_ANOTHER: Final = {errno.EINVAL, errno.ENOTTY}
"""How the kernel says that it was the method that failed."""

_log = structlog.get_logger()


def by_strength(methods: list[str]) -> list[str]:
    """The methods that a function has, strongest first."""
    return sorted(methods, key=lambda name: _RANK.get(name, _UNKNOWN_RANK))


class Resets:
    """Resets functions, one at a time each.

    Args:
        sysfs: The tree.
        limits: How long the kernel may take.
    """

    def __init__(self, sysfs: Sysfs, limits: Limits) -> None:
        self._sysfs = sysfs
        self._limits = limits
        self._found: dict[PciAddress, str] = {}
        """Lists as they were, of functions whose reset did not come back and let nobody restore them."""

    async def reset(self, address: PciAddress) -> str | None:
        """Reset one function by its strongest method.

        Returns:
            The method; None for a companion (any function but a card's first) that has none.

        Raises:
            GpudError: ``gpu_unusable``: it has no reset, or the kernel could not do it.
        """
        sysfs, limits = self._sysfs, self._limits
        listed = self._listed(address)
        if listed == "" or not sysfs.exists(attribute(address, "reset")):
            if address.function == 0:
                raise _no_method(address)
            return None
        if listed is None:
            await sysfs.write(attribute(address, "reset"), "1", limits.reset_s)
            return KERNELS_CHOICE
        try:
            method = await _strongest_that_works(sysfs, address, listed, limits)
        except SysfsError as error:
            self._found[address] = listed
            if error.errno in _MAYBE_ANOTHER and " " not in listed:
                # Perhaps a reset that hung, before the daemon was restarted, left only this one.
                file = sysfs.root / attribute(address, "reset_method")
                error.hint = f"`echo default >{file}` has the kernel offer all methods it knows"
            if (
                error.errno is not None
            ):  # else the function is stuck, and this write would be as well
                with contextlib.suppress(SysfsError):
                    await self._restore(address, listed)
            raise
        await self._restore(address, listed)
        return method

    def _listed(self, address: PciAddress) -> str | None:
        """What the kernel lists, or listed before a method was chosen that never came back."""
        listed = self._sysfs.text(attribute(address, "reset_method"))
        found = self._found.get(address, "")
        return found if listed in found.split() else listed

    async def _restore(self, address: PciAddress, listed: str) -> None:
        """Put back the list as it was found, which an operator may have set.

        One that promised too much is not taken back; the kernel then makes a new one.
        """
        path = attribute(address, "reset_method")
        if self._sysfs.text(path) != listed:
            try:
                await self._sysfs.write(path, listed, self._limits.write_s)
            except SysfsError as error:
                if error.errno != errno.EINVAL:
                    raise
                await self._sysfs.write(path, "default", self._limits.write_s)
        self._found.pop(address, None)


async def _strongest_that_works(
    sysfs: Sysfs, address: PciAddress, listed: str, limits: Limits
) -> str:
    methods = by_strength(listed.split())
    while True:
        method = methods.pop(0)
        try:
            if methods or sysfs.text(attribute(address, "reset_method")) != method:
                await sysfs.write(attribute(address, "reset_method"), method, limits.write_s)
            await sysfs.write(attribute(address, "reset"), "1", limits.reset_s)
        except SysfsError as error:
            if not methods or not await _may_go_on(sysfs, address, error, limits.write_s):
                raise
            if error.errno == errno.ENOTTY:  # a list that promised too much is nothing to act on
                _log.warning("reset not confirmed", function=str(address), method=method)
        else:
            return method


async def _may_go_on(sysfs: Sysfs, address: PciAddress, error: SysfsError, write_s: float) -> bool:
    """Whether it was the method that failed, rather than the function."""
    if error.errno not in _MAYBE_ANOTHER:
        return False
    return answers(await sysfs.config_header(address, write_s))


def _no_method(address: PciAddress) -> GpudError:
    return GpudError(
        Code.GPU_UNUSABLE,
        f"{address} cannot be reset: the kernel offers no method for it",
        hint=f"see /sys/bus/pci/devices/{address}/reset_method; a power cycle of the server clears it",
    )
