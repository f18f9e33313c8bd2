"""What there is beside the cards: room for guests, and a developer's stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.config import Config, StandIns
from gpud.host.capacity import Capacity, reserve
from gpud.inventory.card import Card, CardState, state_of_idle
from gpud.inventory.facts import Record
from gpud.inventory.reasons import drained, quarantined
from gpud.model import Host, PciAddress

# PCI domains of real machines have 16 bits, or start at 0x10000 behind Intel VMD; this is neither.
_STAND_IN_DOMAIN: Final = 0xFFFFFFFF


def room_for_guests(config: Config, capacity: Capacity) -> Host:
    """The host without its GPUs: what was measured, less the operator's reserve."""
    kept, network = config.host_reserve, config.network
    # The host itself does not live in huge pages.
    kept_mib = 0 if config.guest.hugepages else round(kept.memory_gib * 1024)
    return Host(
        nodes=reserve(capacity.nodes, kept.cpu_cores, kept_mib),
        storage_gib=max(0, capacity.storage_gib - kept.storage_gib),
        addresses=tuple(network.guest_addresses) if network.mode == "network" else None,
    )


def stand_ins(configured: list[StandIns], record: Record) -> Iterator[Card]:
    """Development only: the cards that stand for emulated devices."""
    types = [group.gpu_type for group in configured for _ in range(group.count)]
    for number, gpu_type in enumerate(types):
        address = PciAddress(_STAND_IN_DOMAIN, number, 0, 0)
        claim, quarantine = record.claims.get(address), record.quarantines.get(address)
        why_not = [quarantined(quarantine)] if quarantine is not None else []
        why_not += map(drained, record.drains_of(address))
        idle = CardState.QUARANTINED if quarantine is not None else state_of_idle(why_not)
        yield Card(
            address=address,
            ids="",
            state=claim.state if claim is not None else idle,
            reasons=tuple(why_not),
            name="stand-in for development",
            gpu_type=gpu_type,
            instance=claim.upstream_id if claim is not None else None,
            stand_in=True,
        )
