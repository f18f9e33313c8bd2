"""What stands between a passed-through device and the host's memory: facts about the IOMMU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud.host.obstacle import Obstacle

_NO_IOMMU: Final = "vfio-noiommu"
"""Name of the groups that VFIO makes up where there is no IOMMU (drivers/vfio/group.c)."""

_REMAPPED: Final = re.compile(rb"^ *\d+:[ 0-9]* IR-", re.MULTILINE)
"""A line of ``/proc/interrupts`` whose chip is behind interrupt remapping: ``IR-PCI-MSI``."""

_UNSAFE: Final = "allow_unsafe_interrupts"
_UNSAFE_MODULES: Final = ("vfio_iommu_type1", "iommufd")
_ACS_OVERRIDE: Final = "pcie_acs_override"


@dataclass(frozen=True, slots=True)
class IommuFacts:
    """What the IOMMU of a host does.

    Attributes:
        present: Devices are in IOMMU groups, so one can be confined to its guest's memory.
        interrupt_remapping: A device cannot forge another's interrupts.
        unsafe_interrupts_allowed: VFIO was told to pass devices through without that.
        acs_override: The kernel was told to split groups that the hardware does not keep apart.
    """

    present: bool
    interrupt_remapping: bool
    unsafe_interrupts_allowed: bool
    acs_override: bool


def facts(sysfs: Path = Path("/sys"), proc: Path = Path("/proc")) -> IommuFacts:
    """Read the facts. What cannot be read counts as not there.

    Args:
        sysfs: Where sysfs is.
        proc: Where procfs is.
    """
    arguments = _read(proc / "cmdline").decode("ascii", "replace").split()
    return IommuFacts(
        present=_present(sysfs / "kernel/iommu_groups"),
        interrupt_remapping=_REMAPPED.search(_read(proc / "interrupts")) is not None,
        unsafe_interrupts_allowed=any(
            _unsafe(sysfs / "module" / module / "parameters", f"{module}.{_UNSAFE}=", arguments)
            for module in _UNSAFE_MODULES
        ),
        acs_override=any(argument.split("=")[0] == _ACS_OVERRIDE for argument in arguments),
    )


def obstacles(iommu: IommuFacts) -> Iterator[Obstacle]:
    """What of it forbids giving any device of the host to a guest."""
    if not iommu.present:
        yield Obstacle(
            "the IOMMU is off",
            "turn on VT-d or AMD-Vi in the firmware; gpud setup has Linux use it (intel_iommu=on)",
        )
    elif not iommu.interrupt_remapping:
        made_up = ", and allow_unsafe_interrupts=1 must not make up for it"
        yield Obstacle(
            "the IOMMU does not remap interrupts, so a guest could forge the host's"
            + made_up * iommu.unsafe_interrupts_allowed,
            "turn on x2APIC and interrupt remapping in the firmware; no intremap=off",
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _present(groups: Path) -> bool:
    try:
        return any(
            _read(group / "name").strip() != _NO_IOMMU.encode() for group in groups.iterdir()
        )
    except OSError:
        return False


def _unsafe(parameters: Path, on_command_line: str, arguments: list[str]) -> bool:
    """The module's word where it is loaded; else what it will be told when it is."""
    told = _read(parameters / _UNSAFE).decode("ascii", "replace").strip()
    if not told:
        said = [
            one.removeprefix(on_command_line)
            for one in arguments
            if one.startswith(on_command_line)
        ]
        told = said[-1] if said else ""
    return told[:1] in {"Y", "y", "1"}
