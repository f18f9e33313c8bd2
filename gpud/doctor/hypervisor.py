"""Checks of libvirt: that it is there, new enough, and has what guests need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.config import Config
from gpud.doctor.check import Check, Group, Level, Verdict
from gpud.errors import GpudError
from gpud.hypervisor.survey import Survey

_DAEMON: Final = Check(Group.LIBVIRT, "daemon")
_VERSION: Final = Check(Group.LIBVIRT, "version")
_TYPE: Final = Check(Group.LIBVIRT, "guests")
_FIRMWARE: Final = Check(Group.LIBVIRT, "firmware")
_OLDEST: Final = 9
"""libvirt of Debian 12; what gpud was tried with."""


def hypervisor(config: Config, found: Survey | GpudError) -> Iterator[Verdict]:
    """Whether libvirt can run what is sold."""
    if isinstance(found, GpudError):
        mends = (
            "gpud setup starts it, now and at each boot",
            found.hint,
            "as another user: sudo gpud doctor",
        )
        yield _DAEMON.fault(found.detail, "; ".join(filter(None, mends)))
        return
    yield _DAEMON.ok(f"answers at {config.libvirt.uri}")
    yield from version(found)
    yield from kind(config, found)
    yield from firmware(config, found)


def version(found: Survey) -> Iterator[Verdict]:
    """Whether it is new enough."""
    if found.major < _OLDEST:
        yield _VERSION.warning(
            f"{found.versions}; gpud was tried with {_OLDEST}.0 and later",
            "Debian 12, Debian 13 and Ubuntu 24.04 have it",
        )
    else:
        yield _VERSION.ok(found.versions)


def kind(config: Config, found: Survey) -> Iterator[Verdict]:
    """Whether guests are run by the CPU, or emulated."""
    asked = config.libvirt.domain_type
    chosen = found.best_type if asked == "auto" else asked
    if chosen == "kvm" and found.best_type != "kvm":
        yield _TYPE.fault("libvirt.domain_type is kvm, which cannot be had here", "see CPU above")
    elif chosen == "qemu" and not config.gpus.stand_ins:
        mend = "libvirt.domain_type: auto" if asked == "qemu" else "see CPU and /dev/kvm above"
        yield _TYPE.at(Level.FAULT, "are emulated (qemu), where real cards are sold", mend)
    elif chosen == "qemu":
        yield _TYPE.note("are emulated (qemu), slowly")
    else:
        yield _TYPE.ok("run on kvm")


def firmware(config: Config, found: Survey) -> Iterator[Verdict]:
    """Whether guests find the firmware that they boot with."""
    if config.guest.firmware == "bios":
        yield _FIRMWARE.ok("bios, which QEMU brings")
    elif found.firmwares is None:
        yield _FIRMWARE.note("libvirt does not tell which it has")
    elif "efi" not in found.firmwares:
        yield _FIRMWARE.fault(
            "libvirt finds no OVMF, and guest.firmware is uefi",
            "apt install ovmf && systemctl restart libvirtd",
        )
    else:
        yield _FIRMWARE.ok("uefi, OVMF is there")
