"""The IOMMU, and vfio-pci."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gpud.doctor.check import Level
from gpud.doctor.isolation import driver, isolation
from tests.unit.doctor.parts import level, named, only
from tests.unit.inventory.parts import NO_IOMMU, SAFE


def test_an_iommu_that_does_all_it_should_is_well() -> None:
    found = list(isolation(SAFE, 31, needed=True))
    assert named(found, "IOMMU")[:2] == (Level.OK, "on, 31 groups")
    assert level(found, "interrupts") is Level.OK


@pytest.mark.parametrize(("needed", "worst"), [(True, Level.FAULT), (False, Level.NOTE)])
def test_an_iommu_that_is_off_matters_where_real_cards_are_sold(
    worst: Level, *, needed: bool
) -> None:
    found = only(isolation(NO_IOMMU, 0, needed=needed))
    assert found[:2] == (worst, "the IOMMU is off")
    assert "intel_iommu=on" in found[2]


def test_interrupts_that_are_not_remapped_are_a_fault() -> None:
    found = list(isolation(replace(SAFE, interrupt_remapping=False), 31, needed=True))
    assert level(found, "IOMMU") is Level.OK
    assert level(found, "interrupts") is Level.FAULT


def test_vfio_told_to_do_without_remapping_is_a_warning() -> None:
    found = list(isolation(replace(SAFE, unsafe_interrupts_allowed=True), 31, needed=True))
    assert [one.level for one in found if one.name == "interrupts"] == [Level.OK, Level.WARNING]


def test_a_driver_that_is_not_loaded_is_to_be_loaded_now_and_at_boot() -> None:
    assert only(driver(loaded=True, needed=True))[0] is Level.OK
    assert only(driver(loaded=False, needed=False))[0] is Level.NOTE
    found = only(driver(loaded=False, needed=True))
    assert found[0] is Level.FAULT
    assert found[2] == "gpud setup has it loaded, now and at each boot"
