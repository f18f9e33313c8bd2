"""Drained cards, as the operator is told of them and as the allocator is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpud.config.machine import StandIns
from gpud.drains import Drain
from gpud.inventory import Card, CardState, Why
from gpud.inventory.facts import Record
from gpud.inventory.room import stand_ins
from gpud.model import PciAddress
from tests.unit.inventory.conftest import Server
from tests.unit.inventory.parts import at, facts, gpu, known, merged, only, record

SINCE = 1_800_000_000.0


def drained(remembered: Record, *places: str | None, reason: str = "") -> Record:
    addresses = [None if place is None else at(place) for place in places]
    return replace(remembered, drains={one: Drain(one, SINCE, reason) for one in addresses})


def test_a_drained_card_says_since_when_and_how_it_ends() -> None:
    card = only(facts(gpu("3b")), drained(record(), "3b"))
    assert (card.state, card.gpu) == (CardState.DRAINED, None)
    assert card.why_not == (
        "drained since 2027-01-15 08:00 UTC (undrain: gpud undrain --gpu 0000:3b:00.0)",
    )


def test_the_whole_servers_drain_is_each_cards() -> None:
    cards = merged(facts(gpu("3b"), gpu("3c")), drained(record(), None, reason="new kernel"))
    for card in cards.values():
        assert (card.state, card.gpu) == (CardState.DRAINED, None)
        (why,) = card.why_not
        assert why == (
            "the server is drained since 2027-01-15 08:00 UTC: new kernel"
            " (undrain: gpud undrain --all)"
        )


def test_both_drains_of_a_card_are_told() -> None:
    card = only(facts(gpu("3b")), drained(record(), "3b", None))
    assert [one.why for one in card.reasons] == [Why.DRAINED] * 2
    assert card.state is CardState.DRAINED


def test_a_drain_is_no_fault_to_the_instance_that_has_the_card() -> None:
    held = record(claimed={"3b": "i-1"})
    card = only(facts(gpu("3b", driver="vfio-pci")), drained(held, "3b"))
    assert (card.state, card.faults, card.first_faults) == (CardState.IN_USE, (), ())
    assert card.summary == "instance i-1; drained since 2027-01-15 08:00 UTC"


def test_a_quarantine_keeps_a_card_from_the_instance_that_does_not_have_it_yet() -> None:
    held = record(claimed={"3b": "i-1"}, quarantined={"3b": "hot"})
    card = only(facts(gpu("3b", driver="vfio-pci")), drained(held, "3b"))
    assert (card.state, card.faults) == (CardState.QUARANTINED, ())
    assert ["hot" in one for one in card.first_faults] == [True]


def test_a_card_that_is_cleaned_comes_out_drained() -> None:
    held = record(claimed={"3b": "i-1"}, releasing=True)
    assert only(facts(gpu("3b")), drained(held, "3b")).state is CardState.CLEANING
    assert only(facts(gpu("3b")), drained(record(), "3b")).state is CardState.DRAINED


def test_a_drained_card_with_a_fault_is_unavailable_and_says_both() -> None:
    card = only(facts(), drained(record(known("3b")), "3b"))
    assert card.state is CardState.UNAVAILABLE
    assert [one.why for one in card.reasons] == [Why.DRAINED, Why.GONE]


def test_a_card_that_was_swapped_stays_drained_until_the_operator_ends_that() -> None:
    other = gpu("3b", subsystem_device=0x1111)
    card = only(facts(other), drained(record(known("3b")), "3b"))
    assert {one.why for one in card.reasons} == {Why.CHANGED, Why.DRAINED}
    confirmed = only(facts(other), drained(record(), "3b"))
    assert confirmed.state is CardState.DRAINED


def test_a_place_without_a_card_is_not_shown_for_its_drain() -> None:
    assert merged(facts(gpu("3b")), drained(record(), "3c")).keys() == {at("3b")}


def two_in_a_group() -> tuple[Card, Card]:
    shared = facts(gpu("3b", iommu_group=7), gpu("3c", iommu_group=7))
    first, second = merged(shared, drained(record(), "3b")).values()
    return first, second


def test_a_partner_of_a_drained_card_is_not_sold_and_says_why() -> None:
    first, second = two_in_a_group()
    assert (first.gpu, second.gpu) == (None, None)
    assert second.state is CardState.UNAVAILABLE
    assert second.why_not == ("goes only together with 0000:3b:00.0, which is drained",)


def test_that_its_partner_is_drained_too_is_not_told_of_a_drained_card() -> None:
    shared = facts(gpu("3b", iommu_group=7), gpu("3c", iommu_group=7))
    for card in merged(shared, drained(record(), None)).values():
        assert (card.state, len(card.reasons)) == (CardState.DRAINED, 1)


def test_stand_ins_are_drained_like_cards() -> None:
    first = PciAddress(0xFFFFFFFF, 0, 0, 0)
    remembered = Record(drains={first: Drain(first, SINCE, "")})
    cards = list(stand_ins([StandIns(gpu_type="l40s", count=2)], remembered))
    assert [card.state for card in cards] == [CardState.DRAINED, CardState.AVAILABLE]
    assert [card.gpu is None for card in cards] == [True, False]


@pytest.mark.parametrize("what", [None, at("3b")])
async def test_a_drain_counts_at_once_and_so_does_its_end(
    server: Server, what: PciAddress | None
) -> None:
    server.has(gpu("3b"))
    view = server.inventory()
    await view.refresh()

    def sellable() -> int:
        return len(view.host.gpus)

    assert sellable() == 1
    await server.store.drain(what)
    assert sellable() == 0
    await server.store.undrain(what)
    assert sellable() == 1
