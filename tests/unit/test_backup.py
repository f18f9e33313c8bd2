"""Backups: a copy of the running state, and the careful way back."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from pathlib import Path

import pytest

from gpud.backup import back_up, restore
from gpud.errors import Code, GpudError
from gpud.guest import durable
from gpud.model import Instance, Step
from gpud.schema import MIGRATIONS, RESTORED
from gpud.statefile import connect, interrupted
from gpud.store import Store
from tests.unit.fakes.orders import Clock, grant, granting, order

NOW = 1_800_000_000.0
KEPT = "state.sqlite.before-restore-20270115T080000Z"


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "backup"


@pytest.fixture
async def store(state_dir: Path, clock: Clock) -> AsyncIterator[Store]:
    store = await Store.open(state_dir, clock)
    yield store
    await store.close()


def make_state(state_dir: Path) -> None:
    """A state as it is after a daemon's first start and stop."""

    async def start_and_stop() -> None:
        await (await Store.open(state_dir)).close()

    asyncio.run(start_and_stop())


async def new_instance(store: Store, number: int = 1) -> Instance:
    return (await store.admit(order(f"order-{number}"), granting(grant(number)))).instance


def names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def refused(state_dir: Path, file: Path) -> GpudError:
    before = {one: one.read_bytes() for one in state_dir.iterdir()}
    with pytest.raises(GpudError) as caught:
        restore(state_dir, file)
    assert caught.value.code is Code.STATE_UNUSABLE
    assert {one: one.read_bytes() for one in state_dir.iterdir()} == before
    return caught.value


# -- there ------------------------------------------------------------------------------------------


async def test_a_backup_of_a_running_daemon_is_whole_and_nobodys_to_read(
    store: Store, state_dir: Path, file: Path
) -> None:
    instance = await new_instance(store)
    assert (state_dir / "state.sqlite-wal").stat().st_size  # what was committed is there alone
    before = (state_dir / "state.sqlite").read_bytes()
    back_up(state_dir, file)
    assert (state_dir / "state.sqlite").read_bytes() == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert names(file.parent) == {"backup", "state"}
    with closing(sqlite3.connect(file)) as copy:
        assert copy.execute("SELECT upstream_id FROM instance").fetchall() == [
            (instance.upstream_id,)
        ]
        assert copy.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
        assert copy.execute("SELECT count(*) FROM meta WHERE key = ?", (RESTORED,)).fetchone() == (
            0,
        )
    assert (await new_instance(store, 2)).instance_id == "order-2"


async def test_a_backup_in_the_middle_of_orders_is_as_of_one_moment(
    store: Store, state_dir: Path, tmp_path: Path
) -> None:
    async def orders() -> None:
        for number in range(30):
            await new_instance(store, number)

    ordering = asyncio.create_task(orders())
    for number in range(3):
        await asyncio.sleep(0.001)
        await asyncio.to_thread(back_up, state_dir, tmp_path / f"backup-{number}")
    await ordering
    for number in range(3):
        with closing(sqlite3.connect(tmp_path / f"backup-{number}")) as copy:
            orphans = copy.execute(
                "SELECT count(*) FROM instance LEFT JOIN gpu_claim USING (upstream_id)"
                " WHERE gpu_claim.gpu IS NULL"
            )
            assert orphans.fetchone() == (0,)


@pytest.mark.parametrize("there", ["a file", "a link to nowhere"])
def test_a_backup_overwrites_nothing(state_dir: Path, file: Path, there: str) -> None:
    make_state(state_dir)
    if there == "a file":
        file.write_text("last week's")
    else:
        file.symlink_to("nowhere")
    with pytest.raises(GpudError, match="is there already") as caught:
        back_up(state_dir, file)
    assert "another name" in caught.value.hint
    assert there != "a file" or file.read_text() == "last week's"


def test_a_backup_of_nothing_is_refused_and_leaves_nothing(state_dir: Path, file: Path) -> None:
    with pytest.raises(GpudError, match="there is no state at"):
        back_up(state_dir, file)
    assert list(file.parent.iterdir()) == []


