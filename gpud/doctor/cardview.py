"""Reads the cards as the daemon's inventory would, from outside the daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gpud.config import Config
from gpud.doctor.account import Account, SysfsOf
from gpud.doctor.machine import Machine
from gpud.host import iommu, livebus
from gpud.host.nvml import Nvml, NvmlReport
from gpud.host.pci import NVIDIA_DRIVER, PciTree
from gpud.host.vfio import Handover
from gpud.inventory.card import Card
from gpud.inventory.facts import Facts, NvmlView, Record
from gpud.inventory.merge import merge
from gpud.inventory.obstacles import Obstacles
from gpud.inventory.room import stand_ins
from gpud.model import PciAddress


@dataclass(frozen=True, slots=True)
class CardView:
    """The cards, and what they were made out from.

    Attributes:
        nvml_problem: Why NVML told nothing; None where it did, or was not asked.
    """

    cards: tuple[Card, ...]
    facts: Facts
    nvml_problem: str | None = None


async def view(
    config: Config,
    machine: Machine,
    record: Record,
    domains: Mapping[PciAddress, str],
    nvml: Nvml | None,
    daemon: Account | None,
) -> CardView:
    """Look at the cards; with stand-ins, at no real ones.

    Args:
        config: Types, boards and stand-ins.
        machine: Where to look.
        record: What is remembered, quarantined and claimed.
        domains: Domains of libvirt by the PCI functions that they have.
        nvml: None where NVML is not to be asked.
        daemon: Who the daemon runs as; what root may write says nothing of what it may.

    Raises:
        GpudError: The PCI bus cannot be read.
    """
    tree = await livebus.read(machine.sysfs)
    isolation = await asyncio.to_thread(iommu.facts, machine.sysfs.root, machine.proc)
    facts = Facts(tree, isolation, domains=domains)
    if config.gpus.stand_ins:
        return CardView(tuple(stand_ins(config.gpus.stand_ins, record)), facts)
    report = NvmlReport() if nvml is None else await nvml.report()
    if nvml is not None:
        facts = replace(facts, nvml=_heard(report, tree))
    cards = merge(facts, record, config.gpus)
    sysfs = SysfsOf(machine.sysfs.root, daemon) if daemon and machine.is_root else machine.sysfs
    handover = Handover(sysfs, machine.proc)
    facts = replace(facts, obstacles=await Obstacles(handover).of(cards, facts))
    return CardView(merge(facts, record, config.gpus), facts, report.problem)


def _heard(report: NvmlReport, tree: PciTree) -> NvmlView:
    gpus = {gpu.address: gpu for gpu in report.gpus}
    driven = {one.address for one in tree.functions.values() if one.driver == NVIDIA_DRIVER}
    silent = driven - gpus.keys() if report.problem is None else ()
    return NvmlView(gpus, frozenset(silent), report.unplaced)
