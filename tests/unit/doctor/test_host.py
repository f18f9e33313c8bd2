"""The CPU and /dev/kvm."""

from __future__ import annotations

import grp
import os
from pathlib import Path

import pytest

from gpud.doctor.account import Account
from gpud.doctor.check import Level
from gpud.doctor.host import kvm, virtualisation
from tests.unit.doctor.parts import only

NOBODY = Account("libvirt-qemu", 64055, frozenset({64055}))


@pytest.mark.parametrize(("flag", "name"), [("vmx", "Intel VT-x"), ("svm", "AMD-V")])
def test_a_cpu_with_virtualisation_is_well(flag: str, name: str) -> None:
    found = virtualisation(f"processor : 0\nflags\t\t: fpu {flag} sse2\n", emulation=False)
    assert only(found)[:2] == (Level.OK, f"has {name}")


@pytest.mark.parametrize(("emulation", "level"), [(False, Level.FAULT), (True, Level.NOTE)])
def test_a_cpu_without_it_matters_where_real_cards_are_sold(
    level: Level, *, emulation: bool
) -> None:
    found = only(virtualisation("flags : fpu\nvmx flags : vnmi\n", emulation=emulation))
    assert found[0] is level
    assert "VT-x or AMD-V" in found[2]


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A file in the place of /dev/kvm, root:kvm 0660 but for who owns it here."""
    path = tmp_path / "kvm"
    path.touch()
    path.chmod(0o660)
    return path


def of_group(device: Path) -> Account:
    return Account("libvirt-qemu", 64055, frozenset({device.stat().st_gid}))


def test_a_door_that_lets_qemus_user_in_is_well(device: Path) -> None:
    level, what, _ = only(kvm(device, of_group(device), emulation=False))
    assert level is Level.OK
    assert what.startswith("0660 ")
    assert what.endswith("QEMU's user libvirt-qemu may use it")
    assert only(kvm(device, None, emulation=False))[0] is Level.OK


def test_a_missing_door_is_told_with_the_module_to_load(tmp_path: Path) -> None:
    found = only(kvm(tmp_path / "kvm", None, emulation=False))
    assert found == (Level.FAULT, "is not there", "gpud setup loads KVM, now and at each boot")
    assert only(kvm(tmp_path / "kvm", None, emulation=True))[0] is Level.NOTE


def test_a_user_outside_of_the_group_is_to_join_it(device: Path) -> None:
    level, what, mend = only(kvm(device, NOBODY, emulation=False))
    group = grp.getgrgid(device.stat().st_gid).gr_name
    assert (level, "keeps QEMU's user libvirt-qemu out" in what) == (Level.FAULT, True)
    assert mend == f"usermod -aG {group} libvirt-qemu && systemctl restart libvirtd"


def test_a_door_closed_to_its_group_is_to_be_opened_to_it(device: Path) -> None:
    device.chmod(0o600)
    level, _, mend = only(kvm(device, of_group(device), emulation=False))
    assert (level, mend) == (
        Level.FAULT,
        f"chgrp kvm {device} && chmod 0660 {device}; gpud setup does it for good",
    )


def test_a_door_open_to_everybody_is_worth_a_note(device: Path) -> None:
    device.chmod(0o666)
    assert only(kvm(device, NOBODY, emulation=False))[0] is Level.NOTE


@pytest.mark.skipif(os.geteuid() != 0, reason="files of others can be made by root alone")
def test_owners_without_names_are_told_by_number(device: Path) -> None:
    os.chown(device, 54321, 54321)
    assert "0660 54321:54321" in only(kvm(device, None, emulation=False))[1]
