"""What only the firmware's setup changes, beside the IOMMU and virtualisation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from gpud.host.bars import Placement
from gpud.inventory.card import Why
from gpud.model import PciAddress
from gpud.setup.change import Item, by_hand
from gpud.setup.seen import Seen
from gpud.setup.server import Server

_NAME: Final = "firmware"
_ABOVE: Final = (
    "turn on Above 4G Decoding (also called 64-bit MMIO) in the firmware's setup, and SR-IOV where it is"
    " beside it: both make room for large BARs"
)


def firmware(server: Server, seen: Seen) -> Iterator[Item]:
    """BARs without room, and IOMMU groups that the firmware could part."""
    functions = [one for card in seen.cards if (one := seen.tree.get(card.address)) is not None]
    placed = Placement.of(functions, server.sysfs)
    if placed.lost:
        yield by_hand(_NAME, f"{_named(placed.lost)}: a BAR has no address", _ABOVE)
    if placed.low:
        yield by_hand(
            _NAME, f"{_named(placed.low)}: below 4 GiB, where there is little room", _ABOVE
        )
    groups = {
        reason: [card.address for card in seen.cards if reason in card.reasons]
        for card in seen.cards
        for reason in card.reasons
        if reason.why is Why.FOREIGN_DEVICE
    }
    for reason, addresses in groups.items():
        yield by_hand(_NAME, f"{_named(addresses)}: {reason.what}", reason.mend)


def _named(addresses: Iterable[PciAddress]) -> str:
    return ", ".join(map(str, dict.fromkeys(addresses)))
