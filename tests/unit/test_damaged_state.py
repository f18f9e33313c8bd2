"""A state file that is damaged or in the way of something: refused in words, and left as it is."""

from __future__ import annotations

import ctypes
import os
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from gpud import schema, statefile
from gpud.errors import Code, GpudError
from gpud.model import Instance, Status, Step, Tier
from gpud.schema import COLUMNS, MIGRATIONS, to_row
from gpud.statefile import connect, examine, interrupted
from gpud.store import Store
from tests.unit.fakes.orders import grant, quick_directory


@pytest.fixture
def state_file(tmp_path: Path) -> Path:
    """A sound state file with some pages of content, closed."""
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
    assert str(state_dir / "state.sqlite") in caught.value.detail
    return caught.value


# -- missing and empty ------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["instances", "state.sqlite-wal", "state.sqlite-shm"])
def test_where_gpud_has_run_a_missing_file_is_refused_even_without_guests(
    tmp_path: Path, left: str
) -> None:
    (tmp_path / left).mkdir()
    error = refused(tmp_path)
    assert f"{tmp_path / left} is there" in error.detail
    assert f"remove {tmp_path / left} too" in error.hint
    assert [file.name for file in tmp_path.iterdir()] == [left]


def test_an_empty_file_is_refused_and_stays_empty(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite").touch()
    assert "it is empty" in refused(tmp_path).detail
    assert (tmp_path / "state.sqlite").stat().st_size == 0


def test_a_first_start_that_was_cut_short_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "state.sqlite.new").write_bytes(b"half of a page")
    connect(tmp_path).close()
    assert [file.name for file in tmp_path.iterdir()] == ["state.sqlite"]


def test_a_first_start_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "MIGRATIONS", ("CREATE TABLE t (x); OOPS;",))
    assert "OOPS" in refused(tmp_path).detail
    assert list(tmp_path.iterdir()) == []


