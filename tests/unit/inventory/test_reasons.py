"""Each reason for which a card is not sold: said in plain words, with its mend, beside all others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpud.host.nvml import HolderProcess
from gpud.inventory import CardState, Why
from tests.unit.inventory.parts import (
    A100_PCIE,
    AUDIO,
    ETHERNET,
    H100,
    HOST_BRIDGE,
    NO_IOMMU,
    NVME,
    PCI_BRIDGE,
    RTX_4090,
    SAFE,
    T4,
    at,
    audio,
    facts,
    gpu,
    known,
    merged,
    nvml,
    only,
    pci,
    record,
    virtual,
)


def test_a_healthy_card_is_available() -> None:
    card = only(facts(gpu("3b"), audio("3b:00.1"), seen=(nvml("3b"),)))
    assert card.why_not == ()
    assert card.state is CardState.AVAILABLE
    assert card.gpu is not None


def test_another_type_is_told_with_its_ids_and_where_to_map_it() -> None:
    card = only(facts(gpu("3b", T4)))
    assert card.why_not == (
        'not a GPU.ai type (10de:1eb8 10de:16c1) (if it is one: gpus.pci_ids: {"10de:1eb8": TYPE})',
    )
    assert card.gpu is None


def test_ids_that_the_config_maps_are_a_type() -> None:
    card = only(facts(gpu("3b", T4)), pci_ids={"10de:1eb8": "l40s"})
    assert (card.gpu_type, card.why_not) == ("l40s", ())


def test_the_config_maps_devices_of_any_vendor_and_class() -> None:
    nic = pci("3b", 0x10D3, ETHERNET, vendor=0x8086, driver="e1000e")
    twin = pci("3b:00.1", 0x10D3, ETHERNET, vendor=0x8086, driver="e1000e")
    card = only(facts(nic, twin), pci_ids={"8086:10d3": "rtx_4090"})
    assert card.gpu is not None
    assert card.functions == (at("3b"), at("3b:00.1"))


def test_memory_that_the_type_does_not_have() -> None:
    seen = nvml("3b", vram_mib=40960)
    card = only(facts(gpu("3b", T4), seen=(seen,)), pci_ids={"10de:1eb8": "l40s"})
    assert card.why_not == (
        'has 40960 MiB of memory, which no l40s has (mend gpus.pci_ids: "10de:1eb8")',
    )
    card = only(facts(gpu("3b", A100_PCIE), seen=(seen,)))
    assert card.why_not == ("has 40960 MiB of memory, which no a100_80gb has",)


@pytest.mark.parametrize(
    ("device", "vram_mib"),
    [(0x2335, 143771), (H100, 81559), (A100_PCIE, 81920), (0x26B9, 46068), (RTX_4090, 23028)],
)
def test_what_nvml_says_of_real_cards_is_the_memory_of_their_type(
    device: int, vram_mib: int
) -> None:
    card = only(facts(gpu("3b", device), seen=(nvml("3b", vram_mib=vram_mib),)))
    assert card.why_not == ()


def test_without_an_iommu_nothing_is_sold() -> None:
    card = only(facts(gpu("3b", iommu_group=None), iommu=NO_IOMMU))
    assert [one.why for one in card.reasons] == [Why.IOMMU]
    assert "the IOMMU is off" in card.why_not[0]
    assert "intel_iommu=on" in card.why_not[0]


def test_without_interrupt_remapping_nothing_is_sold() -> None:
    card = only(facts(gpu("3b"), iommu=replace(SAFE, interrupt_remapping=False)))
    assert "does not remap interrupts" in card.why_not[0]


def test_a_card_that_the_iommu_leaves_out() -> None:
    assert "in no IOMMU group" in only(facts(gpu("3b", iommu_group=None))).why_not[0]


def test_split_groups_are_not_believed() -> None:
    card = only(facts(gpu("3b"), iommu=replace(SAFE, acs_override=True)))
    assert "pcie_acs_override" in card.why_not[0]


def test_a_foreign_device_in_the_group_is_named() -> None:
    nvme = pci("3c", 0xA808, NVME, vendor=0x144D, driver="nvme", iommu_group=0x3B)
    card = only(facts(gpu("3b"), audio("3b:00.1"), nvme))
    assert card.why_not == (
        (
            "foreign device in IOMMU group 59: 0000:3c:00.0 (144d:a808, NVMe drive, nvme)"
            " (turn on ACS in the firmware, or move one of the two to another slot)"
        ),
    )
    assert len(card.group_members) == 3


def test_a_foreign_device_in_the_group_of_a_companion_counts_too() -> None:
    stranger = pci("00:1f.0", 0xA0C8, AUDIO, vendor=0x8086, iommu_group=70)
    card = only(facts(gpu("3b"), audio("3b:00.1", iommu_group=70), stranger))
    assert card.functions == (at("3b"), at("3b:00.1"))
    assert "0000:00:1f.0 (8086:a0c8, audio device, no driver)" in card.why_not[0]


def test_bridges_stay_behind_in_a_group() -> None:
    root_port = pci("00:01.1", 0x1483, PCI_BRIDGE, vendor=0x1022, driver="pcieport", iommu_group=59)
    placeholder = pci("00:01.0", 0x1482, HOST_BRIDGE, vendor=0x1022, iommu_group=59)
    assert only(facts(gpu("3b"), root_port, placeholder)).why_not == ()
    driven = replace(placeholder, driver="skl_uncore")
    assert "host bridge, skl_uncore" in only(facts(gpu("3b"), root_port, driven)).why_not[0]


def test_a_gpu_of_no_type_in_the_group_is_foreign() -> None:
    cards = merged(facts(gpu("3b"), gpu("3c", T4, iommu_group=0x3B)))
    assert "foreign device" in cards[at("3b")].why_not[0]


def test_a_process_of_the_host_is_named() -> None:
    process = HolderProcess(4242, "python3")
    card = only(facts(gpu("3b"), seen=(nvml("3b", processes=(process,)),)))
    assert card.why_not == ("used by process 4242 (python3) (stop it)",)
    assert card.holder == "process 4242 (python3)"
    assert card.state is CardState.UNAVAILABLE


@pytest.mark.parametrize("function", ["3b", "3b:00.1"])
def test_a_domain_that_has_any_of_its_functions_is_named(function: str) -> None:
    told = facts(gpu("3b"), audio("3b:00.1"), domains={at(function): "win11"})
    card = only(told)
    assert card.why_not == ("used by domain win11 (stop it)",)
    assert card.holder == "domain win11"


def test_an_instance_is_a_state_and_no_reason() -> None:
    told = facts(gpu("3b", driver="vfio-pci"), domains={at("3b"): "gpud-i-1"})
    card = only(told, record(known("3b"), claimed={"3b": "i-1"}))
    assert card.state is CardState.IN_USE
    assert (card.holder, card.instance, card.why_not) == ("i-1", "i-1", ())
    assert card.summary == "instance i-1"
    assert card.gpu is not None


def test_a_card_that_is_given_back_is_being_cleaned() -> None:
    card = only(facts(gpu("3b", driver=None)), record(claimed={"3b": "i-1"}, releasing=True))
    assert card.state is CardState.CLEANING
    assert card.why_not == ()


def test_what_happens_to_a_card_while_an_instance_has_it_is_told() -> None:
    held = record(known("3b"), claimed={"3b": "i-1"})
    assert "fell off the bus" in only(facts(), held).why_not[0]
    silent = gpu("3b", config_header=b"\xff" * 64)
    card = only(facts(silent), held)
    assert (card.state, card.summary) == (CardState.IN_USE, "instance i-1; does not answer")
    assert card.gpu is None


def test_no_driver() -> None:
    card = only(facts(gpu("3b", driver=None), audio("3b:00.1", driver=None)))
    assert card.why_not == ("no driver (load NVIDIA's, or bind the card to vfio-pci at boot)",)


def test_a_card_without_a_way_to_reset_it() -> None:
    functions = gpu("3b", reset_methods=()), audio("3b:00.1", reset_methods=())
    assert only(facts(*functions)).why_not == ("cannot be reset, so no guest may follow another",)
    assert only(facts(gpu("3b"), functions[1])).why_not == ()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"mig_enabled": True}, "MIG is on (nvidia-smi -i 0000:3b:00.0 -mig 0"),
        ({"ecc_pending": True}, "an ECC mode change is pending"),
        ({"retirement_pending": True}, "memory pages wait to be retired"),
        ({"remap_pending": True}, "memory rows wait to be remapped"),
        ({"remap_failed": True}, "a memory row could not be remapped"),
        ({"ecc_uncorrected": 3}, "3 uncorrected memory errors"),
        ({"fault": "needs a reset before it can be used again"}, "needs a reset"),
    ],
)
def test_what_nvml_says_against_a_card(told: dict[str, Any], words: str) -> None:
    card = only(facts(gpu("3b"), seen=(nvml("3b", **told),)))
    assert len(card.why_not) == 1
    assert words in card.why_not[0]


def test_a_fault_of_one_card_hides_no_other() -> None:
    told = facts(gpu("3b"), gpu("3c"), seen=(nvml("3b", fault="fell off the bus"), nvml("3c")))
    cards = merged(told)
    assert cards[at("3b")].why_not == ("fell off the bus",)
    assert cards[at("3c")].gpu is not None


def test_of_a_card_on_vfio_nvml_can_only_have_told_before() -> None:
    stale = nvml("3b", processes=(HolderProcess(1, "x"),), mig_enabled=True)
    assert only(facts(gpu("3b", driver="vfio-pci"), seen=(stale,))).why_not == ()


def test_a_card_that_nvml_does_not_know_though_its_driver_has_it() -> None:
    card = only(facts(gpu("3b"), silent=("3b",), unplaced=("card 2: needs a reset",)))
    assert "NVML does not know it (card 2: needs a reset)" in card.why_not[0]
    assert only(facts(gpu("3b", driver="vfio-pci"), silent=("3b",))).why_not == ()


def test_until_nvml_was_heard_its_cards_are_not_sold() -> None:
    cards = merged(facts(gpu("3b"), gpu("3c", driver="vfio-pci"), awaited=True))
    assert cards[at("3b")].why_not == ("NVML has not answered yet",)
    assert cards[at("3c")].gpu is not None


def test_a_card_that_nvml_sees_and_pci_does_not_fell_off_the_bus() -> None:
    card = only(facts(seen=(nvml("3b"),)))
    assert card.ids == "10de:2684 10de:16c1"
    assert "fell off the bus" in card.why_not[0]


def test_a_card_that_is_remembered_but_gone_fell_off_the_bus() -> None:
    card = only(facts(), record(known("3b", serial="165")))
    assert card.gpu_type == "rtx_4090"
    assert (card.uuid, card.serial, card.vram_mib) == ("GPU-0000003b", "165", 24564)
    assert "gpud gpus confirm 0000:3b:00.0" in card.why_not[0]


def test_another_device_where_a_card_was_is_not_taken_for_it() -> None:
    card = only(facts(pci("3b", 0xA808, NVME, vendor=0x144D)), record(known("3b")))
    assert "fell off the bus" in card.why_not[0]
    assert card.functions == ()


def test_a_quarantined_card_that_nobody_knows_any_more_is_still_told() -> None:
    card = only(facts(), record(quarantined={"3b": "its reset failed"}))
    assert card.state is CardState.QUARANTINED
    assert [one.why for one in card.reasons] == [Why.QUARANTINED, Why.NOT_A_TYPE, Why.GONE]


def test_a_quarantine_says_since_when_and_why_and_how_it_ends() -> None:
    card = only(facts(gpu("3b")), record(quarantined={"3b": "its reset failed"}))
    assert card.state is CardState.QUARANTINED
    assert card.why_not == (
        (
            "quarantined since 1970-01-01 00:00 UTC: its reset failed"
            " (after a look at it: gpud gpus release 0000:3b:00.0)"
        ),
    )
    assert card.gpu is None


def test_a_quarantine_is_no_fault_to_the_instance_that_has_the_card() -> None:
    told = facts(gpu("3b", driver="vfio-pci"))
    card = only(told, record(quarantined={"3b": "hot"}, claimed={"3b": "i-1"}))
    assert card.state is CardState.QUARANTINED
    assert card.faults == ()
    assert card.summary == "instance i-1; quarantined since 1970-01-01 00:00 UTC: hot"


def test_a_silent_companion_is_named() -> None:
    card = only(facts(gpu("3b"), audio("3b:00.1", config_header=b"\xff" * 64)))
    assert "its audio device 0000:3b:00.1 does not answer" in card.why_not[0]


def test_virtual_functions_are_neither_sold_nor_handed_over() -> None:
    cards = merged(facts(gpu("3b", A100_PCIE), virtual("3b:00.4"), virtual("3b:00.5")))
    assert "has virtual functions (vGPU), from 0000:3b:00.4 on" in cards[at("3b")].why_not[0]
    assert cards[at("3b")].functions == (at("3b"),)
    assert [one.why for one in cards[at("3b:00.4")].reasons] == [Why.VIRTUAL]


def test_all_reasons_are_told_at_once() -> None:
    nvme = pci("3c", 0xA808, NVME, vendor=0x144D, driver="nvme", iommu_group=0x3B)
    seen = nvml("3b", mig_enabled=True, remap_failed=True, vram_mib=15360)
    told = facts(gpu("3b", T4, driver=None), nvme, seen=(seen,), iommu=NO_IOMMU)
    card = only(told, record(known("3b"), quarantined={"3b": "hot"}))
    assert {one.why for one in card.reasons} == {
        Why.CHANGED,
        Why.QUARANTINED,
        Why.NOT_A_TYPE,
        Why.IOMMU,
        Why.FOREIGN_DEVICE,
        Why.NO_DRIVER,
        Why.SETTING,
        Why.UNHEALTHY,
    }
