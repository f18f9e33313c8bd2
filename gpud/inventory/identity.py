"""Whether the card at an address is the one that was there before, and what to remember of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from gpud.inventory.card import Reason, Why
from gpud.inventory.groups import is_virtual
from gpud.inventory.sighting import Sighting, full_ids
from gpud.model import KnownCard, PciAddress

Places = Mapping[str, PciAddress]
"""Where each UUID is."""


def places_before(sightings: Iterable[Sighting]) -> Places:
    """Where each card is remembered to have been."""
    return {one.known.uuid: one.address for one in sightings if one.known and one.known.uuid}


def changes(sighting: Sighting, before: Places) -> Iterator[Reason]:
    """How the card that is there differs from the one that is remembered there."""
    told = list(_differences(sighting))
    known_uuid = sighting.known.uuid if sighting.known is not None else None
    if sighting.seen is not None and sighting.seen.uuid not in {None, known_uuid}:
        came_from = before.get(sighting.seen.uuid)
        if came_from is not None:
            told.append(f"it was at {came_from} before")
    if told:
        yield Reason(
            Why.CHANGED,
            f"a different card than before: {', '.join(told)}",
            f"if that is right: gpud gpus confirm {sighting.address}",
        )


def _differences(sighting: Sighting) -> Iterator[str]:
    known, seen, function = sighting.known, sighting.seen, sighting.function
    if known is None:
        return
    if function is not None and known.ids != full_ids(function):
        yield f"its PCI ids are {full_ids(function)}, not {known.ids}"
    if seen is None:
        return
    if known.uuid and seen.uuid and known.uuid != seen.uuid:
        yield f"its UUID is {seen.uuid}, not {known.uuid}"
    if known.serial and seen.serial and known.serial != seen.serial:
        yield f"its serial number is {seen.serial}, not {known.serial}"


def news(sightings: Sequence[Sighting]) -> Iterator[KnownCard]:
    """What was learned that the record has not; nothing of cards that are in doubt."""
    before = places_before(sightings)
    for one in sightings:
        if one.function is None or is_virtual(one.function) or any(changes(one, before)):
            continue
        learned = _learned(one, one.known)
        if learned != one.known:
            yield learned


def as_it_is(sighting: Sighting) -> KnownCard | None:
    """The card that is there now, whatever was there before; None where there is none."""
    return _learned(sighting, None) if sighting.function is not None else None


def _learned(sighting: Sighting, known: KnownCard | None) -> KnownCard:
    seen = sighting.seen
    known = known or KnownCard(sighting.address, sighting.ids)
    if seen is None:
        return known
    return KnownCard(
        address=sighting.address,
        ids=sighting.ids,
        uuid=seen.uuid or known.uuid,
        serial=seen.serial or known.serial,
        name=seen.name or known.name,
        vram_mib=seen.vram_mib or known.vram_mib,
        nvlink_peers=tuple(sorted({*seen.nvlink_peers, *known.nvlink_peers})),
        nvswitch=seen.nvswitch or known.nvswitch,
    )