def test_a_migration_that_fails_leaves_the_file_as_it_was(
    state_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = (*MIGRATIONS, "CREATE TABLE t (x); OOPS;")
    monkeypatch.setattr(schema, "MIGRATIONS", broken)
    monkeypatch.setattr(statefile, "MIGRATIONS", broken)
    before = state_file.read_bytes()
    assert "OOPS" in refused(state_file.parent).detail
    assert state_file.read_bytes() == before


def test_a_restore_that_was_broken_off_is_to_be_done_again(state_file: Path) -> None:
    interrupted(state_file).touch()
    error = refused(state_file.parent)
    assert "a restore was broken off" in error.detail
    assert "gpud restore FILE" in error.hint


# -- the file itself --------------------------------------------------------------------------------


def overwritten(content: bytearray) -> None:
    content[8192:16384] = b"\xff" * 8192


def cut_short(content: bytearray) -> None:
    del content[len(content) // 2 :]


def without_its_header(content: bytearray) -> None:
    content[:100] = bytes(100)


def without_its_first_page(content: bytearray) -> None:
    content[:4096] = bytes(4096)


@pytest.mark.parametrize(
    "damage",
    [overwritten, cut_short, without_its_header, without_its_first_page],
)
def test_a_damaged_database_is_refused_and_left_alone(
    state_file: Path, damage: Callable[[bytearray], None]
) -> None:
    content = bytearray(state_file.read_bytes())
    damage(content)
    state_file.write_bytes(content)
    assert "never starts over" in refused(state_file.parent).hint
    assert state_file.read_bytes() == content


def test_any_page_that_is_overwritten_with_noise_is_found(state_file: Path) -> None:
    sound = state_file.read_bytes()
    noise = random.Random(4).randbytes(4096)
    for start in range(0, len(sound), 4096):
        content = sound[:start] + noise + sound[start + 4096 :]
        state_file.write_bytes(content)
        refused(state_file.parent)
        assert state_file.read_bytes() == content


def with_a_lost_write(state_file: Path, index: str, change: str) -> bytes:
    """The state file after ``change``, whose write to the first page of ``index`` was lost."""
    connection = connect(state_file.parent)
    query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
    start = (connection.execute(query, [index]).fetchone()[0] - 1) * 4096
    connection.close()
    before = state_file.read_bytes()[start : start + 4096]
    connection = connect(state_file.parent)
    connection.execute(change)
    connection.close()
    content = bytearray(state_file.read_bytes())
    assert content[start : start + 4096] != before
    content[start : start + 4096] = before
    state_file.write_bytes(content)
    with closing(sqlite3.connect(state_file)) as connection:
        assert connection.execute("PRAGMA quick_check").fetchone()[0] == "ok"
    return bytes(content)


def test_a_live_instance_that_its_index_has_lost_is_found_at_a_start(state_file: Path) -> None:
    """It would be taken for an orphan, and its guest ended."""
    with closing(connect(state_file.parent)) as connection:
        ended = Instance("i-1", "x", "", Tier.SPOT, grant(), Status.ERROR, Step.ENDED, 0, 0)
        values = ", ".join(f":{name}" for name in COLUMNS)
        connection.execute(
            f"INSERT INTO instance ({', '.join(COLUMNS)}) VALUES ({values})",  # noqa: S608
            to_row(ended),
        )
    change = "UPDATE instance SET step = 'running' WHERE upstream_id = 'i-1'"
    content = with_a_lost_write(state_file, "instance_live", change)
    assert "i-1 is missing from index instance_live" in refused(state_file.parent).detail
    assert state_file.read_bytes() == content


def test_a_lost_write_of_any_index_is_found_by_a_backup_and_by_doctor(state_file: Path) -> None:
    change = "UPDATE event SET gpu = '0000:41:00.0' WHERE id = 7"
    content = with_a_lost_write(state_file, "event_gpu", change)
    assert examine(state_file, every_index=False) is None
    assert "event_gpu" in str(examine(state_file))
    assert state_file.read_bytes() == content


def test_a_database_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "state.sqlite"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE addresses (name, street)")
    before = path.read_bytes()
    assert "no state of gpud" in refused(tmp_path).detail
    assert path.read_bytes() == before


# -- its write-ahead log ----------------------------------------------------------------------------


@pytest.fixture
def crashed(state_file: Path) -> Path:
    """The state file of a gpud that was killed: ten commits are in its log alone."""
    connection = connect(state_file.parent)
    for number in range(300, 310):
        connection.execute("INSERT INTO event VALUES (?, 1, 'i', '', '', '', NULL)", [number])
    files = {file: file.read_bytes() for file in state_file.parent.glob("state.sqlite*")}
    connection.close()
    for file, content in files.items():
        file.write_bytes(content)
    return state_file


def newest_event(state_file: Path) -> int:
    connection = connect(state_file.parent)
    newest: int = connection.execute("SELECT max(id) FROM event").fetchone()[0]
    connection.close()
    return newest


def test_what_a_killed_gpud_had_committed_is_there(crashed: Path) -> None:
    assert newest_event(crashed) == 309


def test_a_log_without_its_index_is_read_all_the_same(crashed: Path) -> None:
    crashed.with_name("state.sqlite-shm").unlink()
    assert newest_event(crashed) == 309


def test_a_last_transaction_that_was_cut_short_never_was(crashed: Path) -> None:
    log = crashed.with_name("state.sqlite-wal")
    log.write_bytes(log.read_bytes()[:-2000] + bytes(2000))
    assert newest_event(crashed) == 308


def test_a_log_of_which_nothing_reached_the_disk_is_empty(crashed: Path) -> None:
    log = crashed.with_name("state.sqlite-wal")
    log.write_bytes(bytes(log.stat().st_size))
    assert newest_event(crashed) == 199


def test_a_log_that_is_missing_is_refused(crashed: Path) -> None:
    crashed.with_name("state.sqlite-wal").unlink()
    before = crashed.read_bytes()
    error = refused(crashed.parent)
    assert "state.sqlite-wal, with the newest orders, is missing" in error.detail
    assert crashed.read_bytes() == before


@pytest.mark.parametrize(
    ("start", "length", "what"),
    [
        (0, None, "header"),
        (0, 32, "header"),
        (8, 1, "header"),
        (32, 24, "committed transactions"),
        (5000, 1, "committed transactions"),
    ],
    ids=["all of it", "its header", "a byte of its header", "a frame's header", "a byte of a page"],
)
def test_a_damaged_log_is_refused_and_left_alone(
    crashed: Path, start: int, length: int | None, what: str
) -> None:
    log = crashed.with_name("state.sqlite-wal")
    content = bytearray(log.read_bytes())
    end = len(content) if length is None else start + length
    content[start:end] = bytes(byte ^ 0x55 for byte in content[start:end])
    log.write_bytes(content)
    before = crashed.read_bytes()
    error = refused(crashed.parent)
    assert f"{log.name}, with the newest orders, is damaged" in error.detail
    assert what in error.detail
    assert (crashed.read_bytes(), log.read_bytes()) == (before, bytes(content))


# -- what is in the way -----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["NORMAL", "EXCLUSIVE"])
async def test_a_file_that_another_program_has_locked_is_refused_with_what_to_do(
    state_file: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr(statefile, "_PATIENCE", "busy_timeout = 20")
    monkeypatch.setattr(statefile, "_PRAGMAS", ("busy_timeout = 20", *statefile._PRAGMAS[1:]))
    with closing(sqlite3.connect(state_file, isolation_level=None)) as shell:
        shell.execute(f"PRAGMA locking_mode = {mode}")
        shell.execute("BEGIN EXCLUSIVE")
        shell.execute("DELETE FROM event WHERE id = 7")
        with pytest.raises(GpudError, match="locked") as caught:
            await Store.open(state_file.parent)
        shell.execute("ROLLBACK")
    assert str(state_file) in caught.value.detail
    assert "another program" in caught.value.hint
    await (await Store.open(state_file.parent)).close()


@contextmanager
def somebody_else() -> Iterator[None]:
    """Root may write anywhere; nobody may not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("there", [True, False], ids=["with a state file", "empty"])
def test_a_directory_that_cannot_be_written_is_refused(there: bool) -> None:
    with quick_directory() as state_dir:
        if there:
            connect(state_dir).close()
            (state_dir / "state.sqlite").chmod(0o644)
        state_dir.chmod(0o555)
        before = sorted(state_dir.iterdir())
        with somebody_else():
            error = refused(state_dir)
        assert "daemon's user must be able to write it" in error.hint
        assert sorted(state_dir.iterdir()) == before
        state_dir.chmod(0o755)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    libc = ctypes.CDLL(None)
    if libc.mount(b"none", bytes(tmp_path), b"tmpfs", 0, b"size=256k") != 0:
        pytest.skip("only root may mount a small file system")
    yield tmp_path
    libc.umount2(bytes(tmp_path), 2)


@pytest.mark.parametrize("free_kib", [0, 4, 40, 100])
@pytest.mark.parametrize("there", [True, False], ids=["with a state file", "empty"])
async def test_a_full_disk_is_refused_and_leaves_what_was_there(
    small_disk: Path, there: bool, free_kib: int
) -> None:
    state_dir = small_disk / "state"
    state_dir.mkdir()
    path = state_dir / "state.sqlite"
    if there:
        await (await Store.open(state_dir)).close()
    before = path.read_bytes() if there else None
    fill(small_disk / "filler", free_kib)
    refusal: GpudError | None = None
    try:
        await (await Store.open(state_dir)).close()
    except GpudError as error:
        refusal = error
    if refusal is not None:
        assert refusal.code is Code.STATE_UNUSABLE
        assert "room" in refusal.hint or "full" in refusal.hint
        assert before in {None, path.read_bytes() if path.exists() else b"it is gone"}
    assert refusal is not None or free_kib
    (small_disk / "filler").unlink()
    await (await Store.open(state_dir)).close()


def fill(filler: Path, free_kib: int) -> None:
    with filler.open("wb", buffering=0) as stream, suppress(OSError):
        while stream.write(b"x" * 4096):
            pass
    os.truncate(filler, max(0, filler.stat().st_size - free_kib * 1024))
