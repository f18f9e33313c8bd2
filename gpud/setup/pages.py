"""Huge pages, where guests are made of them: how many, on which NUMA node, and how they are set aside.

Pages of 1 GiB are had at the kernel's start only, by its command line: later, memory is too scattered.
Those of 2 MiB are set aside through sysfs, by node, by systemd-tmpfiles at boot and at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from gpud.config import Config
from gpud.host.capacity import measure, reserve
from gpud.host.hugepages import mounted
from gpud.model import NumaNode
from gpud.setup import bootloader
from gpud.setup.change import MARK, Change, Item, by_hand, fine
from gpud.setup.parts import TextFile, Unit
from gpud.setup.seen import Seen
from gpud.setup.server import Server

FILE: Final = "/etc/tmpfiles.d/gpud-setup.conf"
_NAME: Final = "huge pages"
_GIGANTIC_KIB: Final = 1024 * 1024
_SIZES_KIB: Final = (2048, _GIGANTIC_KIB)
_ARGUMENTS: Final = ("hugepages=", "hugepagesz=")


@dataclass(frozen=True, slots=True)
class Pages:
    """Huge pages by NUMA node.

    Attributes:
        wanted: What guests need when all cards are sold, as far as the host can spare it.
        there: What is set aside now.
        short_mib: What cannot be spared of it.
    """

    size_kib: int
    wanted: Mapping[int, int]
    there: Mapping[int, int]
    short_mib: int

    @property
    def enough(self) -> bool:
        """Whether all that is wanted is there."""
        return all(self.there.get(node, 0) >= count for node, count in self.wanted.items())

    @property
    def words(self) -> str:
        """What is wanted, in words."""
        size = "1 GiB" if self.size_kib == _GIGANTIC_KIB else "2 MiB"
        by_node = ", ".join(f"{count} on NUMA node {node}" for node, count in self.wanted.items())
        return f"pages of {size}: {by_node}"


def pages(config: Config, server: Server, seen: Seen) -> Pages | None:
    """How many are wanted, and how many there are; None where guests are made of ordinary memory.

    Raises:
        GpudError: The host's memory cannot be read.
    """
    size_kib = config.guest.hugepage_kib
    if size_kib is None:
        return None
    pools = {one: _nodes(server, one) for one in _SIZES_KIB}
    ordinary = _nodes(server, None)
    total = tuple(
        NumaNode(
            one.number, 0, sum(pool[number].memory_mib for pool in (ordinary, *pools.values()))
        )
        for number, one in enumerate(ordinary)
    )
    spare = reserve(total, 0, round(config.host_reserve.memory_gib * 1024))
    needed = _needed(config, seen, [one.number for one in spare], size_kib)
    page_mib = size_kib // 1024
    wanted = {one.number: min(needed[one.number], one.memory_mib // page_mib) for one in spare}
    short = sum(needed.values()) - sum(wanted.values())
    there = {one.number: one.memory_mib // page_mib for one in pools[size_kib]}
    return Pages(size_kib, wanted, there, short * page_mib)


def _nodes(server: Server, size_kib: int | None) -> tuple[NumaNode, ...]:
    proc, sysfs = server.at("/proc"), server.sysfs.root
    return measure(server.root, size_kib, proc=proc, sysfs=sysfs).nodes


def _needed(config: Config, seen: Seen, nodes: list[int], size_kib: int) -> dict[int, int]:
    """Pages by node: where each card is; those of cards that tell no node are spread."""
    of_card = {
        offer.gpu_type: -(-round(offer.per_gpu.memory_gib * 1024) * 1024 // size_kib)
        for offer in config.offers
    }
    needed = dict.fromkeys(nodes, 0)
    for card in seen.cards:
        count = of_card[card.gpu_type or ""]
        if card.numa_node in needed:
            needed[card.numa_node] += count
        else:
            for node in nodes:
                needed[node] += -(-count // len(nodes))
    return needed


def arguments(server: Server, seen: Seen, found: Pages | None) -> tuple[str, ...]:
    """What our drop-in file should give the kernel for them."""
    if found is None or found.size_kib != _GIGANTIC_KIB or not any(found.wanted.values()):
        return ()
    ours = bootloader.arguments_of_ours(server)
    if not _of_ours(ours) and (found.enough or _of_ours(seen.arguments)):
        return ()  # somebody else sets them aside, which is said elsewhere
    counts = [f"{node}:{count}" for node, count in found.wanted.items() if count]
    # Node by node, which Linux knows since 5.16, unless there is one node only.
    plain = len(found.wanted) == 1
    return (
        "hugepagesz=1G",
        f"hugepages={counts[0].partition(':')[2] if plain else ','.join(counts)}",
    )


def _of_ours(told: tuple[str, ...]) -> bool:
    return any(one.startswith(_ARGUMENTS) for one in told)


def huge_pages(server: Server, seen: Seen, found: Pages | None) -> Iterator[Change | Item]:
    """Set them aside and have them mounted; the kernel's arguments are another change's."""
    if found is None:
        if server.exists(FILE):
            mend = f"rm {FILE}, and reboot; or guest.hugepages: 2M"
            yield by_hand(_NAME, f"guest.hugepages asks for none, and {FILE} sets some aside", mend)
        return
    if not any(found.wanted.values()):  # no card is here that is on offer
        return
    if found.short_mib:
        yield by_hand(
            _NAME,
            f"with all cards sold, guests would need {found.short_mib} MiB more than the host can spare",
            "offers: less per_gpu.memory_gib, or host_reserve.memory_gib: less",
        )
    if found.size_kib != _GIGANTIC_KIB and (server.exists(FILE) or not found.enough):
        yield _set_aside(server, found)
    elif found.enough:
        yield fine(_NAME, found.words)
    elif not _of_ours(bootloader.arguments_of_ours(server)) and _of_ours(seen.arguments):
        told = " ".join(one for one in seen.arguments if one.startswith(_ARGUMENTS))
        yield by_hand(
            _NAME,
            f"Linux is booted with {told}, which is too little: {found.words}",
            "the kernel takes each size once: change it where it is (grep -rn hugepages"
            " /etc/default/grub* /etc/kernel/cmdline), run update-grub, and reboot",
        )
    yield from _mount(server, seen, found.size_kib)


def _set_aside(server: Server, found: Pages) -> Change:
    lines = (
        f"w {_pool(server, node, found.size_kib)}/nr_hugepages - - - - {count}\n"
        for node, count in found.wanted.items()
    )
    return Change(
        name=_NAME,
        what=f"set aside {found.words}",
        why="guest.hugepages: guests are made of them when all cards are sold",
        undo=f"rm {FILE}, and a reboot",
        parts=(TextFile(FILE, MARK + "".join(lines)),),
        after=(f"systemd-tmpfiles --create {FILE}",),
        at_boot="memory that is scattered now gives the rest then",
        in_force=found.enough,
        warnings=("what they take is nobody else's from then on: the host keeps host_reserve",),
    )


def _pool(server: Server, node: int, size_kib: int) -> str:
    by_node = f"/sys/devices/system/node/node{node}/hugepages/hugepages-{size_kib}kB"
    return by_node if server.exists(by_node) else f"/sys/kernel/mm/hugepages/hugepages-{size_kib}kB"


def _mount(server: Server, seen: Seen, size_kib: int) -> Iterator[Change]:
    size = "1G" if size_kib == _GIGANTIC_KIB else "2M"
    unit = f"dev-hugepages{size}.mount"
    path = f"/etc/systemd/system/{unit}"
    if mounted(server.text("/proc/mounts"), size_kib) and not server.exists(path):
        return
    libvirt = next((one for one, state in seen.units.items() if state == "enabled"), None)
    yield Change(
        name=f"hugetlbfs of {size}",
        what=f"mount /dev/hugepages{size}",
        why="libvirt finds huge pages through a mount of their size",
        undo=f"systemctl disable --now {unit}; rm {path}",
        parts=(TextFile(path, _MOUNT.format(mark=MARK, size=size)), Unit(unit)),
        after=(f"systemctl try-restart {libvirt}",) if libvirt else (),
        after_undo=("systemctl daemon-reload",),
    )


_MOUNT: Final = """\
{mark}[Unit]
Description=Huge pages of {size} for guests
DefaultDependencies=no
Before=sysinit.target

[Mount]
What=hugetlbfs
Where=/dev/hugepages{size}
Type=hugetlbfs
Options=pagesize={size}

[Install]
WantedBy=sysinit.target
"""
