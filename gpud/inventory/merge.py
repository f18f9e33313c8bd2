"""All sources merged into one list of cards. Pure: no clock, no files, no state of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from gpud.config import Gpus
from gpud.inventory.card import Card, CardState, Health, Reason, Why, state_of_idle
from gpud.inventory.facts import Facts, Record
from gpud.inventory.groups import components
from gpud.inventory.identity import changes, places_before
from gpud.inventory.reasons import holders, member, obstacles, reasons
from gpud.inventory.sighting import Sighting, sightings
from gpud.model import GPU_TYPES, PciAddress


def merge(facts: Facts, record: Record, config: Gpus) -> tuple[Card, ...]:
    """Every card of the host, sellable or not, in the order of their addresses.

    Args:
        facts: What the host says now.
        record: What is remembered, quarantined and claimed.
        config: Which ids are which type, and how NVSwitch boards are sold.
    """
    found = sightings(facts, record, config)
    bundles = components(_inseparable(found, config))
    nvlinks = components(_linked(found, config))
    partners = {one.address: _partners(one, found, bundles) for one in found}
    before = places_before(found)
    own = {
        one.address: (
            *changes(one, before),
            *reasons(one, facts, config, partners[one.address]),
        )
        or obstacles(one, facts)
        for one in found
    }
    cards = []
    for one in found:
        shared = _shared(one, partners[one.address], own)
        card = _card(one, (*own[one.address], *shared), found)
        cards.append(
            replace(
                card,
                used_by=holders(one, facts),
                bundle=bundles.get(one.address, ""),
                nvlink=nvlinks.get(one.address, ""),
            )
        )
    return tuple(cards)


def _inseparable(
    found: Sequence[Sighting], config: Gpus
) -> Iterator[tuple[PciAddress, PciAddress]]:
    """Pairs of cards of one type that share an IOMMU group, or a board that is sold whole."""
    for one in found:
        around = {function.address for function in one.surroundings}
        for other in found:
            shares_group = not around.isdisjoint(function.address for function in other.own)
            shares_board = config.nvswitch_board == "whole" and one.on_board and other.on_board
            if (
                one is not other
                and one.gpu_type is not None
                and one.gpu_type == other.gpu_type
                and (shares_group or shares_board)
            ):
                yield one.address, other.address


def _linked(found: Sequence[Sighting], config: Gpus) -> Iterator[tuple[PciAddress, PciAddress]]:
    """Pairs of cards that NVLink connects; NVSwitches do so only in the hands of one guest."""
    for one in found:
        for other in found:
            over_switches = config.nvswitch_board == "whole" and one.on_board and other.on_board
            if over_switches or other.address in one.nvlink_peers:
                yield one.address, other.address


def _partners(
    sighting: Sighting, found: Sequence[Sighting], bundles: Mapping[PciAddress, str]
) -> list[Sighting]:
    """The cards that this one is only ever given out together with."""
    bundle = bundles.get(sighting.address)
    return [
        other
        for other in found
        if bundle is not None and other is not sighting and bundles.get(other.address) == bundle
    ]


def _shared(
    sighting: Sighting, partners: Sequence[Sighting], own: Mapping[PciAddress, Sequence[Reason]]
) -> Iterator[Reason]:
    """What its partners have that forbids selling the card as well."""
    if sighting.claim is not None:
        return
    for other in partners:
        if own[other.address]:
            drained = all(one.why is Why.DRAINED for one in own[other.address])
            if drained and sighting.drains:  # which says it all
                continue
            obstacle = "which is drained" if drained else "which cannot be sold"
        elif other.claim is not None:
            obstacle = f"which instance {other.claim.upstream_id} has"
        else:
            continue
        yield Reason(Why.PARTNER, f"goes only together with {other.address}, {obstacle}")


def _card(sighting: Sighting, why_not: tuple[Reason, ...], found: Sequence[Sighting]) -> Card:
    function, told = sighting.function, sighting.told
    type_name = GPU_TYPES[sighting.gpu_type].name if sighting.gpu_type is not None else None
    return Card(
        address=sighting.address,
        ids=sighting.ids,
        state=_state(sighting, why_not),
        name=next((one.name for one in told if one.name), type_name),
        gpu_type=sighting.gpu_type,
        vram_mib=sighting.vram_mib,
        uuid=next((one.uuid for one in told if one.uuid), None),
        serial=next((one.serial for one in told if one.serial), None),
        numa_node=function.numa_node if function is not None else None,
        iommu_group=function.iommu_group if function is not None else None,
        group_members=tuple(map(member, sighting.surroundings)),
        functions=tuple(one.address for one in sighting.functions),
        driver=function.driver if function is not None else None,
        nvlink_peers=tuple(sorted(sighting.nvlink_peers)),
        pcie_peers=_pcie_peers(sighting, found),
        instance=sighting.claim.upstream_id if sighting.claim is not None else None,
        reasons=why_not,
        health=_health(sighting),
    )


def _state(sighting: Sighting, why_not: Sequence[Reason]) -> CardState:
    if sighting.quarantine is not None:
        return CardState.QUARANTINED
    if sighting.claim is not None:
        return sighting.claim.state
    return state_of_idle(why_not)


def _pcie_peers(sighting: Sighting, found: Sequence[Sighting]) -> tuple[PciAddress, ...]:
    """Cards below the same root port: what they send each other need not pass the CPU."""
    if sighting.function is None or not sighting.function.upstream:
        return ()
    return tuple(
        other.address
        for other in found
        if other is not sighting
        and other.function is not None
        and other.function.upstream[:1] == sighting.function.upstream[:1]
    )


def _health(sighting: Sighting) -> Health:
    seen = sighting.seen
    if seen is None:
        return Health()
    return Health(
        temperature_c=seen.temperature_c,
        power_w=seen.power_w,
        memory_used_mib=seen.memory_used_mib,
        ecc_uncorrected=seen.ecc_uncorrected,
        retired_pages=seen.retired_pages,
        retirement_pending=seen.retirement_pending,
        remap_pending=seen.remap_pending,
        vbios=seen.vbios,
        inforom=seen.inforom,
    )
