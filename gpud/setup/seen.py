"""What the plan is made from: one look at the server, which changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gpud.config import Config
from gpud.host import iommu, livebus
from gpud.host.holders import Holders
from gpud.host.iommu import IommuFacts
from gpud.host.pci import PciTree
from gpud.host.sysfs import attribute
from gpud.inventory.card import Card
from gpud.inventory.facts import Facts, Record
from gpud.inventory.merge import merge
from gpud.model import PciAddress
from gpud.setup.parts import unit_state
from gpud.setup.server import Server

LIBVIRT_UNITS: Final = (
    "libvirtd.service",
    "libvirtd.socket",
    "virtqemud.service",
    "virtqemud.socket",
)
"""libvirt as one daemon, as Debian and Ubuntu have it, and in parts."""
_IDENTITY: Final = "identity"


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen.

    Attributes:
        arguments: The kernel's, of this boot.
        vendor: The CPU's: ``GenuineIntel``, ``AuthenticAMD``.
        flags: The CPU's.
        untranslated: Some of the host's devices do without the IOMMU's translation.
        tree: The PCI bus.
        cards: The cards whose type is on offer.
        boot_cards: Those of them on which the firmware drew the console.
        users: The processes that have a function open, in words.
        units: State of each unit of libvirt that there is.
    """

    arguments: tuple[str, ...]
    vendor: str
    flags: frozenset[str]
    iommu: IommuFacts
    untranslated: bool
    tree: PciTree
    cards: tuple[Card, ...]
    boot_cards: frozenset[PciAddress]
    users: Mapping[PciAddress, str]
    units: Mapping[str, str]


async def look(config: Config, server: Server) -> Seen:
    """Look at the server.

    Raises:
        GpudError: The PCI bus cannot be read.
    """
    proc = server.at("/proc")
    facts = Facts(
        await livebus.read(server.sysfs),
        await asyncio.to_thread(iommu.facts, server.sysfs.root, proc),
    )
    on_offer = {offer.gpu_type for offer in config.offers}
    sells_real_cards = not config.gpus.stand_ins
    cards = tuple(
        card
        for card in merge(facts, Record(), config.gpus)
        if sells_real_cards and card.gpu_type in on_offer
    )
    states = {name: await unit_state(name) for name in LIBVIRT_UNITS}
    cpu = _cpu(server.text("/proc/cpuinfo"))
    return Seen(
        arguments=tuple(server.text("/proc/cmdline").split()),
        vendor=cpu.get("vendor_id", ""),
        flags=frozenset(cpu.get("flags", "").split()),
        iommu=facts.iommu,
        untranslated=_untranslated(server),
        tree=facts.tree,
        cards=cards,
        boot_cards=frozenset(
            one.address
            for one in cards
            if server.sysfs.text(attribute(one.address, "boot_vga")) == "1"
        ),
        users=await asyncio.to_thread(_users, server, facts.tree, cards),
        units={name: state for name, state in states.items() if state},
    )


def _cpu(cpuinfo: str) -> dict[str, str]:
    """What is told of the first CPU."""
    first = cpuinfo.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in first)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _untranslated(server: Server) -> bool:
    groups = "/sys/kernel/iommu_groups"
    return any(
        server.text(f"{groups}/{number}/type").strip() == _IDENTITY
        for number in server.names(groups)
    )


def _users(server: Server, tree: PciTree, cards: tuple[Card, ...]) -> dict[PciAddress, str]:
    functions = (tree.get(address) for card in cards for address in card.functions)
    holders = Holders(server.at("/proc"), {})
    found = {}
    for one in functions:
        if one is not None and (users := holders.of(server.sysfs, one)):
            found[one.address] = ", ".join(f"{user.name} (pid {user.pid})" for user in users)
    return found
