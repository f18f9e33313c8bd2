"""nouveau, which takes NVIDIA cards where NVIDIA's own driver is missing, and draws consoles on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.setup import early
from gpud.setup.change import MARK, Change, Item, by_hand
from gpud.setup.parts import TextFile
from gpud.setup.seen import Seen
from gpud.setup.server import Server

FILE: Final = "/etc/modprobe.d/gpud-setup.conf"
_NOUVEAU: Final = "nouveau"
_BLACKLIST: Final = "blacklist nouveau"
_DIRECTORIES: Final = (
    "/etc/modprobe.d",
    "/run/modprobe.d",
    "/usr/lib/modprobe.d",
    "/lib/modprobe.d",
)


def nouveau(server: Server, seen: Seen) -> Iterator[Change | Item]:
    """Keep it from cards that are on offer."""
    held = [one.address for one in seen.cards if one.driver == _NOUVEAU]
    if not held and not server.exists(FILE):
        return
    elsewhere = _elsewhere(server)
    if elsewhere and not server.exists(FILE):
        yield by_hand(
            _NOUVEAU,
            f"{elsewhere} keeps it from being loaded, and yet it has {', '.join(map(str, held))}",
            f"{early.UPDATE}, and reboot",
        )
        return
    update = (early.UPDATE,) if early.has_initramfs_tools(server) else ()
    yield Change(
        name=_NOUVEAU,
        what="load nouveau no more",
        why="it has cards that are on offer, and its console keeps it from letting go of them",
        undo=f"rm {FILE} && {early.UPDATE}, and a reboot",
        parts=(TextFile(FILE, f"{MARK}{_BLACKLIST}\n"),),
        after=update,
        after_undo=update,
        at_boot="it keeps what it has until then",
        in_force=not held,
        warnings=tuple(_warnings(seen, bool(update))),
    )


def _warnings(seen: Seen, updates: bool) -> Iterator[str]:  # noqa: FBT001 - one caller, below its name
    others = [
        one
        for one in seen.tree.functions.values()
        if one.driver == _NOUVEAU and one.address not in {card.address for card in seen.cards}
    ]
    for one in others:
        yield f"{one.address} ({one.ids}), which is not on offer, is without it as well"
    for address in sorted(seen.boot_cards):
        yield (
            f"{address} shows this server's console, which the firmware draws from then on, or nobody:"
            " see that there is another way in (BMC, serial console, ssh)"
        )
    if not updates:
        yield "if the initramfs has nouveau, make it anew: initramfs-tools is not installed here"


def _elsewhere(server: Server) -> str:
    """The file of somebody else that keeps it from being loaded."""
    paths = (f"{one}/{name}" for one in _DIRECTORIES for name in server.names(one))
    for path in paths:
        lines = (" ".join(line.split()) for line in server.text(path).splitlines())
        if path != FILE and _BLACKLIST in lines:
            return path
    return ""
