"""Cards that go together: shared IOMMU groups, NVSwitch boards, NVLink, PCIe."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.host.pci import PciFunction
from gpud.inventory.groups import components
from gpud.model import PciAddress
from tests.unit.inventory.parts import (
    A100_PCIE,
    A100_SXM,
    H100,
    T4,
    at,
    audio,
    facts,
    gpu,
    known,
    merged,
    nvml,
    nvswitch,
    record,
)


def board(switches_in: int = 100, driver: str = "nvidia") -> list[PciFunction]:
    switches = [nvswitch(bus, iommu_group=switches_in) for bus in ("05", "06")]
    return [*switches, *(gpu(bus, H100, driver=driver) for bus in ("18", "2a", "3a"))]


def test_two_gpus_in_one_group_are_a_bundle_and_each_brings_its_own_functions() -> None:
    functions = [gpu("3b"), audio("3b:00.1"), gpu("3c", iommu_group=59)]
    cards = merged(facts(*functions, audio("3c:00.1", iommu_group=59)))
    assert [card.why_not for card in cards.values()] == [(), ()]
    assert {card.bundle for card in cards.values()} == {"0000:3b:00.0"}
    assert cards[at("3b")].functions == (at("3b"), at("3b:00.1"))
    assert cards[at("3c")].functions == (at("3c"), at("3c:00.1"))


def test_a_card_alone_has_no_bundle() -> None:
    assert {card.bundle for card in merged(facts(gpu("3b"), gpu("3c"))).values()} == {""}


def test_groups_of_companions_join_cards_as_well() -> None:
    cards = merged(
        facts(
            gpu("3b"), audio("3b:00.1", iommu_group=7), gpu("3c"), audio("3c:00.1", iommu_group=7)
        )
    )
    assert {card.bundle for card in cards.values()} == {"0000:3b:00.0"}


def test_cards_of_different_types_cannot_be_a_bundle() -> None:
    cards = merged(facts(gpu("3b"), gpu("3c", H100, iommu_group=59)))
    assert all("foreign device" in card.why_not[0] for card in cards.values())


def test_a_partner_that_cannot_be_sold_holds_the_bundle_back() -> None:
    told = facts(gpu("3b"), gpu("3c", iommu_group=59))
    cards = merged(told, record(quarantined={"3c": "hot"}))
    assert cards[at("3b")].why_not == (
        "goes only together with 0000:3c:00.0, which cannot be sold",
    )
    cards = merged(told, record(claimed={"3c": "i-1"}))
    assert cards[at("3b")].why_not == (
        "goes only together with 0000:3c:00.0, which instance i-1 has",
    )


def test_a_bundle_that_an_instance_has_is_fine() -> None:
    told = facts(gpu("3b"), gpu("3c", iommu_group=59))
    cards = merged(told, record(claimed={"3b": "i-1", "3c": "i-1"}))
    assert all(card.gpu is not None for card in cards.values())


def test_a_board_is_refused_until_the_config_says_how_to_sell_it() -> None:
    cards = merged(facts(*board()))
    assert [card.why_not for card in cards.values()] == [
        ("on an NVSwitch board (gpus.nvswitch_board: single or whole says how to sell it)",)
    ] * 3


def test_single_sells_the_gpus_of_a_board_without_its_switches() -> None:
    cards = merged(facts(*board()), nvswitch_board="single")
    assert [card.why_not for card in cards.values()] == [()] * 3
    assert {(card.bundle, card.nvlink) for card in cards.values()} == {("", "")}
    assert {len(card.functions) for card in cards.values()} == {1}


def test_single_never_hands_a_switch_over() -> None:
    cards = merged(facts(*board(switches_in=0x18)), nvswitch_board="single")
    assert "0000:05:00.0 (10de:22a3, NVSwitch, nvidia-nvswitch)" in cards[at("18")].why_not[0]
    assert cards[at("2a")].why_not == ()


@pytest.mark.parametrize("switches_in", [100, 0x18])
def test_whole_sells_the_board_at_once_the_switches_on_its_first_card(switches_in: int) -> None:
    cards = merged(facts(*board(switches_in)), nvswitch_board="whole")
    assert [card.why_not for card in cards.values()] == [()] * 3
    assert {(card.bundle, card.nvlink) for card in cards.values()} == {("0000:18:00.0",) * 2}
    assert cards[at("18")].functions == (at("18"), at("05"), at("06"))
    assert cards[at("2a")].functions == (at("2a"),)


def test_what_shares_a_group_with_the_switches_must_not_be_foreign() -> None:
    cards = merged(facts(*board(), gpu("77", T4, iommu_group=100)), nvswitch_board="whole")
    assert "foreign device in IOMMU group 100" in cards[at("18")].why_not[0]
    assert "goes only together" in cards[at("2a")].why_not[0]


def test_a_board_with_a_card_missing_is_not_whole() -> None:
    gone = known("4d", ids="10de:2330 10de:16c1", nvswitch=True, vram_mib=81559)
    cards = merged(facts(*board()), record(gone), nvswitch_board="whole")
    assert "goes only together with 0000:4d:00.0" in cards[at("18")].why_not[0]


def test_a_board_whose_switches_are_missing_is_not_whole() -> None:
    seen = (nvml("18", nvswitch=True, vram_mib=81559),)
    cards = merged(facts(gpu("18", H100), seen=seen), nvswitch_board="whole")
    assert "the NVSwitches of its board are not on the bus" in cards[at("18")].why_not[0]


def test_whole_is_nothing_to_a_server_without_a_board() -> None:
    cards = merged(facts(gpu("3b"), gpu("3c")), nvswitch_board="whole")
    assert [(card.bundle, card.why_not) for card in cards.values()] == [("", ())] * 2


def test_nvml_and_the_record_tell_which_card_is_on_a_board() -> None:
    seen = (nvml("3b", nvswitch=True),)
    assert "NVSwitch board" in merged(facts(gpu("3b"), seen=seen))[at("3b")].why_not[0]
    remembered = record(known("3b", nvswitch=True))
    on_vfio = facts(gpu("3b", driver="vfio-pci"))
    assert "NVSwitch board" in merged(on_vfio, remembered)[at("3b")].why_not[0]


def test_a_card_that_is_no_module_stands_beside_a_board() -> None:
    cards = merged(facts(nvswitch("05"), gpu("3b", A100_PCIE), gpu("3c", A100_SXM)))
    assert cards[at("3b")].why_not == ()
    assert "NVSwitch board" in cards[at("3c")].why_not[0]


def test_bridged_cards_are_one_component() -> None:
    seen = (
        nvml("3b", nvlink_peers=(at("3c"),)),
        nvml("3c", nvlink_peers=(at("3b"),)),
        nvml("5e"),
    )
    cards = merged(facts(gpu("3b"), gpu("3c"), gpu("5e"), seen=seen))
    assert [card.nvlink for card in cards.values()] == ["0000:3b:00.0", "0000:3b:00.0", ""]


def test_links_are_remembered_while_the_peer_is_in_a_guest() -> None:
    remembered = record(known("3b", nvlink_peers=(at("3c"),)))
    told = facts(gpu("3b"), gpu("3c", driver="vfio-pci"), seen=(nvml("3b"),))
    cards = merged(told, remembered)
    assert {card.nvlink for card in cards.values()} == {"0000:3b:00.0"}
    assert cards[at("3b")].nvlink_peers == (at("3c"),)


def test_cards_below_one_root_port_are_pcie_peers() -> None:
    left, right = (at("00:01.0"), at("10:00.0")), (at("00:01.0"), at("10:01.0"))
    cards = merged(
        facts(gpu("3b", upstream=left), gpu("3c", upstream=right), gpu("5e", upstream=(at("40"),)))
    )
    assert [card.pcie_peers for card in cards.values()] == [(at("3c"),), (at("3b"),), ()]


ADDRESSES = st.builds(lambda bus: PciAddress(0, bus, 0, 0), st.integers(0, 9))


@given(st.lists(st.tuples(ADDRESSES, ADDRESSES), max_size=12))
def test_components_are_named_by_their_lowest_member_and_joined_by_every_pair(
    pairs: list[tuple[PciAddress, PciAddress]],
) -> None:
    named = components(pairs)
    for one, other in pairs:
        assert one == other or named[one] == named[other]
    for name in set(named.values()):
        members = [member for member, its in named.items() if its == name]
        assert str(min(members)) == name
        assert len(members) > 1
