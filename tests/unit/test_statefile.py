from __future__ import annotations

import fcntl
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest

from gpud.errors import Code, GpudError
from gpud.schema import MIGRATIONS
from gpud.statefile import connect, connect_to_read, lock


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    """A sound state file with a page or two of content, closed."""
    connection = connect(tmp_path)
    rows = [(number, 1.0, "i", "", "", "x" * 500) for number in range(200)]
    connection.execute("BEGIN")
    connection.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, NULL)", rows)
    connection.execute("COMMIT")
    connection.close()
    return tmp_path / "state.sqlite"


def refused(state_dir: Path) -> GpudError:
    with pytest.raises(GpudError) as caught:
        connect(state_dir)
    assert caught.value.code is Code.STATE_UNUSABLE
    return caught.value


def test_a_new_state_file_is_durable_checked_and_ours_alone(tmp_path: Path) -> None:
    connection = connect(tmp_path)

    def pragma(name: str) -> Any:
        return connection.execute(f"PRAGMA {name}").fetchone()[0]

    assert pragma("journal_mode") == "wal"
    assert pragma("synchronous") == 2
    assert pragma("foreign_keys") == 1
    assert pragma("secure_delete") == 1
    assert pragma("user_version") == len(MIGRATIONS)
    files = list(tmp_path.glob("state.sqlite*"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert len(files) == 3
    connection.close()


def test_an_existing_file_is_opened_as_it_is(state_file: Path) -> None:
    connection = connect(state_file.parent)
    assert connection.execute("SELECT count(*) FROM event").fetchone()[0] == 200
    connection.close()


def test_a_missing_file_beside_guests_is_refused_and_not_made(tmp_path: Path) -> None:
    (tmp_path / "instances" / "i-0123456789abcdef").mkdir(parents=True)
    error = refused(tmp_path)
    assert "missing" in error.detail
    assert "backup" in error.hint
    assert not (tmp_path / "state.sqlite").exists()


def test_a_file_restored_with_a_wider_mode_is_closed_to_others(state_file: Path) -> None:
    state_file.chmod(0o644)
    connect(state_file.parent).close()
    assert stat.S_IMODE(state_file.stat().st_mode) == 0o600


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    path.write_bytes(b"gpud's state was here\n" * 100)
    before = path.read_bytes()
    assert "not a database" in refused(tmp_path).detail
    assert path.read_bytes() == before


def test_a_file_of_a_newer_gpud_is_refused_and_left_alone(state_file: Path) -> None:
    connection = sqlite3.connect(state_file)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    before = state_file.read_bytes()
    assert "newer gpud" in refused(state_file.parent).detail
    assert state_file.read_bytes() == before


def test_a_directory_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").mkdir()
    assert "it is no file" in refused(tmp_path).detail


def test_a_second_gpud_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = lock(tmp_path)
    with pytest.raises(GpudError, match="another gpud is running") as caught:
        lock(tmp_path)
    assert caught.value.code is Code.STATE_UNUSABLE
    first.close()
    lock(tmp_path).close()


def test_the_lock_makes_a_directory_that_others_can_only_pass(tmp_path: Path) -> None:
    state_dir = tmp_path / "lib" / "gpud"
    lock(state_dir).close()
    assert stat.S_IMODE(state_dir.stat().st_mode) == 0o711


def test_a_state_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GpudError, match="cannot be used") as caught:
        lock(tmp_path / "file" / "gpud")
    assert caught.value.code is Code.STATE_UNUSABLE


def test_a_lock_that_is_refused_leaves_no_file_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def refuse(file: Any, _operation: int) -> None:
        opened.append(file)
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(GpudError):
        lock(tmp_path)
    assert opened[0].closed


def test_a_reader_sees_what_a_writer_has_committed_and_changes_nothing(state_file: Path) -> None:
    writer = connect(state_file.parent)
    reader = connect_to_read(state_file.parent)
    assert reader.execute("SELECT count(*) FROM event").fetchone()[0] == 200
    writer.execute("DELETE FROM event")
    assert reader.execute("SELECT count(*) FROM event").fetchone()[0] == 0
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.execute("INSERT INTO meta VALUES ('a', 'b')")
    reader.close()
    writer.close()


def test_a_daemon_starts_after_a_reader_that_came_while_it_was_down(state_file: Path) -> None:
    connect_to_read(state_file.parent).close()
    connection = connect(state_file.parent)
    assert connection.execute("SELECT count(*) FROM event").fetchone()[0] == 200
    connection.close()


def refused_to_a_reader(state_dir: Path) -> GpudError:
    with pytest.raises(GpudError) as caught:
        connect_to_read(state_dir)
    assert caught.value.code is Code.STATE_UNUSABLE
    return caught.value


def test_a_reader_makes_no_state_file(tmp_path: Path) -> None:
    assert "cannot be opened" in refused_to_a_reader(tmp_path).detail
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_refused_to_a_reader(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").write_bytes(b"gpud's state was here\n" * 100)
    assert "not a database" in refused_to_a_reader(tmp_path).detail


@pytest.mark.parametrize("version", [len(MIGRATIONS) - 1, len(MIGRATIONS) + 1])
def test_a_file_of_another_version_is_refused_to_a_reader(state_file: Path, version: int) -> None:
    with sqlite3.connect(state_file) as connection:
        connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    error = refused_to_a_reader(state_file.parent)
    assert f"it has schema {version}" in error.detail
    assert "the daemon's start brings it up to date" in error.hint