def test_a_backup_of_a_damaged_state_is_refused_and_leaves_nothing(
    state_dir: Path, file: Path
) -> None:
    make_state(state_dir)
    path = state_dir / "state.sqlite"
    content = bytearray(path.read_bytes())
    content[8192:16384] = b"\xff" * 8192
    path.write_bytes(content)
    with pytest.raises(GpudError, match=r"damaged|malformed"):
        back_up(state_dir, file)
    assert names(file.parent) == {"state"}


def test_a_backup_where_nothing_can_be_written_is_refused(state_dir: Path, tmp_path: Path) -> None:
    make_state(state_dir)
    with pytest.raises(GpudError, match="No such file or directory") as caught:
        back_up(state_dir, tmp_path / "gone" / "backup")
    assert "its directory is not there" in caught.value.hint


def test_a_backup_for_which_there_is_no_room_names_where(
    state_dir: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_state(state_dir)

    class Full(sqlite3.Connection):
        def backup(self, target: sqlite3.Connection, **_: object) -> None:
            target.execute("PRAGMA max_page_count = 2")
            target.execute("CREATE TABLE one (x)")
            target.execute("CREATE TABLE two (x)")

    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: plain(*a, **k, factory=Full))
    with pytest.raises(GpudError, match="full") as caught:
        back_up(state_dir, file)
    assert str(file) in caught.value.detail
    assert "make room" in caught.value.hint
    assert names(file.parent) == {"state"}


# -- and back ---------------------------------------------------------------------------------------


async def test_a_restored_state_is_as_it_was_and_marked_until_it_is_trusted(
    state_dir: Path, file: Path, clock: Clock
) -> None:
    store = await Store.open(state_dir, clock)
    assert not store.restored
    first = await new_instance(store)
    given = await store.guest_input(first.upstream_id)
    back_up(state_dir, file)
    await store.move(first, Step.CLONE_DISK)
    await new_instance(store, 2)
    await store.close()

    assert restore(state_dir, file, clock) == state_dir / KEPT
    assert stat.S_IMODE((state_dir / "state.sqlite").stat().st_mode) == 0o600
    for life in range(3):
        again = await Store.open(state_dir, clock)
        assert again.live == {first.upstream_id: first}
        assert await again.guest_input(first.upstream_id) == given
        assert again.owner == store.owner
        assert again.restored == (life < 2)
        if life == 1:
            await again.trust()
            assert not again.restored
            became = [event.became for event in await again.events(limit=2)]
            assert became == ["restored", "trusted"]
        await again.close()


async def test_the_state_that_was_replaced_is_kept_with_its_log(
    state_dir: Path, file: Path, clock: Clock
) -> None:
    store = await Store.open(state_dir, clock)
    back_up(state_dir, file)
    await new_instance(store)
    left = {one: one.read_bytes() for one in state_dir.glob("state.sqlite*")}
    await store.close()
    for one, content in left.items():  # as a crash leaves it
        one.write_bytes(content)
        one.chmod(0o644)
    assert restore(state_dir, file, clock) == state_dir / KEPT
    assert names(state_dir) == {"lock", "state.sqlite", KEPT, f"{KEPT}-wal"}
    assert stat.S_IMODE((state_dir / KEPT).stat().st_mode) == 0o600
    with closing(sqlite3.connect(state_dir / KEPT)) as kept:
        assert kept.execute("SELECT count(*) FROM instance").fetchone() == (1,)


def test_a_state_comes_back_where_there_is_none(state_dir: Path, file: Path) -> None:
    make_state(state_dir)
    (state_dir / "state.sqlite").rename(file)
    (state_dir / "instances" / "i-0123456789abcdef").mkdir(parents=True)
    assert restore(state_dir, file) is None
    connect(state_dir).close()


