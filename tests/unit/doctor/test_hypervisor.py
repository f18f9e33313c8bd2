"""libvirt, as a survey tells of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

from gpud.doctor.check import Level
from gpud.doctor.hypervisor import hypervisor
from gpud.errors import Code, GpudError
from gpud.hypervisor.survey import Survey
from tests.unit.doctor.parts import REAL, level, make_config, named, only

WELL = Survey("libvirt 9.0.0, QEMU 7.2.22", 9, "kvm", firmwares=frozenset({"efi", "bios"}))


def test_a_libvirt_that_has_all_is_well() -> None:
    found = list(hypervisor(make_config(**REAL), WELL))
    assert {one.level for one in found} == {Level.OK}
    assert named(found, "version")[1] == "libvirt 9.0.0, QEMU 7.2.22"


def test_a_libvirt_that_is_away_is_the_only_thing_told() -> None:
    away = GpudError(Code.HYPERVISOR_UNAVAILABLE, "cannot reach libvirt", hint="join the group")
    found = only(hypervisor(make_config(), away))
    assert found[:2] == (Level.FAULT, "cannot reach libvirt")
    assert "gpud setup starts it" in found[2]
    assert "join the group" in found[2]


def test_an_old_libvirt_is_a_warning() -> None:
    found = hypervisor(make_config(**REAL), replace(WELL, versions="libvirt 8.0.0", major=8))
    assert level(found, "version") is Level.WARNING


@pytest.mark.parametrize(
    ("asked", "best", "real", "worst"),
    [
        ("auto", "qemu", True, Level.FAULT),
        ("qemu", "kvm", True, Level.FAULT),
        ("kvm", "qemu", False, Level.FAULT),
        ("auto", "qemu", False, Level.NOTE),
        ("kvm", "kvm", True, Level.OK),
    ],
)
def test_emulated_guests_are_for_stand_ins_alone(
    asked: str, best: Literal["kvm", "qemu"], worst: Level, *, real: bool
) -> None:
    config = make_config(libvirt={"domain_type": asked}, **REAL if real else {})
    found = hypervisor(config, replace(WELL, best_type=best))
    assert level(found, "guests") is worst


@pytest.mark.parametrize(
    ("firmwares", "asked", "worst"),
    [
        (frozenset({"bios"}), "uefi", Level.FAULT),
        (frozenset({"bios"}), "bios", Level.OK),
        (None, "uefi", Level.NOTE),
    ],
)
def test_firmware_is_missed_where_guests_boot_with_it(
    firmwares: frozenset[str] | None, asked: str, worst: Level
) -> None:
    config = make_config(guest={"firmware": asked})
    assert level(hypervisor(config, replace(WELL, firmwares=firmwares)), "firmware") is worst
