"""What is short, in words; and that it is short exactly where an order would be refused."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from gpud.bottleneck import bottleneck
from gpud.config import Offer
from gpud.inventory import Card, CardState, Reason, Why
from gpud.model import Grant, Host, NumaNode, PciAddress
from gpud.offers import shape_of
from tests.unit.fakes.orders import grant
from tests.unit.service import SETTINGS

OFFER = Offer.model_validate({**SETTINGS["offers"][0], "gpu_counts": [1, 2, 4]}, strict=False)
ROOM = Host(nodes=(NumaNode(0, 64, 256 * 1024),), storage_gib=4000)
BAD = (Reason(Why.NO_DRIVER, "no driver"),)


def card(number: int, state: CardState = CardState.AVAILABLE, **fields: object) -> Card:
    usual: dict[str, object] = {"gpu_type": "h100_sxm"}
    if state is not CardState.AVAILABLE:
        usual["reasons"] = BAD
    return Card(PciAddress(0, number, 0, 0), "x", state, **{**usual, **fields})  # type: ignore[arg-type]


def short(
    *cards: Card, gpu_count: int = 1, room: Host = ROOM, grants: tuple[Grant, ...] = ()
) -> str:
    gpus = tuple(gpu for card in cards if (gpu := card.gpu) is not None)
    host = replace(room, gpus=gpus)
    return bottleneck(OFFER, shape_of(OFFER, gpu_count), host, grants, cards)


def test_what_can_be_had_is_not_short() -> None:
    assert short(card(1)) == ""


def test_cards_that_are_not_here_are_said_not_to_be() -> None:
    assert short() == "no card of this type is in this server"
    assert short(card(1, gpu_type="l40s")) == "no card of this type is in this server"
    assert short(card(1), gpu_count=4) == "4 GPUs needed, this server has 1"


def test_where_the_cards_are_that_are_not_free_is_told() -> None:
    cards = (
        card(1),
        card(2, CardState.IN_USE),
        card(3, CardState.IN_USE),
        card(4, CardState.CLEANING),
        card(5, CardState.DRAINED),
        card(6, CardState.QUARANTINED),
        card(7, CardState.UNAVAILABLE),
        card(8, CardState.DRAINED, gpu_type="l40s"),
    )
    assert short(*cards, gpu_count=2) == (
        "2 GPUs needed, 1 of 7 free: 2 in use, 1 being cleaned, 1 drained, 1 quarantined,"
        " 1 unavailable (see gpud gpus)"
    )
    assert short(card(1, CardState.IN_USE)) == "1 GPU needed, 0 of 1 free: 1 in use"


def test_cards_that_only_go_together_are_told_so() -> None:
    together = [card(number, bundle="all") for number in range(4)]
    assert short(*together, gpu_count=4) == ""
    assert short(*together, gpu_count=2) == (
        "2 GPUs needed, and the 4 free ones only go together in sets that do not make it up"
    )


@pytest.mark.parametrize(
    ("room", "words"),
    [
        ({"nodes": (NumaNode(0, 3, 256 * 1024),)}, "4 CPU cores needed, 3 of 3 free"),
        ({"nodes": (NumaNode(0, 64, 15 * 1024),)}, "16 GiB of memory needed, 15 of 15 free"),
        ({"storage_gib": 99}, "100 GiB of disk needed, 99 of 99 free"),
        ({"addresses": ()}, "no guest address free, all 0 are in use"),
    ],
)
def test_room_beside_the_cards_is_told_with_how_much_there_is(
    room: dict[str, object], words: str
) -> None:
    assert short(card(1), room=replace(ROOM, **room)) == words  # type: ignore[arg-type]


def test_what_instances_have_is_taken_off() -> None:
    address = IPv4Address("10.0.0.2")
    room = replace(ROOM, addresses=(address,))
    held = replace(grant(9, shape=shape_of(OFFER, 1)), address=address)
    assert short(card(1), room=room) == ""
    assert short(card(1), room=room, grants=(held,)) == "no guest address free, all 1 are in use"
    small = replace(ROOM, nodes=(NumaNode(0, 6, 256 * 1024),))
    assert short(card(1), room=small, grants=(held,)) == "4 CPU cores needed, 2 of 6 free"
