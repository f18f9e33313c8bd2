"""A card that changed place or identity is refused until the operator confirms it."""

from __future__ import annotations

from typing import Any

import pytest

from gpud.config import Gpus
from gpud.inventory import Why
from gpud.inventory.facts import Facts, Record
from gpud.inventory.identity import as_it_is, news
from gpud.inventory.sighting import Sighting, sightings
from gpud.model import KnownCard
from tests.unit.inventory.parts import (
    H100,
    at,
    facts,
    gpu,
    known,
    merged,
    nvml,
    only,
    record,
    virtual,
)


def learned(told: Facts, remembered: Record = Record()) -> list[KnownCard]:  # noqa: B008
    return list(news(sightings(told, remembered, Gpus())))


def sighting(told: Facts, remembered: Record = Record()) -> Sighting:  # noqa: B008
    (one,) = sightings(told, remembered, Gpus())
    return one


def test_the_same_card_is_fine_whether_nvml_sees_it_or_not() -> None:
    remembered = record(known("3b", serial="165"))
    seen = (nvml("3b", serial="165"),)
    assert only(facts(gpu("3b"), seen=seen), remembered).why_not == ()
    card = only(facts(gpu("3b", driver="vfio-pci")), remembered)
    assert card.why_not == ()
    assert (card.name, card.uuid, card.vram_mib) == (
        "NVIDIA GeForce RTX 4090",
        "GPU-0000003b",
        24564,
    )


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"uuid": "GPU-other"}, "its UUID is GPU-other, not GPU-0000003b"),
        ({"serial": "166"}, "its serial number is 166, not 165"),
    ],
)
def test_another_card_at_the_same_place_is_refused(now: dict[str, Any], words: str) -> None:
    told = facts(gpu("3b"), seen=(nvml("3b", **now),))
    card = only(told, record(known("3b", serial="165")))
    assert card.why_not == (
        f"a different card than before: {words} (if that is right: gpud gpus confirm 0000:3b:00.0)",
    )
    assert learned(told, record(known("3b", serial="165"))) == []


def test_other_ids_at_the_same_place_are_refused_without_nvml_too() -> None:
    card = only(facts(gpu("3b", H100, driver="vfio-pci")), record(known("3b")))
    assert [one.why for one in card.reasons] == [Why.CHANGED]
    assert "its PCI ids are 10de:2330 10de:16c1, not 10de:2684 10de:16c1" in card.why_not[0]


def test_two_cards_that_changed_places_are_both_refused() -> None:
    seen = (nvml("3b", uuid="GPU-0000003c"), nvml("3c", uuid="GPU-0000003b"))
    told = facts(gpu("3b"), gpu("3c"), seen=seen)
    cards = merged(told, record(known("3b"), known("3c")))
    assert "it was at 0000:3c:00.0 before" in cards[at("3b")].why_not[0]
    assert "it was at 0000:3b:00.0 before" in cards[at("3c")].why_not[0]


def test_a_card_that_moved_to_an_empty_place_is_refused() -> None:
    told = facts(gpu("3c"), seen=(nvml("3c", uuid="GPU-0000003b"),))
    cards = merged(told, record(known("3b")))
    assert "it was at 0000:3b:00.0 before" in cards[at("3c")].why_not[0]
    assert "fell off the bus" in cards[at("3b")].why_not[0]


def test_confirmed_at_its_new_place_it_is_sold_though_the_old_one_is_remembered() -> None:
    told = facts(gpu("3c"), seen=(nvml("3c", uuid="GPU-0000003b"),))
    cards = merged(told, record(known("3b"), known("3c", uuid="GPU-0000003b")))
    assert cards[at("3c")].gpu is not None


def test_what_nvml_tells_is_learned_once() -> None:
    told = facts(gpu("3b"), seen=(nvml("3b", nvlink_peers=(at("3c"),)),))
    first = learned(told)
    assert first == [known("3b", nvlink_peers=(at("3c"),))]
    assert learned(told, record(*first)) == []


def test_without_nvml_the_ids_are_learned() -> None:
    told = facts(gpu("3b", driver="vfio-pci"))
    assert learned(told) == [KnownCard(at("3b"), "10de:2684 10de:16c1")]
    assert learned(told, record(known("3b"))) == []


def test_what_nvml_leaves_out_is_not_forgotten() -> None:
    remembered = known("3b", serial="165", nvlink_peers=(at("3c"),), nvswitch=True)
    silent = nvml("3b", uuid=None, name=None, vram_mib=None, fault="fell off the bus")
    assert learned(facts(gpu("3b"), seen=(silent,)), record(remembered)) == []
    more = nvml("3b", nvlink_peers=(at("3d"),))
    (now,) = learned(facts(gpu("3b"), seen=(more,)), record(remembered))
    assert now.nvlink_peers == (at("3c"), at("3d"))
    assert (now.serial, now.nvswitch) == ("165", True)


def test_nothing_is_learned_of_what_is_not_there_or_virtual() -> None:
    assert learned(facts(virtual("3b:00.4"), seen=(nvml("3c"),))) == []


def test_confirming_takes_what_is_there_and_drops_what_was() -> None:
    seen = (nvml("3b", uuid="GPU-new"),)
    remembered = record(known("3b", serial="165", nvlink_peers=(at("3c"),)))
    assert as_it_is(sighting(facts(gpu("3b"), seen=seen), remembered)) == known(
        "3b", uuid="GPU-new"
    )
    assert as_it_is(sighting(facts(), remembered)) is None
