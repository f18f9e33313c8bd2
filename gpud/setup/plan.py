"""The plan: what is to be changed, what is to be done by hand, and what waits for a reboot."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from gpud.config import Config
from gpud.host.boot import boot_id
from gpud.setup import bootloader, isolation, pages
from gpud.setup.access import access
from gpud.setup.change import Change, Item, State, by_hand, fine
from gpud.setup.early import early_binding
from gpud.setup.firmware import firmware
from gpud.setup.libvirt import image, libvirt, network
from gpud.setup.modules import modules
from gpud.setup.nouveau import nouveau
from gpud.setup.record import Record, load
from gpud.setup.seen import Seen, look
from gpud.setup.server import Server


async def plan(config: Config, server: Server, early: Collection[str] = ()) -> list[Item]:
    """Look at the server, and say of each thing what is left to do. Changes nothing.

    Args:
        config: The daemon's.
        server: Where to look.
        early: Cards to bind at boot: addresses, or ``all``; empty for those chosen before.

    Raises:
        GpudError: The server or the record of what was made cannot be read, or a card is not there.
    """
    seen, record = await look(config, server), load(server)
    found = [*_of_cards(config, server, seen, early), *_of_guests(config, server, seen)]
    return [await _judge(one, server, record) if isinstance(one, Change) else one for one in found]


def _of_cards(
    config: Config, server: Server, seen: Seen, early: Collection[str]
) -> Iterator[Change | Item]:
    if config.gpus.stand_ins:
        yield fine("cards", "stand-ins are sold, so the real ones and their IOMMU are left alone")
    elif not seen.cards:
        yield by_hand(
            "cards",
            "no card that is on offer is here",
            "offers: what this server has (gpud doctor); what such cards need is planned then",
        )
    else:
        yield from isolation.isolation(server, seen)
        yield from firmware(server, seen)
        yield from modules(server, seen)
        yield from nouveau(server, seen)
    if seen.cards:
        yield from early_binding(server, seen, early)


def _of_guests(config: Config, server: Server, seen: Seen) -> Iterator[Change | Item]:
    found = pages.pages(config, server, seen)
    iommu = isolation.arguments(server, seen) if seen.cards else ()
    huge = pages.arguments(server, seen, found)
    if arguments := (*iommu, *huge):
        reasons = []
        if iommu:
            reasons.append("cards are given to guests, confined by the IOMMU")
        if huge and found is not None:
            reasons.append(f"guest.hugepages sets aside {found.words}")
        yield bootloader.boot_with(server, arguments, seen.arguments, "; ".join(reasons))
    yield from pages.huge_pages(server, seen, found)
    yield from libvirt(config, seen)
    yield from access(server)
    yield network(config)
    yield image(config)


async def _judge(change: Change, server: Server, record: Record) -> Item:
    """What is left to do of a change."""
    in_the_way = [
        what
        for part in change.parts
        if (what := part.in_the_way(server, record.fingerprints(part.key)))
    ]
    if in_the_way:
        return by_hand(
            change.name,
            f"{change.what}: {', '.join(in_the_way)}, and is left as it is",
            "move it away, and gpud setup makes its own; or do by hand what it says here",
        )
    if not await _is_made(change, server, record):
        return Item(
            change.name, State.CHANGE, change.what, change.why,
            warnings=change.warnings, change=change,
        )  # fmt: skip
    if change.in_force:
        return fine(change.name, f"done: {change.what}")
    this_boot = record.boots.get(change.name) in {None, boot_id(server.at("/proc"))}
    if change.at_boot and this_boot:
        return Item(change.name, State.REBOOT, f"done: {change.what}", why=change.at_boot)
    since = "" if this_boot else ", although the server was booted since"
    return by_hand(
        change.name,
        f"done: {change.what}; and it is not in force{since}",
        f"look at dmesg; gpud doctor; undo: {change.undo}",
    )


async def _is_made(change: Change, server: Server, record: Record) -> bool:
    held = [await part.holds(server) for part in change.parts]
    return all(held) and not set(change.after) & set(record.pending) and is_proven(change, server)


def is_proven(change: Change, server: Server) -> bool:
    """Whether its commands came to what they should."""
    return change.proof is None or change.proof[1] in server.text(change.proof[0])
