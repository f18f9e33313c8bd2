"""Whom files let in."""

from __future__ import annotations

import pwd
from pathlib import Path

from gpud.doctor.account import READ, WRITE, Account, SysfsOf
from tests.unit.fakes.kernel import FakeKernel


def test_root_and_the_owner_may_use_what_lets_them(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch(mode=0o600)
    found = file.stat()
    assert Account("root", 0, frozenset()).may(READ | WRITE, found)
    assert Account("me", found.st_uid, frozenset()).may(READ | WRITE, found)
    assert not Account("other", 64055, frozenset({found.st_gid})).may(READ | WRITE, found)


def test_an_account_has_the_groups_of_its_user_beside_the_one_given() -> None:
    user = pwd.getpwnam("nobody")
    account = Account.of(user.pw_uid, 54321)
    assert account.name == "nobody"
    assert account.gids >= {54321, user.pw_gid}


def test_an_account_of_a_number_alone_has_the_one_group() -> None:
    assert Account.of(54321, 54322) == Account("uid 54321", 54321, frozenset({54322}))


def test_a_directory_has_an_owner_if_it_is_there(tmp_path: Path) -> None:
    owner = Account.owner(tmp_path)
    assert owner is not None
    assert owner.uid == tmp_path.stat().st_uid
    assert Account.owner(tmp_path / "no") is None


def test_sysfs_is_judged_for_whom_it_is_asked(tmp_path: Path) -> None:
    root = FakeKernel(tmp_path).sysfs.root
    probe = Path("bus/pci/drivers_probe")
    (root / probe).chmod(0o220)
    group = (root / probe).stat().st_gid
    assert SysfsOf(root, Account("gpud", 64000, frozenset({group}))).writable(probe)
    assert not SysfsOf(root, Account("gpud", 64000, frozenset())).writable(probe)
