"""What the kernel must be told so that the IOMMU confines cards to their guests.

Linux' admin-guide/kernel-parameters: Intel's IOMMU is used with ``intel_iommu=on``, where the kernel was
not built to use it anyway; AMD's is used unless it is turned off. With ``iommu=pt`` the host's own
devices do without translation, which costs I/O; those that guests have are translated all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.host import iommu
from gpud.setup import bootloader
from gpud.setup.change import Item, by_hand, fine
from gpud.setup.seen import Seen
from gpud.setup.server import Server

INTEL: Final = "GenuineIntel"
_INTEL_ON: Final = "intel_iommu=on"
_NO_TRANSLATION: Final = "iommu=pt"
_OFF: Final = ("iommu=off", "intel_iommu=off", "amd_iommu=off", "intremap=off")
_NAME: Final = "IOMMU"
_INTELS_TABLE: Final = "/sys/firmware/acpi/tables/DMAR"
_AMDS_TABLE: Final = "/sys/firmware/acpi/tables/IVRS"


def isolation(server: Server, seen: Seen) -> Iterator[Item]:
    """How the IOMMU is, as far as the kernel's arguments do not mend it."""
    off = [one for one in seen.arguments if one in _OFF]
    if off:
        yield by_hand(
            _NAME,
            f"Linux was booted with {' '.join(off)}",
            "take that out of the boot loader's configuration (grep -rn iommu /etc/default/grub*"
            " /etc/kernel/cmdline), run update-grub, and reboot",
        )
    elif not seen.iommu.present:
        yield from _absent(server, seen)
    elif found := tuple(iommu.obstacles(seen.iommu)):
        yield from (by_hand(_NAME, one.what, one.mend) for one in found)
    else:
        yield fine(_NAME, "on, and it remaps interrupts")


def _absent(server: Server, seen: Seen) -> Iterator[Item]:
    name = "VT-d" if _is_intels(server, seen) else "AMD-Vi (IOMMU)"
    if not _in_firmware(server):
        yield by_hand(
            _NAME,
            f"the firmware shows none: {name} is off, or this server has none",
            f"turn on {name} in the firmware's setup; then gpud setup again",
        )
    elif not _is_intels(server, seen) or _INTEL_ON in seen.arguments:
        yield by_hand(
            _NAME,
            "the firmware shows it, and Linux does not use it",
            "dmesg | grep -i -e DMAR -e AMD-Vi -e IOMMU tells why; an update of the firmware may help",
        )


def arguments(server: Server, seen: Seen) -> tuple[str, ...]:
    """What our drop-in file should give the kernel for the IOMMU's sake."""
    ours = bootloader.arguments_of_ours(server)
    wanted = []
    if _INTEL_ON in ours or _intel_on(server, seen):
        wanted.append(_INTEL_ON)
    usable = seen.iommu.present or _in_firmware(server)
    if _NO_TRANSLATION in ours or (usable and _undecided(seen)):
        wanted.append(_NO_TRANSLATION)
    return tuple(wanted)


def _intel_on(server: Server, seen: Seen) -> bool:
    """Whether the next boot would lack ``intel_iommu=on``, and need it."""
    if not _is_intels(server, seen) or any(one in _OFF for one in seen.arguments):
        return False
    if _INTEL_ON in seen.arguments:  # given by hand in GRUB's menu, this once
        config = server.text(bootloader.GRUB_CONFIG)  # empty for who may not read it
        return bootloader.is_grub(server) and bool(config) and _INTEL_ON not in config
    return not seen.iommu.present and _in_firmware(server)


def _undecided(seen: Seen) -> bool:
    told = any(one.startswith(("iommu=", "iommu.passthrough=")) for one in seen.arguments)
    return not (told or seen.untranslated)


def _in_firmware(server: Server) -> bool:
    """Whether the firmware tells of an IOMMU, by its ACPI table."""
    return server.exists(_INTELS_TABLE) or server.exists(_AMDS_TABLE)


def _is_intels(server: Server, seen: Seen) -> bool:
    """Whose IOMMU it is, or would be. An emulated server may have another's than its CPU."""
    if _in_firmware(server):
        return server.exists(_INTELS_TABLE)
    return seen.vendor == INTEL
