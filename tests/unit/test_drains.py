"""Drains in the record: kept over restarts and deaths, told as events."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from gpud.drains import Drain
from gpud.errors import GpudError
from gpud.model import KnownCard, PciAddress
from gpud.store import Store
from tests.unit.fakes.orders import Clock

GPU, OTHER = PciAddress(0, 0x41, 0, 0), PciAddress(0, 0x42, 0, 0)


async def told(store: Store) -> list[tuple[str | None, str, str]]:
    return [
        (str(one.gpu) if one.gpu else None, one.became, one.why) for one in await store.events()
    ]


async def test_a_card_and_the_server_are_drained_apart(store: Store, clock: Clock) -> None:
    await store.drain(GPU, "new fan")
    clock.advance(60)
    await store.drain(None)
    assert store.drains == {
        GPU: Drain(GPU, clock.now - 60, "new fan"),
        None: Drain(None, clock.now, ""),
    }
    assert not await store.undrain(OTHER)
    assert await store.undrain(None)
    assert not await store.undrain(None)
    assert list(store.drains) == [GPU]


async def test_what_is_done_again_changes_nothing_but_the_reason(
    store: Store, clock: Clock
) -> None:
    await store.drain(GPU, "new fan")
    since, version = clock.now, store.version
    clock.advance(60)
    for again in ("", "new fan"):
        await store.drain(GPU, again)
    assert (store.version, len(await store.events())) == (version, 1)
    await store.drain(GPU, "new power supply")
    assert store.drains[GPU] == Drain(GPU, since, "new power supply")


async def test_each_drain_and_its_end_is_an_event(store: Store) -> None:
    await store.drain(GPU, "new fan")
    await store.drain(GPU)
    await store.undrain(GPU)
    await store.undrain(GPU)
    await store.drain(None)
    await store.undrain(None)
    assert await told(store) == [
        ("0000:41:00.0", "drained", "new fan"),
        ("0000:41:00.0", "undrained", "by the operator"),
        (None, "drained", "the whole server: by the operator"),
        (None, "undrained", "the whole server: by the operator"),
    ]
    assert [one.why for one in await store.events(gpu=GPU)] == ["new fan", "by the operator"]


async def test_a_drain_survives_the_death_of_the_daemon(
    store: Store, state_dir: Path, tmp_path: Path
) -> None:
    await store.drain(GPU, "new fan")
    await store.drain(None, "new kernel")
    shutil.copytree(state_dir, tmp_path / "as a kill leaves it")
    after = await Store.open(tmp_path / "as a kill leaves it", Clock())
    assert after.drains == store.drains
    await after.close()


async def test_a_card_that_was_taken_out_for_good_is_drained_no_more(store: Store) -> None:
    await store.remember_card(KnownCard(GPU, "10de:2330 10de:16c1"))
    await store.drain(GPU, "to be sold")
    await store.drain(None, "new kernel")
    await store.remember_card(KnownCard(GPU, "10de:2335 10de:16c1"))
    assert GPU in store.drains, "another card in its place is drained like it"
    assert await store.forget_card(GPU)
    assert list(store.drains) == [None]
    assert (await told(store))[-1] == ("0000:41:00.0", "undrained", "the card was taken out")
    assert not await store.forget_card(GPU)


async def test_the_drain_of_a_card_that_nobody_knows_is_forgotten_too(store: Store) -> None:
    await store.drain(GPU)
    assert await store.forget_card(GPU)
    assert store.drains == {}


async def test_a_drain_that_is_no_drain_is_refused_at_the_start(state_dir: Path) -> None:
    await (await Store.open(state_dir, Clock())).close()
    with closing(sqlite3.connect(state_dir / "state.sqlite")) as connection, connection:
        connection.execute("INSERT INTO drain VALUES ('third', 0, '')")
    with pytest.raises(GpudError, match="is not a PCI address"):
        await Store.open(state_dir, Clock())