def test_two_restores_at_once_keep_both(state_dir: Path, file: Path, clock: Clock) -> None:
    make_state(state_dir)
    back_up(state_dir, file)
    restore(state_dir, file, clock)
    with pytest.raises(GpudError, match="is there already"):
        restore(state_dir, file, clock)
    clock.advance(1)
    restore(state_dir, file, clock)
    connect(state_dir).close()
    assert len(list(state_dir.glob("*before-restore*"))) == 2


async def test_a_restore_under_a_running_daemon_is_refused(
    store: Store, state_dir: Path, file: Path
) -> None:
    assert store.live == {}
    back_up(state_dir, file)
    error = refused(state_dir, file)
    assert "another gpud is running" in error.detail
    assert error.hint == "stop it first"


@pytest.mark.parametrize(
    "what",
    ["missing", "text", "damaged", "of a newer gpud", "another program's", "without an owner"],
)
def test_what_is_no_sound_state_is_not_restored(state_dir: Path, file: Path, what: str) -> None:
    make_state(state_dir)
    back_up(state_dir, file)
    with closing(sqlite3.connect(file, isolation_level=None)) as copy:
        if what == "of a newer gpud":
            copy.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        if what == "another program's":
            copy.execute("DROP TABLE gpu_claim")
        if what == "without an owner":
            copy.execute("DELETE FROM meta")
    content = file.read_bytes()
    if what == "missing":
        file.unlink()
    if what == "text":
        file.write_text("a letter\n" * 1000)
    if what == "damaged":
        file.write_bytes(content[:8192] + b"\xff" * 8192 + content[16384:])
    assert str(file) in refused(state_dir, file).detail


@pytest.mark.parametrize("crash", range(4))
async def test_a_restore_that_is_cut_short_anywhere_starts_no_daemon_on_half_of_it(
    state_dir: Path, file: Path, clock: Clock, crash: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each act that changes a name is the last one once; then the restore is repeated."""
    store = await Store.open(state_dir, clock)
    first = await new_instance(store)
    back_up(state_dir, file)
    second = await new_instance(store, 2)
    left = {one: one.read_bytes() for one in state_dir.glob("state.sqlite*")}
    await store.close()
    for one, content in left.items():
        one.write_bytes(content)

    class PowerCut(BaseException):
        pass

    done = 0

    def cutting(act: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def act_or_cut(path: Path, target: Path) -> Path:
            nonlocal done
            done += 1
            if done > crash:
                raise PowerCut
            return act(path, target)

        return act_or_cut

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, cutting(getattr(Path, name)))
    with pytest.raises(PowerCut):
        restore(state_dir, file, clock)
    monkeypatch.undo()
    if interrupted(state_dir / "state.sqlite").exists():
        with pytest.raises(GpudError, match=r"broken off|restoring is there"):
            await Store.open(state_dir, clock)
        clock.advance(1)
        restore(state_dir, file, clock)
        assert (await opened(state_dir, clock)) == {first.upstream_id}
    else:  # it had not begun to change anything
        assert crash == 0
        assert (await opened(state_dir, clock)) == {first.upstream_id, second.upstream_id}


async def opened(state_dir: Path, clock: Clock) -> set[str]:
    store = await Store.open(state_dir, clock)
    live = set(store.live)
    await store.close()
    return live


def test_a_failing_disk_is_told_of(
    state_dir: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_state(state_dir)
    back_up(state_dir, file)

    def fail(_unfinished: Path, _path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable, "sync", lambda _path: None)
    with monkeypatch.context() as patched:
        patched.setattr(durable, "commit", fail)
        assert "Input/output error" in refused(state_dir, file).detail
    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", fail)
        with pytest.raises(GpudError, match="Input/output error"):
            restore(state_dir, file)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_what_root_restores_is_the_daemons(state_dir: Path, file: Path) -> None:
    make_state(state_dir)
    back_up(state_dir, file)
    os.chown(state_dir, 65534, 65534)
    restore(state_dir, file)
    owners = {name: (state_dir / name).stat().st_uid for name in ("state.sqlite", "lock")}
    assert owners == {"state.sqlite": 65534, "lock": 65534}
