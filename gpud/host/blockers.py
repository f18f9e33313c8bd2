"""What forbids a hand-over: everything that would make a bind fail, hang or endanger the host.

Each is told in words for the person who has to do something about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from gpud.host import iommu
from gpud.host.holders import Holders, node_names
from gpud.host.iommu import IommuFacts
from gpud.host.obstacle import Obstacle
from gpud.host.pci import VFIO_PCI, PciFunction, PciTree
from gpud.host.sysfs import DRIVERS, DRIVERS_PROBE, Sysfs, attribute
from gpud.model import PciAddress

_VIABLE: Final = frozenset({None, VFIO_PCI, "pci-stub"})
"""Drivers that the other members of a group may have (drivers/vfio: a group is viable with these)."""

_AWAKE: Final = {"power/control": "on", "d3cold_allowed": "0"}
"""Files that keep a function out of D3, with the content that does."""

_FRAMEBUFFER: Final = re.compile(r"fb\d+")
"""Where the kernel draws its console. A driver makes one for a card with a screen; that of the firmware
is below the card since Linux 6.9, and before that unseen: vfio-pci takes it away by itself since 6.0."""


def blockers(
    sysfs: Sysfs, functions: Sequence[PciAddress], tree: PciTree, facts: IommuFacts
) -> tuple[Obstacle, ...]:
    """Look for everything that forbids binding ``functions`` to vfio-pci, but for ``in_use``.

    Args:
        sysfs: The tree that a bind would write to.
        functions: All that would be handed over together.
        tree: The host's PCI functions, read just now.
        facts: What its IOMMU does.
    """
    found = [*iommu.obstacles(facts), *_driver(sysfs)]
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
    sysfs: Sysfs, functions: Sequence[PciAddress], tree: PciTree, holders: Holders
) -> tuple[Obstacle, ...]:
    """Look for the processes that have ``functions`` open, which would make an unbind hang.

    Args:
        sysfs: The tree.
        functions: All that would be handed over together.
        tree: The host's PCI functions, read just now.
        holders: Who has what open.

    Returns:
        One for each function in use.
    """
    found = []
    for address in functions:
        function = tree.get(address)
        users = () if function is None else holders.of(sysfs, function)
        if function is not None and users:
            named = ", ".join(f"{user.name} (pid {user.pid})" for user in users)
            mends = dict.fromkeys(user.mend for user in users)
            found.append(
                Obstacle(
                    f"{address} ({function.ids}) is in use by {named}",
                    "; ".join(mends),
                    tuple(f"process {user.pid} ({user.name})" for user in users),
                )
            )
    return tuple(found)


def awake_files(sysfs: Sysfs, address: PciAddress) -> Iterator[tuple[Path, str]]:
    """What has to be written where, to keep a function out of D3; nothing if that was done."""
    for name, content in _AWAKE.items():
        path = attribute(address, name)
        if sysfs.text(path) not in {None, content}:
            yield path, content


def _driver(sysfs: Sysfs) -> Iterator[Obstacle]:
    if not sysfs.exists(DRIVERS / VFIO_PCI):
        yield Obstacle(
            "the driver vfio-pci is not loaded",
            "gpud setup has it loaded, now and at each boot",
        )


def _no_endpoint(address: PciAddress, function: PciFunction | None) -> Obstacle:
    if function is None:
        return Obstacle(
            f"{address} is not there", "it fell off the bus or was taken out; look at dmesg"
        )
    named = f"{address} ({function.ids})"
    if function.is_bridge:
        return Obstacle(f"{named} is a PCI bridge, which stays with the host")
    return Obstacle(f"{named} does not answer", "it fell off the bus; look at dmesg")


def _function(sysfs: Sysfs, function: PciFunction, facts: IommuFacts) -> Iterator[Obstacle]:
    address, named = function.address, f"{function.address} ({function.ids})"
    if facts.present and function.iommu_group is None:
        yield Obstacle(f"{named} is in no IOMMU group", "see dmesg | grep -i iommu")
    if address.function == 0 and not sysfs.exists(attribute(address, "reset")):
        yield Obstacle(f"{named} cannot be reset, so no guest may follow another on it")
    nodes = node_names(sysfs, address) if function.is_display else ()
    for screen in sorted(filter(_FRAMEBUFFER.fullmatch, nodes)):
        yield Obstacle(
            f"{named} shows the host's console ({screen})",
            "let the firmware show it on other graphics, or boot Linux without it:"
            " initcall_blacklist=sysfb_init, and nvidia-drm.fbdev=0 where NVIDIA's driver draws it",
        )


def _foreign(
    present: Sequence[PciFunction], functions: frozenset[PciAddress], tree: PciTree
) -> Iterator[Obstacle]:
    """Members of the functions' groups that would stay with the host while a guest has the rest."""
    own_cards = {one.address for function in present for one in tree.card(function.address)}
    groups = {one.iommu_group for one in present if one.iommu_group is not None}
    for group in sorted(groups):
        for member in tree.group(group):
            if member.address in functions or member.is_inert:
                continue
            named = f"{member.address} ({member.ids}, {_driven(member.driver)})"
            if member.address not in own_cards:
                yield Obstacle(
                    f"IOMMU group {group} holds a foreign device, {named}",
                    "turn on ACS in the firmware, or move one of the two to another slot",
                )
            elif member.driver not in _VIABLE:
                yield Obstacle(
                    f"IOMMU group {group} holds {named} too, which stays with the host",
                    "it has to be handed over with its card",
                )


def _unwritable(sysfs: Sysfs, present: Sequence[PciFunction]) -> Iterator[Obstacle]:
    needed = [path for function in present for path in _written(function)]
    if present:
        needed += [DRIVERS_PROBE, DRIVERS / VFIO_PCI / "unbind"]
    refused = [
        os.fspath(sysfs.root / path)
        for path in dict.fromkeys(needed)
        if sysfs.exists(path) and not sysfs.writable(path)
    ]
    if refused:
        yield Obstacle(
            f"gpud may not write {len(refused)} of the files that a hand-over writes",
            "install systemd/71-gpud.rules in /etc/udev/rules.d, then udevadm control --reload &&"
            " udevadm trigger --action=add --subsystem-match=pci; see that gpud's unit leaves /sys"
            f" writable; the files: {', '.join(refused)}",
        )


def _written(function: PciFunction) -> Iterator[Path]:
    """Every file that is written between the bind of a function and its return."""
    for name in (*_AWAKE, "driver_override", "reset", "reset_method"):
        yield attribute(function.address, name)
    if function.driver is not None:
        yield DRIVERS / function.driver / "unbind"


def _driven(driver: str | None) -> str:
    return f"driver {driver}" if driver else "no driver"
