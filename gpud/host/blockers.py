"""What forbids a hand-over: everything that would make a bind fail, hang or endanger the host.

Each is told in words for the person who has to do something about it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from gpud.host.holders import Process, holders, nodes
from gpud.host.iommu import IommuFacts
from gpud.host.pci import PciFunction, PciTree
from gpud.host.sysfs import DRIVERS, DRIVERS_PROBE, Sysfs, attribute
from gpud.model import PciAddress

VFIO_PCI: Final = "vfio-pci"
"""The driver that gives a function to a guest."""

_VIABLE: Final = frozenset({None, VFIO_PCI, "pci-stub"})
"""Drivers that the other members of a group may have (drivers/vfio: a group is viable with these)."""

_AWAKE: Final = {"power/control": "on", "d3cold_allowed": "0"}
"""Files that keep a function out of D3, with the content that does."""


def blockers(
    sysfs: Sysfs, functions: Sequence[PciAddress], tree: PciTree, facts: IommuFacts
) -> tuple[str, ...]:
    """Look for everything that forbids binding ``functions`` to vfio-pci, but for ``in_use``.

    Args:
        sysfs: The tree that a bind would write to.
        functions: All that would be handed over together.
        tree: The host's PCI functions, read just now.
        facts: What its IOMMU does.

    Returns:
        One sentence for each; none where nothing is in the way.
    """
    found = [*_host(sysfs, facts)]
    present = []
    for address in functions:
        function = tree.get(address)
        if function is None or not function.answers or function.is_bridge:
            found.append(_no_endpoint(address, function))
        else:
            present.append(function)
            found += _function(sysfs, function, facts)
    found += _foreign(present, frozenset(functions), tree)
    found += _unwritable(sysfs, present)
    return tuple(found)


def in_use(
    sysfs: Sysfs,
    proc: Path,
    functions: Sequence[PciAddress],
    tree: PciTree,
    used_by: Mapping[PciAddress, Sequence[Process]],
) -> tuple[str, ...]:
    """Look for the processes that have ``functions`` open, which would make an unbind hang.

    Args:
        sysfs: The tree.
        proc: Where procfs is.
        functions: All that would be handed over together.
        tree: The host's PCI functions, read just now.
        used_by: What NVML says of processes that use a GPU.

    Returns:
        One sentence for each function in use.
    """
    present = [function for address in functions if (function := tree.get(address)) is not None]
    return tuple(
        f"{function.address} ({function.ids}) is in use by {named}: stop that first"
        for function in present
        if (named := _users(sysfs, proc, function, used_by.get(function.address, ())))
    )


def awake_files(sysfs: Sysfs, address: PciAddress) -> Iterator[tuple[Path, str]]:
    """What has to be written where, to keep a function out of D3; nothing if that was done."""
    for name, content in _AWAKE.items():
        path = attribute(address, name)
        if sysfs.text(path) not in {None, content}:
            yield path, content


def _host(sysfs: Sysfs, facts: IommuFacts) -> Iterator[str]:
    if not facts.present:
        yield (
            "the IOMMU is off: enable VT-d or AMD-Vi in the firmware, and boot Linux with"
            " intel_iommu=on (AMD needs no argument)"
        )
    elif not facts.interrupt_remapping:
        yield "the IOMMU does not remap interrupts" + (
            ", and vfio_iommu_type1.allow_unsafe_interrupts=1 must not make up for it: a guest could"
            " forge the host's interrupts; enable x2APIC and interrupt remapping in the firmware"
            if facts.unsafe_interrupts_allowed
            else ", so VFIO refuses its devices: enable x2APIC and interrupt remapping in the"
            " firmware, and see that Linux is not booted with intremap=off"
        )
    if not sysfs.exists(DRIVERS / VFIO_PCI):
        yield (
            "the driver vfio-pci is not loaded: modprobe vfio-pci, and name it in"
            " /etc/modules-load.d/ for the next boot"
        )


def _no_endpoint(address: PciAddress, function: PciFunction | None) -> str:
    if function is None:
        return f"{address} is not there: it fell off the bus or was taken out; look at dmesg"
    if function.is_bridge:
        return f"{address} ({function.ids}) is a PCI bridge, which stays with the host"
    return f"{address} ({function.ids}) does not answer: it fell off the bus; look at dmesg"


def _function(sysfs: Sysfs, function: PciFunction, facts: IommuFacts) -> Iterator[str]:
    if facts.present and function.iommu_group is None:
        yield f"{function.address} ({function.ids}) is in no IOMMU group: the IOMMU leaves it out"
    if function.address.function == 0 and not sysfs.exists(attribute(function.address, "reset")):
        yield f"{function.address} ({function.ids}) cannot be reset, so no guest may follow another on it"


def _foreign(
    present: Sequence[PciFunction], functions: frozenset[PciAddress], tree: PciTree
) -> Iterator[str]:
    """Members of the functions' groups that would stay with the host while a guest has the rest."""
    own_cards = {one.address for function in present for one in tree.card(function.address)}
    groups = {one.iommu_group for one in present if one.iommu_group is not None}
    for group in sorted(groups):
        for member in tree.group(group):
            if member.address in functions or member.is_inert:
                continue
            named = f"{member.address} ({member.ids}, {_driven(member.driver)})"
            if member.address not in own_cards:
                yield (
                    f"IOMMU group {group} holds a foreign device, {named}: move one of the cards to"
                    " another slot"
                )
            elif member.driver not in _VIABLE:
                yield (
                    f"IOMMU group {group} holds {named} too, which stays with the host: it has to be"
                    " handed over with its card"
                )


def _users(sysfs: Sysfs, proc: Path, function: PciFunction, used_by: Sequence[Process]) -> str:
    wanted = nodes(sysfs, proc, function.address, function.iommu_group)
    found = holders(proc, wanted, nvidia=function.driver == "nvidia")
    named = {one.pid: one.name for one in (*used_by, *found)}
    return ", ".join(f"{name} (pid {pid})" for pid, name in sorted(named.items()))


def _unwritable(sysfs: Sysfs, present: Sequence[PciFunction]) -> Iterator[str]:
    needed = [path for function in present for path in _written(function)]
    if present:
        needed += [DRIVERS_PROBE, DRIVERS / VFIO_PCI / "unbind"]
    refused = [
        os.fspath(sysfs.root / path)
        for path in dict.fromkeys(needed)
        if sysfs.exists(path) and not sysfs.writable(path)
    ]
    if refused:
        yield (
            f"gpud may not write {', '.join(refused)}: install systemd/71-gpud.rules in"
            " /etc/udev/rules.d, then udevadm control --reload && udevadm trigger --action=add"
            " --subsystem-match=pci; and see that gpud's unit leaves /sys writable"
        )


def _written(function: PciFunction) -> Iterator[Path]:
    """Every file that is written between the bind of a function and its return."""
    for name in (*_AWAKE, "driver_override", "reset", "reset_method"):
        yield attribute(function.address, name)
    if function.driver is not None:
        yield DRIVERS / function.driver / "unbind"


def _driven(driver: str | None) -> str:
    return f"driver {driver}" if driver else "no driver"
