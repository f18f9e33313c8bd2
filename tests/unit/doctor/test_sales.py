"""What is on offer, against what the server has."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest

from gpud.doctor.check import Level, Verdict
from gpud.doctor.sales import sales
from gpud.inventory.card import Card, CardState, Reason, Why
from gpud.model import Host, NumaNode, PciAddress
from tests.unit.doctor.parts import level, make_config, named, offer, only

ROOM = Host(nodes=(NumaNode(0, 64, 256 * 1024),), storage_gib=4000)
BROKEN = Reason(Why.NO_DRIVER, "no driver")


def card(number: int, gpu_type: str | None = "h100_sxm", *reasons: Reason) -> Card:
    return Card(
        PciAddress(0, number, 0, 0), "x", CardState.AVAILABLE, gpu_type=gpu_type, reasons=reasons
    )


CARDS = (card(1), card(2))


def look(
    *cards: Card, room: Host = ROOM, offers: list[dict[str, Any]] | None = None
) -> list[Verdict]:
    config = make_config(offers=[offer()] if offers is None else offers)
    return list(sales(config, room, cards))


def test_offers_that_can_all_be_filled_are_well() -> None:
    found = look(*CARDS)
    assert {one.level for one in found} == {Level.OK}
    assert named(found, "offers")[1] == "h100_sxm x 1, 2: 2 of 2 cards can be sold"


def test_a_drain_is_no_fault_of_what_is_on_offer() -> None:
    drained = Reason(Why.DRAINED, "drained")
    found = look(card(1, "h100_sxm", drained), card(2, "h100_sxm", drained, BROKEN))
    assert named(found, "offers")[1] == "h100_sxm x 2: 1 of 2 cards can be sold"
    assert level(found, "offers") is Level.WARNING


def test_nothing_on_offer_is_a_fault() -> None:
    found = look(offers=[])
    assert level(found, "offers") is Level.FAULT
    assert {one.name for one in found} == {"offers", "host_reserve"}


def test_an_offer_of_cards_that_are_not_here_is_a_fault() -> None:
    found = look(card(1, "l40s"))
    assert [one.level for one in found if one.name == "offers"] == [Level.FAULT, Level.NOTE]


def test_cards_that_nobody_offers_are_a_note() -> None:
    found = [one for one in look(*CARDS, card(3, "l40s"), card(4, None)) if one.name == "offers"]
    assert (found[1].level, found[1].what) == (Level.NOTE, "l40s is here, and not on offer")


def test_a_count_that_no_cards_make_up_is_a_warning() -> None:
    found = named(look(*CARDS, offers=[offer(gpu_counts=[1, 2, 4, 8])]), "offers")
    assert found[:2] == (Level.WARNING, "h100_sxm x 4, 8: 2 of 2 cards can be sold")


def test_cards_that_can_all_not_be_sold_are_a_fault() -> None:
    found = named(look(card(1, "h100_sxm", BROKEN)), "offers")
    assert found[0] is Level.FAULT
    assert "see cards above" in found[2]


@pytest.mark.parametrize(
    ("room", "what", "mend"),
    [
        (replace(ROOM, nodes=(NumaNode(0, 7, 256 * 1024),)), "CPU cores", "per_gpu.cpu_cores"),
        (replace(ROOM, nodes=(NumaNode(0, 64, 20 * 1024),)), "memory", "per_gpu.memory_gib"),
        (replace(ROOM, storage_gib=150), "disk space", "per_gpu.storage_gib"),
    ],
)
def test_a_shape_too_large_for_the_server_is_a_warning(room: Host, what: str, mend: str) -> None:
    found = named(look(*CARDS, room=room), "offers")
    assert found == (
        Level.WARNING,
        f"h100_sxm x 2: not enough {what}, even if nobody else is here",
        f"offers: {mend}",
    )
    assert level(look(*CARDS, room=room), "room") is Level.WARNING


def test_without_addresses_nothing_can_be_sold() -> None:
    assert named(look(*CARDS, room=replace(ROOM, addresses=())), "offers")[2] == "network.subnet"
    one = (IPv4Address("10.77.0.2"),)
    assert level(look(*CARDS, room=replace(ROOM, addresses=one)), "offers") is Level.OK


def test_a_price_of_nothing_is_a_warning() -> None:
    free = offer(price_per_gpu_hour={"on_demand": "3.49", "spot": "0"})
    found = named(look(*CARDS, offers=[free]), "prices")
    assert found == (
        Level.WARNING,
        "h100_sxm spot: costs nothing",
        "offers: price_per_gpu_hour",
    )


def test_a_reserve_that_leaves_nothing_is_a_fault() -> None:
    found = named(
        look(*CARDS, room=Host(nodes=(NumaNode(0, 0, 512),), storage_gib=10)), "host_reserve"
    )
    assert found == (
        Level.FAULT,
        "leaves guests no cpu_cores, no memory_gib",
        "host_reserve.cpu_cores, host_reserve.memory_gib: less",
    )


def test_cards_that_cannot_be_sold_all_at_once_are_a_warning() -> None:
    config = [offer(gpu_counts=[1])]
    found = look(*CARDS, room=replace(ROOM, storage_gib=150), offers=config)
    assert level(found, "offers") is Level.OK
    assert named(found, "room")[1] == ("all cards at once take 200 GiB of disk, and there are 150")
    assert only(one for one in look(*CARDS) if one.name == "room")[0] is Level.OK
