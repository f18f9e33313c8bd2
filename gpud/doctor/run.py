"""The whole look at a server."""

from __future__ import annotations

import asyncio
import os
import resource
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from gpud import adminclient
from gpud.config import Config
from gpud.doctor import hypervisor, isolation, memory, network, port, sales, storage
from gpud.doctor.account import Account
from gpud.doctor.cards import cards
from gpud.doctor.cardview import CardView, view
from gpud.doctor.certificate import certificate
from gpud.doctor.check import Check, Group, Verdict
from gpud.doctor.clock import clock, kernel_status
from gpud.doctor.host import kvm, virtualisation
from gpud.doctor.image import image
from gpud.doctor.machine import Machine
from gpud.doctor.reach import reach
from gpud.doctor.tokens import tokens
from gpud.errors import GpudError
from gpud.host.capacity import Capacity, measure
from gpud.host.nvml import Nvml
from gpud.host.pci import VFIO_PCI
from gpud.host.sysfs import DRIVERS
from gpud.hypervisor.survey import Survey, survey
from gpud.inventory.facts import Record
from gpud.inventory.room import room_for_guests

_LIBVIRT_S: Final = 10.0
_SESSION: Final = "qemu:///session"
_BUS: Final = Check(Group.CARDS, "cards")
_CAPACITY: Final = Check(Group.MEMORY, "capacity")
_PLACES: Final = {group: place for place, group in enumerate(Group)}


async def examine(config: Config, socket: Path, machine: Machine) -> list[Verdict]:
    """Look at everything, and change nothing. What takes long runs side by side.

    Args:
        config: The daemon's.
        socket: Where the daemon listens, if it runs.
        machine: Where to look.
    """
    record, of_record = await asyncio.to_thread(storage.record, config.state_dir)
    asked, of_tokens, of_image, of_firewall, daemon_up, capacity = await asyncio.gather(
        _survey(config, machine),
        tokens(config.auth),
        image(config),
        port.firewall(config.server, is_root=machine.is_root),
        asyncio.to_thread(_answers, socket),
        asyncio.to_thread(_measure, config, machine),
    )
    daemon = Account.owner(config.state_dir)
    seen = await _view(config, machine, record, asked, daemon)
    found = [
        *_host(config, machine, asked),
        *_cards(config, machine, seen),
        *_memory(config, machine, capacity),
        *hypervisor.hypervisor(config, asked),
        *of_image,
        *storage.storage(config.state_dir, machine.text("self/mountinfo")),
        of_record,
        *network.guests(config, asked, machine),
        port.port(config.server, daemon_up=daemon_up),
        of_firewall,
        *await reach(config.server, daemon_up=daemon_up),
        *clock(kernel_status()),
        *certificate(config.server.tls, datetime.now(UTC), daemon),
        *of_tokens,
        *_sales(config, capacity, seen),
    ]
    return sorted(found, key=lambda one: _PLACES[one.group])


async def _survey(config: Config, machine: Machine) -> Survey | GpudError:
    try:
        return await survey(config.libvirt.uri, machine.text("cpuinfo"), _LIBVIRT_S)
    except GpudError as error:
        return error


async def _view(
    config: Config,
    machine: Machine,
    record: Record,
    asked: Survey | GpudError,
    daemon: Account | None,
) -> CardView | GpudError:
    domains = asked.passed if isinstance(asked, Survey) else {}
    nvml = Nvml(config.gpus.nvml_timeout_s) if config.gpus.nvml else None
    try:
        return await view(config, machine, record, domains, nvml, daemon)
    except GpudError as error:
        return error


def _measure(config: Config, machine: Machine) -> Capacity | GpudError:
    directory = storage.nearest(config.state_dir)
    try:
        return measure(
            directory, config.guest.hugepage_kib, proc=machine.proc, sysfs=machine.sysfs.root
        )
    except GpudError as error:
        return error


def _answers(socket: Path) -> bool:
    try:
        adminclient.get(socket, "/gpus")
    except GpudError:
        return False
    return True


def _host(config: Config, machine: Machine, asked: Survey | GpudError) -> Iterator[Verdict]:
    emulation = bool(config.gpus.stand_ins)
    qemu = None
    if config.libvirt.uri == _SESSION:  # its guests are the caller's own processes
        qemu = Account.of(machine.uid, os.getegid())
    elif isinstance(asked, Survey) and asked.qemu_ids is not None:
        qemu = Account.of(*asked.qemu_ids)
    yield from virtualisation(machine.text("cpuinfo"), emulation=emulation)
    yield from kvm(machine.dev / "kvm", qemu, emulation=emulation)


def _cards(config: Config, machine: Machine, seen: CardView | GpudError) -> Iterator[Verdict]:
    if isinstance(seen, GpudError):
        yield _BUS.failed(seen)
        return
    needed = not config.gpus.stand_ins
    groups = {one.iommu_group for one in seen.facts.tree.functions.values()} - {None}
    yield from isolation.isolation(seen.facts.iommu, len(groups), needed=needed)
    loaded = machine.sysfs.exists(DRIVERS / VFIO_PCI)
    yield from isolation.driver(loaded=loaded, needed=needed)
    yield from cards(seen, machine.sysfs, is_root=machine.is_root)


def _memory(config: Config, machine: Machine, found: Capacity | GpudError) -> Iterator[Verdict]:
    _, limit_bytes = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    yield from memory.memory_lock(config, limit_bytes)
    if isinstance(found, GpudError):
        yield _CAPACITY.failed(found)
    else:
        yield from memory.huge_pages(config, found.nodes, machine.text("self/mounts"))


def _sales(
    config: Config, capacity: Capacity | GpudError, seen: CardView | GpudError
) -> Iterator[Verdict]:
    if isinstance(capacity, Capacity) and isinstance(seen, CardView):
        yield from sales.sales(config, room_for_guests(config, capacity), seen.cards)
