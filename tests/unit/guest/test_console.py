from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.guest.console import ConsoleLogs
from tests.unit.fakes.orders import quick_directory

GUEST = "i-0123456789abcdef"
OTHER = "i-fedcba9876543210"


@pytest.fixture
def logs(tmp_path: Path) -> ConsoleLogs:
    return ConsoleLogs(tmp_path / "console", limit_bytes=20)


def test_output_is_kept_in_order(logs: ConsoleLogs) -> None:
    logs.append(GUEST, b"boot")
    logs.append(GUEST, b"ing\n")
    assert logs.read(GUEST) == b"booting\n"
    assert logs.size(GUEST) == 8


def test_a_guest_without_output_has_an_empty_log(logs: ConsoleLogs) -> None:
    assert logs.read(GUEST) == b""
    assert logs.size(GUEST) == 0
    assert logs.kept() == set()
    logs.remove(GUEST)


def test_the_oldest_output_gives_way(logs: ConsoleLogs) -> None:
    for line in (b"1234567\n", b"abcdefg\n", b"ABCDEFG\n"):
        logs.append(GUEST, line)
    assert logs.read(GUEST) == b"abcdefg\nABCDEFG\n"


def test_of_one_huge_chunk_the_end_is_kept(logs: ConsoleLogs) -> None:
    logs.append(GUEST, b"x" * 1000 + b"last words")
    assert logs.read(GUEST) == b"last words"


@given(chunks=st.lists(st.binary(min_size=1, max_size=30), max_size=12))
def test_what_is_kept_is_the_newest_half_at_least_and_the_limit_at_most(
    chunks: list[bytes],
) -> None:
    with quick_directory() as directory:
        logs = ConsoleLogs(directory, limit_bytes=20)
        for chunk in chunks:
            logs.append(GUEST, chunk)
        kept = logs.read(GUEST)
    printed = b"".join(chunks)
    assert len(kept) <= 20
    assert kept.endswith(printed[-10:])
    # Nothing is missing inside a chunk's last ten bytes, nothing is out of order.
    assert kept in b"".join(chunk[-10:] for chunk in chunks)


def test_only_the_daemons_user_can_read_it(logs: ConsoleLogs, tmp_path: Path) -> None:
    logs.append(GUEST, b"secret of the tenant")
    directory = tmp_path / "console"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert [stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()] == [0o600]


def test_a_symlink_in_its_place_is_not_followed(logs: ConsoleLogs, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    (tmp_path / "console").mkdir()
    (tmp_path / "console" / f"{GUEST}.log").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        logs.append(GUEST, b"x")
    assert target.read_bytes() == b""


def test_removing_forgets_both_halves_of_one_guest_only(logs: ConsoleLogs) -> None:
    for guest in (GUEST, OTHER):
        logs.append(guest, b"1234567890")
        logs.append(guest, b"more")
    assert logs.kept() == {GUEST, OTHER}
    logs.remove(GUEST)
    assert logs.kept() == {OTHER}
    assert logs.read(GUEST) == b""
    assert logs.read(OTHER) == b"1234567890more"


def test_files_of_somebody_else_are_no_logs(logs: ConsoleLogs, tmp_path: Path) -> None:
    logs.append(GUEST, b"x")
    (tmp_path / "console" / "README").touch()
    assert logs.kept() == {GUEST}


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "i-1", GUEST + "\n"])
def test_no_path_is_made_from_a_foreign_name(logs: ConsoleLogs, name: str) -> None:
    with pytest.raises(ValueError, match="not an upstream_id"):
        logs.append(name, b"x")
