"""Cards that vfio-pci has from boot on, chosen by address.

``options vfio-pci ids=`` would take every card of a model, chosen or not. A udev rule comes too late:
udev loads a driver for one device while it has not yet seen the next, and that driver takes both. So a
script of the initramfs, run before udev, writes each function's ``driver_override``: from then on the
kernel offers the function to vfio-pci alone, in whatever order modules are loaded, and binds it when
vfio-pci comes (Linux: Documentation/ABI/testing/sysfs-bus-pci; initramfs-tools(7)).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from gpud.errors import Code, GpudError
from gpud.host.pci import VFIO_PCI, PciFunction
from gpud.inventory.card import Card
from gpud.model import PciAddress
from gpud.setup.change import MARK, Change, Item, by_hand
from gpud.setup.parts import TextFile
from gpud.setup.seen import Seen
from gpud.setup.server import Server

SCRIPT: Final = "/etc/initramfs-tools/scripts/init-top/00-gpud"
"""Scripts that wait for no other are run in the order of their names, and udev's is one of them."""
UPDATE: Final = "update-initramfs -u -k all"
ALL: Final = "all"
_NAME: Final = "early binding"
_KEPT: Final = re.compile(r"^keep (\S+) \S+$", re.MULTILINE)
_HEAD: Final = f"""#!/bin/sh
{MARK}# Lets nobody but vfio-pci have these PCI functions, before udev loads a driver.
[ "${{1-}}" = prereqs ] && exit 0

keep() {{
  device=/sys/bus/pci/devices/$1
  vendor='' model=''
  {{ read -r vendor <"$device/vendor" && read -r model <"$device/device"; }} 2>/dev/null
  if [ "$vendor:$model" != "$2" ]; then
    echo "gpud: at $1 is ${{vendor:-nothing}}:$model, not $2, so its driver may have it" >/dev/kmsg
    return
  fi
  echo {VFIO_PCI} >"$device/driver_override"
  # Drivers that are built into the kernel come before this script.
  [ ! -e "$device/driver" ] || echo "$1" >"$device/driver/unbind"
  echo "$1" >/sys/bus/pci/drivers_probe
}}

"""


def has_initramfs_tools(server: Server) -> bool:
    """Whether initramfs-tools makes the initramfs, which Debian and Ubuntu have by default."""
    return server.exists("/usr/sbin/update-initramfs")


def early_binding(server: Server, seen: Seen, chosen: Collection[str]) -> Iterator[Change | Item]:
    """The chosen cards on vfio-pci from boot on.

    Args:
        server: The host.
        seen: What is there.
        chosen: Addresses, or ``all``; empty for what was chosen before, if anything was.

    Raises:
        GpudError: An address is that of no card.
    """
    cards, left_out = _cards(server, seen, chosen)
    if left_out:
        named = ", ".join(map(str, left_out))
        yield by_hand(
            _NAME,
            f"{named} shows this server's console, so `all` leaves it out",
            f"--bind-early {named} as well, if the console may go dark at the next boot",
        )
    functions = [
        function
        for card in cards
        for address in card.functions or (card.address,)
        if (function := seen.tree.get(address)) is not None
    ]
    if not functions:
        return
    named = ", ".join(str(one.address) for one in functions)
    if not has_initramfs_tools(server):
        yield by_hand(
            _NAME,
            f"vfio-pci should have {named} from boot on, which needs initramfs-tools",
            "apt install initramfs-tools; or do without: gpud binds cards when they are ordered",
        )
        return
    yield Change(
        name=_NAME,
        what=f"let nobody but vfio-pci have {named}, from boot on",
        why="asked for by --bind-early: no driver of the host has to let go of a card any more",
        undo=f"rm {SCRIPT} && {UPDATE}, and a reboot",
        parts=(TextFile(SCRIPT, _HEAD + "".join(map(_line, functions)), mode=0o755),),
        after=(UPDATE,),
        after_undo=(UPDATE,),
        at_boot="drivers that have a card now keep it until then",
        in_force=all(one.driver == VFIO_PCI for one in functions),
        warnings=tuple(_warnings(seen, cards, functions)),
    )


def _line(function: PciFunction) -> str:
    return f"keep {function.address} {function.vendor:#06x}:{function.device:#06x}\n"


def _cards(
    server: Server, seen: Seen, chosen: Collection[str]
) -> tuple[list[Card], list[PciAddress]]:
    """The cards, and those that ``all`` leaves out."""
    if not chosen:
        kept = _KEPT.findall(server.text(SCRIPT))
        return [one for one in seen.cards if str(one.address) in kept], []
    named = [_named(seen, one) for one in chosen if one != ALL]
    if ALL not in chosen:
        return named, []
    left_out = seen.boot_cards - {one.address for one in named}
    return [one for one in seen.cards if one.address not in left_out], sorted(left_out)


def _named(seen: Seen, text: str) -> Card:
    """The card at an address, whichever of its functions that is of."""
    try:
        address = PciAddress.parse(text)
    except ValueError as error:
        raise GpudError(Code.GPU_NOT_FOUND, str(error)) from error
    for card in seen.cards:
        if address in {card.address, *card.functions}:
            return card
    there = ", ".join(str(one.address) for one in seen.cards) or "none"
    raise GpudError(
        Code.GPU_NOT_FOUND, f"{address} is no card on offer; of those there are: {there}"
    )


def _warnings(seen: Seen, cards: list[Card], functions: list[PciFunction]) -> Iterator[str]:
    for card in cards:
        if card.address in seen.boot_cards:
            yield (
                f"{card.address} shows this server's console: see that there is another way in"
                " (BMC, serial console, ssh)"
            )
    for one in functions:
        if one.address in seen.users and one.driver != VFIO_PCI:
            yield f"{one.address} is in use by {seen.users[one.address]}, which loses it at boot"
    yield (
        "NVML does not see cards that vfio-pci has from boot on: UUID, health and NVLink are then what it"
        " once told gpud, or not known"
    )
