"""The state directory: where it is, and the record in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpud.doctor.check import Level
from gpud.doctor.storage import file_system, file_system_of, free_space, nearest, record, storage
from gpud.model import PciAddress
from gpud.store import Store
from tests.unit.doctor.parts import level, named, only
from tests.unit.fakes.orders import grant, granting, order

MOUNTS = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:20 / /var/lib rw - xfs /dev/sdb rw
24 23 0:21 / /var/lib/gpud rw shared:5 - nfs4 server:/x rw
25 22 0:22 / /srv/a\\040b rw - btrfs /dev/sdc rw
26 22 0:23 / /srv/a\\040b rw - tmpfs none rw
"""


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    tmp_path.chmod(0o711)
    return tmp_path


def test_a_directory_that_qemu_may_pass_through_is_well(state_dir: Path) -> None:
    assert level(storage(state_dir, MOUNTS), "state_dir") is Level.OK


def test_a_closed_directory_is_to_be_opened(state_dir: Path) -> None:
    state_dir.chmod(0o700)
    assert named(storage(state_dir, MOUNTS), "state_dir")[2] == f"chmod 0711 {state_dir}"


def test_a_missing_directory_is_to_be_made_and_what_it_would_be_on_is_judged(
    state_dir: Path,
) -> None:
    missing = state_dir / "a/b"
    found = list(storage(missing, MOUNTS))
    assert named(found, "state_dir")[0] is Level.FAULT
    assert f"0711 {missing}" in named(found, "state_dir")[2]
    assert named(found, "file system")[1] == "ext4"
    assert nearest(missing) == state_dir


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/", "ext4"),
        ("/var/library", "ext4"),
        ("/var/lib/x", "xfs"),
        ("/var/lib/gpud/images", "nfs4"),
        ("/srv/a b/c", "tmpfs"),  # mounted over the other
    ],
)
def test_the_innermost_mount_is_the_one_that_counts(path: str, name: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == name


def test_a_mount_that_is_not_told_is_not_known() -> None:
    assert only(file_system(file_system_of(Path("/"), "")))[:2] == (Level.OK, "not known")


@pytest.mark.parametrize(
    ("name", "worst"),
    [
        ("ext4", Level.OK),
        ("tmpfs", Level.FAULT),
        ("nfs4", Level.FAULT),
        ("fuse.sshfs", Level.FAULT),
        ("overlay", Level.WARNING),
    ],
)
def test_file_systems_that_forget_or_do_not_lock_are_told(name: str, worst: Level) -> None:
    assert only(file_system(name))[0] is worst


@pytest.mark.parametrize(
    ("free_gib", "worst"), [(4, Level.FAULT), (40, Level.WARNING), (400, Level.OK)]
)
def test_free_space(free_gib: int, worst: Level) -> None:
    found = os.statvfs_result((2**30, 2**30, 1000, free_gib + 5, free_gib, 0, 0, 0, 0, 255))
    assert only(free_space(found))[:2] == (worst, f"{free_gib} of 1000 GiB")


def test_a_server_without_a_record_is_new(state_dir: Path) -> None:
    cards, verdict = record(state_dir)
    assert verdict.level is Level.NOTE
    assert not cards.claims


async def test_a_record_tells_what_is_claimed_known_and_quarantined(state_dir: Path) -> None:
    store = await Store.open(state_dir)
    instance = (await store.admit(order(), granting(grant()))).instance
    other = PciAddress.parse("0000:99:00.0")
    await store.quarantine(other, "a test")
    cards, verdict = record(state_dir)
    await store.close()
    assert (verdict.level, verdict.what) == (
        Level.OK,
        "sound, 1 GPUs are in use by its instances",
    )
    claim = cards.claims[instance.grant.gpus[0].address]
    assert (claim.upstream_id, claim.releasing) == (instance.upstream_id, False)
    assert cards.quarantines[other].reason == "a test"


async def test_a_record_tells_what_is_drained(state_dir: Path) -> None:
    store = await Store.open(state_dir)
    await store.drain(None, "new kernel")
    drains = dict(store.drains)
    await store.close()
    assert record(state_dir)[0].drains == drains


@pytest.mark.parametrize("content", [b"no database at all, and long enough to tell" * 99, b""])
def test_a_damaged_record_is_a_fault(state_dir: Path, content: bytes) -> None:
    (state_dir / "state.sqlite").write_bytes(content)
    assert record(state_dir)[1].level is Level.FAULT


async def test_a_record_of_another_kind_is_a_fault(state_dir: Path) -> None:
    store = await Store.open(state_dir)
    await store.admit(order(), granting(grant()))
    store._connection.execute("UPDATE instance SET status = 'unheard_of'")
    _, verdict = record(state_dir)
    await store.close()
    assert verdict.level is Level.FAULT
    assert "cannot read" in verdict.what


def test_a_record_that_may_not_be_read_is_left_to_root(
    state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (state_dir / "state.sqlite").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert record(state_dir)[1].mend == "sudo gpud doctor"
