"""Checks of what runs guests: the CPU, and the kernel's door to it."""

from __future__ import annotations

import grp
import pwd
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from gpud.doctor.account import READ, WRITE, Account
from gpud.doctor.check import Check, Group, Level, Verdict

_CPU: Final = Check(Group.HOST, "CPU")
_KVM: Final = Check(Group.HOST, "/dev/kvm")
_FLAG: Final = re.compile(r"^flags\s*:.*\b(vmx|svm)\b", re.MULTILINE)
_NAMES: Final = {"vmx": "Intel VT-x", "svm": "AMD-V"}


def virtualisation(cpuinfo: str, *, emulation: bool) -> Iterator[Verdict]:
    """Whether the CPU runs guests.

    Args:
        cpuinfo: Content of ``/proc/cpuinfo``.
        emulation: Guests may be emulated, since nothing real is sold.
    """
    found = _FLAG.search(cpuinfo)
    if found is not None:
        yield _CPU.ok(f"has {_NAMES[found[1]]}")
    else:
        yield _CPU.at(
            Level.NOTE if emulation else Level.FAULT,
            "no hardware virtualisation: guests are emulated, which is slow",
            "turn on VT-x or AMD-V (SVM) in the firmware; in a VM, nested virtualisation",
        )


def kvm(device: Path, qemu: Account | None, *, emulation: bool) -> Iterator[Verdict]:
    """Whether QEMU may use the kernel's hypervisor.

    Args:
        device: ``/dev/kvm``.
        qemu: Who QEMU runs as; None where that is not known.
        emulation: As for :func:`virtualisation`.
    """
    worst = Level.NOTE if emulation else Level.FAULT
    try:
        found = device.stat()
    except OSError:
        yield _KVM.at(worst, "is not there", "gpud setup loads KVM, now and at each boot")
        return
    mode = stat.S_IMODE(found.st_mode)
    seen = f"{mode:04o} {_user(found.st_uid)}:{_group(found.st_gid)}"
    as_it_should_be = f"chgrp kvm {device} && chmod 0660 {device}; gpud setup does it for good"
    if qemu is not None and not qemu.may(READ | WRITE, found):
        in_group = mode & stat.S_IRGRP and mode & stat.S_IWGRP
        join = f"usermod -aG {_group(found.st_gid)} {qemu.name} && systemctl restart libvirtd"
        mend = join if in_group else as_it_should_be
        yield _KVM.at(worst, f"{seen} keeps QEMU's user {qemu.name} out", mend)
    elif mode & stat.S_IRWXO:
        yield _KVM.note(f"{seen} is open to every user of this host", as_it_should_be)
    else:
        whose = f", and QEMU's user {qemu.name} may use it" if qemu is not None else ""
        yield _KVM.ok(f"{seen}{whose}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
