"""What the doctor says of cards, over the inventory's real merge."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from gpud.config import Gpus
from gpud.doctor.cards import REASONS, bars, cards, power, resets
from gpud.doctor.cardview import CardView
from gpud.doctor.check import Level, Verdict
from gpud.drains import Drain
from gpud.host.obstacle import Obstacle
from gpud.host.pci import PciFunction
from gpud.host.sysfs import Sysfs
from gpud.inventory.card import Card, CardState, Why
from gpud.inventory.facts import Facts, Record
from gpud.inventory.merge import merge
from gpud.model import PciAddress
from tests.unit.doctor.parts import level, named, only
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.inventory.parts import NO_IOMMU, SAFE, facts, gpu, nvml, pci, record, virtual

NIC = pci("02:00.0", 0x1533, 0x020000, vendor=0x8086, driver="igb", iommu_group=1)
GPUS = Gpus()


def say(host: Facts, known: Record | None = None, *, is_root: bool = True) -> list[Verdict]:
    view = CardView(merge(host, known or Record(), GPUS), host)
    return list(cards(view, Sysfs(Path("/nonexistent")), is_root=is_root))


def levels(found: Iterable[Verdict]) -> set[Level]:
    return {one.level for one in found}


def test_every_reason_of_the_inventory_belongs_to_one_check() -> None:
    of_checks = [why for kinds, _ in REASONS.values() for why in kinds]
    assert sorted(of_checks) == sorted(Why)


def test_cards_without_a_fault_are_counted_and_well() -> None:
    found = say(facts(gpu("01:00.0"), gpu("02:00.0"), seen=(nvml("01:00.0"), nvml("02:00.0"))))
    assert levels(found) == {Level.OK}
    assert named(found, "cards")[1] == "2 x NVIDIA GeForce RTX 4090"
    assert named(found, "drivers")[1] == "2 x nvidia"
    assert named(found, "resets")[1] == "2 x flr bus"


def test_a_server_without_cards_is_told_where_to_look() -> None:
    level, _, mend = only(say(facts(NIC)))
    assert level is Level.FAULT
    assert mend.startswith("lspci -d 10de:")


def test_of_stand_ins_nothing_is_asked() -> None:
    card = Card(PciAddress(0xFFFFFFFF, 0, 0, 0), "", CardState.AVAILABLE, stand_in=True)
    found = cards(CardView((card,), facts()), Sysfs(Path("/nonexistent")), is_root=True)
    assert only(found)[0] is Level.NOTE


@pytest.mark.parametrize(
    ("host", "check", "worst", "words"),
    [
        (
            facts(gpu("01:00.0"), NIC),
            "IOMMU groups",
            Level.FAULT,
            "foreign device in IOMMU group 1",
        ),
        (facts(gpu("01:00.0", iommu_group=None)), "IOMMU groups", Level.FAULT, "in no IOMMU group"),
        (facts(gpu("01:00.0", driver=None)), "drivers", Level.FAULT, "no driver"),
        (facts(gpu("01:00.0"), silent=("01:00.0",)), "drivers", Level.FAULT, "NVML does not know"),
        (facts(gpu("01:00.0", reset_methods=())), "resets", Level.FAULT, "cannot be reset"),
        (facts(gpu("01:00.0", 0x1EB8)), "cards", Level.NOTE, "not a GPU.ai type"),
        (facts(gpu("01:00.0", config_header=b"")), "cards", Level.FAULT, "does not answer"),
        (facts(virtual("01:00.4")), "cards", Level.FAULT, "virtual function"),
        (
            facts(gpu("01:00.0"), seen=(nvml("01:00.0", mig_enabled=True),)),
            "health",
            Level.FAULT,
            "MIG is on",
        ),
        (
            facts(gpu("01:00.0"), domains={gpu("01:00.0").address: "somebodys"}),
            "holders",
            Level.FAULT,
            "used by domain somebodys",
        ),
    ],
)
def test_what_speaks_against_a_card_is_told_by_its_check(
    host: Facts, check: str, worst: Level, words: str
) -> None:
    found = say(host)
    told = named(found, check)
    assert told[0] is worst
    assert told[1].startswith("0000:01:00.")
    assert words in told[1]
    assert all(one.level is Level.OK for one in found if one.name != check)


def test_a_quarantine_is_a_warning_with_its_release() -> None:
    found = say(facts(gpu("01:00.0")), record(quarantined={"01:00.0": "it hung"}))
    assert named(found, "health")[0] is Level.WARNING
    assert "gpud gpus release 0000:01:00.0" in named(found, "health")[2]


def test_a_drain_is_a_note_with_its_end() -> None:
    at = gpu("01:00.0").address
    found = say(facts(gpu("01:00.0")), replace(record(), drains={at: Drain(at, 0, "new fan")}))
    level_of, words, mend = named(found, "cards")
    assert (level_of, mend) == (Level.NOTE, "undrain: gpud undrain --gpu 0000:01:00.0")
    assert words == "0000:01:00.0: drained since 1970-01-01 00:00 UTC: new fan"


def test_the_same_fault_of_several_cards_is_told_once() -> None:
    found = say(facts(gpu("01:00.0", driver=None), gpu("02:00.0", driver=None)))
    assert named(found, "drivers")[1] == "0000:01:00.0, 0000:02:00.0: no driver"


def test_a_fault_of_the_servers_iommu_is_not_told_again_of_each_card() -> None:
    host = facts(gpu("01:00.0", iommu_group=None), iommu=NO_IOMMU)
    assert level(say(host), "IOMMU groups") is Level.OK


def test_split_groups_are_told_of_the_cards() -> None:
    host = facts(gpu("01:00.0"), iommu=replace(SAFE, acs_override=True))
    assert "pcie_acs_override" in named(say(host), "IOMMU groups")[1]


def test_what_the_hand_over_has_against_a_card_is_told() -> None:
    card = gpu("01:00.0")
    host = replace(facts(card), obstacles={card.address: (Obstacle("may not write", "do that"),)})
    assert named(say(host), "hand-over") == (
        Level.FAULT,
        "0000:01:00.0: may not write",
        "do that",
    )


def test_who_cannot_see_all_is_told_so() -> None:
    found = [one for one in say(facts(gpu("01:00.0")), is_root=False) if one.name == "holders"]
    assert [one.level for one in found] == [Level.OK, Level.NOTE]
    assert found[1].mend == "sudo gpud doctor"


def test_an_nvml_that_says_nothing_is_a_note() -> None:
    host = facts(gpu("01:00.0", driver="vfio-pci"))
    view = CardView(merge(host, Record(), GPUS), host, "no libnvidia-ml.so.1")
    found = list(cards(view, Sysfs(Path("/nonexistent")), is_root=True))
    assert named(found, "NVML")[:2] == (Level.NOTE, "no libnvidia-ml.so.1")


def test_a_reset_that_proves_little_is_a_warning() -> None:
    assert not list(resets([gpu("01:00.0", reset_methods=("flr", "pm"))]))
    found = only(resets([gpu("01:00.0", reset_methods=("pm",)), gpu("02:00.0")]))
    assert found[0] is Level.WARNING
    assert found[1].startswith("0000:01:00.0: only by power management")


@pytest.mark.parametrize(
    ("state", "allowed", "worst"),
    [
        ("D3cold", True, Level.WARNING),
        ("D3hot", True, Level.OK),
        ("D0", False, Level.OK),
    ],
)
def test_a_card_without_power_is_a_warning(state: str, worst: Level, *, allowed: bool) -> None:
    card = gpu("01:00.0", power_state=state, d3cold_allowed=allowed)
    assert only(power([card]))[0] is worst


# ---- BARs, as the kernel lists them

WINDOW = 0x14220C  # 64-bit, prefetchable memory
SMALL, LARGE = 2**28, 2**36


def resource(kernel: FakeKernel, first: int, size: int) -> PciFunction:
    where = kernel.add_function("0000:01:00.0", bars=())
    line = f"{first:#018x} {first + size - 1:#018x} {WINDOW:#018x}\n"
    (kernel.sysfs.root / "bus/pci/devices/0000:01:00.0/resource").write_text(line)
    return replace(gpu("01:00.0"), address=where)


@pytest.mark.parametrize(
    ("first", "size", "worst"),
    [
        (2**40, LARGE, Level.OK),
        (0, LARGE, Level.FAULT),
        (0xC000_0000, SMALL, Level.WARNING),
        (0xC000_0000, 2**24, Level.OK),
        (2**40, SMALL, Level.OK),
    ],
)
def test_windows_have_addresses_and_large_ones_above_4_gib(
    tmp_path: Path, first: int, size: int, worst: Level
) -> None:
    kernel = FakeKernel(tmp_path)
    assert only(bars([resource(kernel, first, size)], kernel.sysfs))[0] is worst


def test_a_window_that_could_be_larger_is_a_note(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    card = resource(kernel, 2**40, SMALL)
    (kernel.sysfs.root / "bus/pci/devices/0000:01:00.0/resource0_resize").touch()
    assert only(bars([card], kernel.sysfs))[0] is Level.NOTE
