"""Whether cards are with those who have them, and told of as they are."""

from __future__ import annotations

from collections.abc import Iterator

from gpud.audit.facts import Facts, Finding, Kind, ToldCard
from gpud.host.pci import VFIO_PCI
from gpud.inventory.card import CardState
from gpud.lifecycle.cards import functions_of, held_functions
from gpud.lifecycle.strays import strays
from gpud.model import PciAddress

_CLAIMED = frozenset({CardState.IN_USE, CardState.CLEANING, CardState.QUARANTINED})
_NOT_SOLD = frozenset({CardState.QUARANTINED, CardState.DRAINED, CardState.UNAVAILABLE})


def cards(facts: Facts) -> Iterator[Finding]:
    """Cards in the wrong hands, bound for guests by nobody, or told of as what they are not."""
    yield from _elsewhere(facts)
    yield from _strays(facts)
    yield from _quarantined(facts)
    if facts.told is not None:
        told = {card.address: card for card in facts.told.cards}
        for card in facts.told.cards:
            yield from _told(card, facts)
        for gpu in sorted(facts.record.gpu_claims.keys() - told.keys()):
            yield _contradiction(gpu, "is claimed by the record, and the daemon does not list it")


def _contradiction(gpu: str, what: str) -> Finding:
    return Finding(
        Kind.CONTRADICTION, f"GPU {gpu}", what, "systemctl restart gpud (guests keep running)"
    )


def _elsewhere(facts: Facts) -> Iterator[Finding]:
    for instance in facts.record.live.values():
        for function in functions_of(instance.grant):
            domain = facts.passed.get(function, instance.domain_name)
            if domain != instance.domain_name:
                yield Finding(
                    Kind.DOUBLE_CLAIM,
                    instance.upstream_id,
                    f"was given {function}, which domain {domain} has",
                    f"have one of the two end: virsh destroy {domain}",
                )


def _strays(facts: Facts) -> Iterator[Finding]:
    record = facts.record
    held = held_functions(record.live.values())
    found = strays(
        record.noted,
        held | facts.passed.keys(),
        record.quarantines.values(),
        facts.drivers,
        facts.overrides,
    )
    for function in found:
        yield Finding(
            Kind.LEAK,
            f"PCI function {function}",
            f"is bound to {VFIO_PCI} by nobody; it had {_named(record.noted[function])} before its"
            " last guest",
            f"if you did not bind it so: {_give_back(function, record.noted[function])}",
        )


def _named(driver: str) -> str:
    return f"driver {driver}" if driver else "no driver"


def _give_back(function: PciAddress, driver: str) -> str:
    own, bus = f"/sys/bus/pci/devices/{function}", "/sys/bus/pci"
    return (
        f"echo '{driver}' > {own}/driver_override; echo {function} > {own}/driver/unbind;"
        f" echo {function} > {bus}/drivers_probe; echo > {own}/driver_override"
    )


def _quarantined(facts: Facts) -> Iterator[Finding]:
    for quarantine in facts.record.quarantines.values():
        if not quarantine.reason.strip():
            yield Finding(
                Kind.UNKNOWN,
                f"GPU {quarantine.address}",
                "is quarantined, and nobody knows why",
                f"gpud gpus quarantine {quarantine.address} --reason TEXT, or release it",
            )


def _told(card: ToldCard, facts: Facts) -> Iterator[Finding]:
    holder = facts.record.gpu_claims.get(card.address)
    record = facts.record
    kept_back = {*map(str, record.quarantines), *map(str, record.drains)}
    unsold = None in record.drains or card.address in kept_back
    if holder is not None and card.state not in _CLAIMED:
        yield _contradiction(card.address, f"is {card.state} for the daemon, and {holder} has it")
    elif holder is None and card.state in {CardState.IN_USE, CardState.CLEANING}:
        yield _contradiction(card.address, f"is {card.state} for the daemon, and nobody has it")
    elif card.state == CardState.AVAILABLE and (unsold or card.why_not):
        yield _contradiction(card.address, "is offered by the daemon, and must not be sold")
    elif card.state in _NOT_SOLD and not card.why_not:
        yield Finding(
            Kind.UNKNOWN,
            f"GPU {card.address}",
            f"is {card.state} without a reason",
            "report it: it is a defect of gpud",
        )
