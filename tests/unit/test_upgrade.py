"""What the first gpud wrote is carried on by today's: its file was written by its own code."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gpud import schema
from gpud.model import GuestInput, Order, Status, Step, Tier
from gpud.schema import MIGRATIONS, to_row
from gpud.statefile import connect
from gpud.store import Store
from tests.unit.fakes.orders import Clock, grant, granting, quick_directory

FIRST = Path(__file__).parents[1] / "data" / "state-1.sql"
LIVE = {
    "running": (Status.RUNNING, Step.RUNNING),
    "creating": (Status.CREATING, Step.CLONE_DISK),
    "stopping": (Status.STOPPING, Step.REMOVE_FILES),
    "failing": (Status.ERROR, Step.STOP_DOMAIN),
}


@pytest.fixture
def state_dir() -> Iterator[Path]:
    """A state directory as the first gpud left it."""
    with quick_directory() as directory:
        with closing(sqlite3.connect(directory / "state.sqlite")) as connection:
            connection.executescript(FIRST.read_text())
            connection.execute("PRAGMA journal_mode = WAL")
        yield directory


def rows(state_dir: Path, table: str) -> list[dict[str, Any]]:
    with closing(sqlite3.connect(state_dir / "state.sqlite")) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY 1")]  # noqa: S608


async def test_every_instance_of_the_first_gpud_is_found_as_it_was(state_dir: Path) -> None:
    before = rows(state_dir, "instance")
    assert len(before) == 6
    store = await Store.open(state_dir, Clock())
    assert {it.instance_id: (it.status, it.step) for it in store.live.values()} == LIVE
    for row in before:
        found = await store.find(row["upstream_id"])
        assert found is not None
        now = to_row(found)
        gpus = [[gpu["address"], gpu["stand_in"]] for gpu in json.loads(now["gpus"])]
        assert gpus == json.loads(row["gpus"])
        assert {key: now[key] for key in row if key != "gpus"} == {
            key: value for key, value in row.items() if key != "gpus"
        }
        assert (found.boot_id, found.grant.nodes, found.former_drivers) == (None, (), {})
    await store.close()


async def test_its_events_claims_secrets_and_owner_are_there_too(state_dir: Path) -> None:
    tables = ("event", "gpu_claim", "address_claim", "guest_input", "meta")
    before = {table: rows(state_dir, table) for table in tables}
    store = await Store.open(state_dir, Clock())
    events = await store.events()
    given = await store.guest_input("running")
    running = store.find_live("running")
    assert running is not None
    assert (await store.guest_input(running.upstream_id)).startup_script == bytes(range(1, 256))
    assert given == GuestInput()
    assert not store.restored
    await store.close()
    assert len(events) == len(before["event"]) > 30
    assert {event.gpu for event in events} == {None}
    after = {table: rows(state_dir, table) for table in tables}
    assert after == {**before, "event": [{**row, "gpu": None} for row in before["event"]]}


async def test_its_orders_are_still_the_same_orders(state_dir: Path) -> None:
    fingerprints = {row["instance_id"]: row["fingerprint"] for row in rows(state_dir, "instance")}
    store = await Store.open(state_dir, Clock())
    for instance_id, fingerprint in fingerprints.items():
        order = Order(instance_id, "h100_sxm", 1, Tier.ON_DEMAND, None, GuestInput(), fingerprint)
        assert (await store.admit(order, granting(grant()))).replayed
    await store.close()


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_each_version_in_between_is_brought_up_to_date(state_dir: Path, version: int) -> None:
    path = state_dir / "state.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if version > schema._WITHOUT_BOOT_ID:
            schema._add_boot_id(connection)
        for number, script in enumerate(MIGRATIONS[1:version], start=2):
            connection.executescript(f"{script} PRAGMA user_version = {number};")
    with closing(connect(state_dir)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
        assert connection.execute("SELECT count(boot_id), count(*) FROM instance").fetchone()[
            :
        ] == (0, 6)


def test_a_file_brought_up_to_date_is_like_a_new_one(state_dir: Path, tmp_path: Path) -> None:
    def layout(directory: Path) -> set[tuple[str, ...]]:
        with closing(connect(directory)) as connection:
            names = connection.execute("SELECT type, name FROM sqlite_master").fetchall()
            return {
                (*map(str, entry), *sorted(str(column[1]) for column in columns))
                for entry in names
                for columns in [connection.execute(f"PRAGMA table_info({entry[1]})").fetchall()]
            }

    assert layout(state_dir) == layout(tmp_path)
