"""Kernel modules that are loaded at boot: vfio-pci, and KVM where it is not loaded by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.host.pci import VFIO_PCI
from gpud.host.sysfs import DRIVERS
from gpud.setup.change import MARK, Change, Item, by_hand, fine
from gpud.setup.isolation import INTEL
from gpud.setup.parts import TextFile
from gpud.setup.seen import Seen
from gpud.setup.server import Server

FILE: Final = "/etc/modules-load.d/gpud-setup.conf"
"""Not ``gpud.conf``, by which gpud's package has its own in ``/usr/lib``: it would take its place."""
_DIRECTORIES: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib")
"""Where systemd-modules-load looks; a file hides those of its name further back (modules-load.d(5))."""
_DEBIANS: Final = "/etc/modules"
_NAME: Final = "kernel modules"
_KVM: Final = "/dev/kvm"


def modules(server: Server, seen: Seen) -> Iterator[Change | Item]:
    """What has to be loaded at boot, and what the firmware keeps from being loaded."""
    if not seen.flags & {"vmx", "svm"}:
        yield by_hand(
            "virtualisation",
            "the CPU shows none: guests would be emulated, which is slow",
            "turn on VT-x or AMD-V (SVM) in the firmware's setup; in a VM, nested virtualisation",
        )
    ours = _named(server.text(FILE))
    wanted = [name for name, needed in _needed(server, seen) if needed or name in ours]
    if not wanted:
        yield fine(_NAME, f"{VFIO_PCI} is loaded at boot")
        return
    yield Change(
        name=_NAME,
        what=f"load {', '.join(wanted)}, now and at each boot",
        why="vfio-pci gives cards to guests, KVM runs them; nothing else loads them in time",
        undo=f"rm {FILE}; what is loaded stays so until the next boot",
        parts=(TextFile(FILE, MARK + "".join(f"{name}\n" for name in wanted)),),
        after=tuple(f"modprobe {name}" for name in wanted),
    )


def _needed(server: Server, seen: Seen) -> Iterator[tuple[str, bool]]:
    elsewhere = _elsewhere(server)
    loaded = server.sysfs.exists(DRIVERS / VFIO_PCI)
    yield VFIO_PCI, not loaded or not (VFIO_PCI in elsewhere or _is_built_in(server))
    kvm = "kvm_intel" if seen.vendor == INTEL else "kvm_amd"
    runs = bool(seen.flags & {"vmx", "svm"})
    yield kvm, runs and not server.exists(_KVM) and kvm not in elsewhere


def _is_built_in(server: Server) -> bool:
    """Whether the kernel has it inside: a loaded module has an ``initstate``, a built-in one has none."""
    return not server.exists("/sys/module/vfio_pci/initstate")


def _elsewhere(server: Server) -> set[str]:
    """The modules that files other than ours name."""
    files: dict[str, str] = {}
    for directory in (f"{one}/modules-load.d" for one in _DIRECTORIES):
        for name in server.names(directory):
            files.setdefault(name, f"{directory}/{name}")
    paths = [path for name, path in files.items() if name.endswith(".conf") and path != FILE]
    return {name for path in [*paths, _DEBIANS] for name in _named(server.text(path))}


def _named(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line.split()[0].replace("vfio_pci", VFIO_PCI) for line in lines if line[:1] not in "#;"]
