from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import fields, replace
from decimal import Decimal
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud import schema
from gpud.model import (
    Gpu,
    GuestInput,
    Instance,
    KnownCard,
    NumaNode,
    PciAddress,
    Status,
    Step,
    Tier,
)
from gpud.schema import (
    COLUMNS,
    MIGRATIONS,
    from_row,
    guest_input_from,
    guest_input_row,
    known_card_from,
    known_card_row,
    migrate,
    to_row,
)
from tests.unit.fakes.orders import grant

TIMES = st.floats(min_value=0, max_value=1e11)
TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
ADDRESSES = st.builds(
    PciAddress,
    st.sampled_from([0, 0x10000, 0xFFFFFFFF]),
    st.integers(0, 255),
    st.integers(0, 31),
    st.integers(0, 7),
)
GPUS = st.builds(
    Gpu,
    ADDRESSES,
    st.just("h100_sxm"),
    st.booleans(),
    st.lists(ADDRESSES, max_size=4).map(tuple),
    st.none() | st.integers(0, 7),
    TEXTS,
    TEXTS,
)
NODES = st.builds(NumaNode, st.integers(0, 7), st.integers(0, 256), st.integers(0, 2**30))
GRANTS = st.builds(
    lambda gpus, address, cost, region, nodes: replace(
        grant(), gpus=tuple(gpus), address=address, cost_per_hour=cost, region=region, nodes=nodes
    ),
    st.lists(GPUS, max_size=8, unique=True),
    st.none() | st.ip_addresses(v=4),
    st.decimals(min_value=0, max_value=10**6, places=6),
    TEXTS,
    st.lists(NODES, max_size=3).map(tuple),
)
INSTANCES = st.builds(
    Instance,
    upstream_id=st.from_regex(r"i-[0-9a-f]{16}", fullmatch=True),
    instance_id=TEXTS,
    fingerprint=TEXTS,
    tier=st.sampled_from(Tier),
    grant=GRANTS,
    status=st.sampled_from(Status),
    step=st.sampled_from(Step),
    step_since=TIMES,
    created_at=TIMES,
    running_at=st.none() | TIMES,
    ended_at=st.none() | TIMES,
    delete_requested_at=st.none() | TIMES,
    failure=st.none() | TEXTS,
    boot_id=st.none() | st.text(),
    guest_boots=st.integers(0, 2**40),
    boots_at_start=st.integers(0, 2**40),
    script_exit_code=st.none() | st.integers(0, 255),
    restarts=st.integers(0, 1000),
    last_start_at=st.none() | TIMES,
    former_drivers=st.dictionaries(ADDRESSES, TEXTS, max_size=4),
)


@pytest.fixture(scope="module")
def connection() -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.row_factory = sqlite3.Row
    migrate(connection)
    yield connection
    connection.close()


def test_a_new_file_gets_every_migration_and_a_current_one_none(
    connection: sqlite3.Connection,
) -> None:
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    assert migrate(fresh) == 0
    assert migrate(fresh) == len(MIGRATIONS)
    fresh.close()
    assert migrate(connection) == len(MIGRATIONS)


def test_a_file_from_a_newer_gpud_is_not_touched() -> None:
    newer = sqlite3.connect(":memory:", isolation_level=None)
    newer.execute("PRAGMA user_version = 99")
    assert migrate(newer) == 99
    assert newer.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    newer.close()


def test_migrations_build_on_each_other_and_a_broken_one_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = sqlite3.connect(":memory:", isolation_level=None)
    migrate(old)
    more = (*MIGRATIONS, "ALTER TABLE event ADD COLUMN x TEXT;", "CREATE TABLE half (x); OOPS;")
    monkeypatch.setattr(schema, "MIGRATIONS", more)
    with pytest.raises(sqlite3.OperationalError, match="OOPS"):
        migrate(old)
    old.execute("ROLLBACK")
    assert old.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS) + 1
    assert old.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchone() is None
    old.close()


def test_the_columns_are_the_tables_and_every_field_of_an_instance_is_among_them(
    connection: sqlite3.Connection,
) -> None:
    table = [row["name"] for row in connection.execute("PRAGMA table_info(instance)")]
    assert sorted(COLUMNS) == sorted(table)
    assert {field.name for field in fields(Instance)} - {"grant"} <= set(COLUMNS)


@given(instance=INSTANCES)
def test_an_instance_comes_back_as_it_was(
    connection: sqlite3.Connection, instance: Instance
) -> None:
    connection.execute("DELETE FROM instance")
    names = ", ".join(f":{name}" for name in COLUMNS)
    row = to_row(instance)
    connection.execute(f"INSERT INTO instance ({', '.join(COLUMNS)}) VALUES ({names})", row)  # noqa: S608
    assert from_row(connection.execute("SELECT * FROM instance").fetchone()) == instance


def test_an_instance_from_before_real_cards_is_read(connection: sqlite3.Connection) -> None:
    connection.execute("DELETE FROM instance")
    sold = Instance(
        "i-" + "0" * 16, "x", "", Tier.SPOT, grant(), Status.RUNNING, Step.RUNNING, 0, 0
    )
    row = {**to_row(sold), "gpus": '[["0000:01:00.0", true]]'}
    del row["nodes"], row["former_drivers"]
    names = ", ".join(f":{name}" for name in row)
    connection.execute(f"INSERT INTO instance ({', '.join(row)}) VALUES ({names})", row)  # noqa: S608
    found = from_row(connection.execute("SELECT * FROM instance").fetchone())
    assert found == replace(sold, grant=replace(sold.grant, nodes=()))


@given(
    card=st.builds(
        KnownCard, ADDRESSES, TEXTS, st.none() | TEXTS, st.none() | TEXTS, st.none() | TEXTS,
        st.none() | st.integers(0, 2**40), st.lists(ADDRESSES, max_size=3).map(tuple), st.booleans(),
    )
)  # fmt: skip
def test_what_is_known_of_a_card_comes_back_as_it_was(
    connection: sqlite3.Connection, card: KnownCard
) -> None:
    connection.execute("DELETE FROM known_card")
    places = ", ".join("?" * len(known_card_row(card)))
    connection.execute(f"INSERT INTO known_card VALUES ({places})", known_card_row(card))  # noqa: S608
    row = connection.execute("SELECT * FROM known_card").fetchone()
    assert known_card_from(row) == card


def test_prices_and_addresses_are_stored_as_text_without_loss(
    connection: sqlite3.Connection,
) -> None:
    assert connection is not None
    exact = replace(grant(), cost_per_hour=Decimal("0.1"), address=IPv4Address("10.0.0.255"))
    row = to_row(
        Instance("i-" + "0" * 16, "x", "", Tier.SPOT, exact, Status.ERROR, Step.ENDED, 0, 0)
    )
    assert (row["cost_per_hour"], row["address"]) == ("0.1", "10.0.0.255")


@given(
    keys=st.lists(TEXTS, max_size=3),
    image=st.none() | TEXTS,
    script=st.none() | st.binary(max_size=200),
)
def test_guest_input_comes_back_byte_for_byte(
    connection: sqlite3.Connection, keys: list[str], image: str | None, script: bytes | None
) -> None:
    given_input = GuestInput(tuple(keys), image, script)
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("DELETE FROM guest_input")
    row = guest_input_row("i-1", given_input)
    connection.execute("INSERT INTO guest_input VALUES (?, ?, ?, ?)", row)
    found = connection.execute("SELECT * FROM guest_input").fetchone()
    assert guest_input_from(found) == given_input
