"""What happened is remembered, for so long; who ordered what is remembered for ever."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import structlog.testing

from gpud import history
from gpud.history import Event
from gpud.model import Instance, PciAddress, Step
from gpud.store import Store
from tests.unit.fakes.orders import Clock, grant, granting, order, quick_directory, until
from tests.unit.lifecycle.gpud_under_test import RELEASE_STEPS

GPU = PciAddress(0, 1, 0, 0)
DAY_S = 86400.0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "_NEWEST", 3)
    monkeypatch.setattr(history, "PER_INSTANCE", 5)
    monkeypatch.setattr(history, "_BATCH", 2)


async def new_instance(store: Store, number: int = 1) -> Instance:
    return (await store.admit(order(f"order-{number}"), granting(grant(number)))).instance


async def end(store: Store, instance: Instance) -> None:
    for step in (*RELEASE_STEPS, Step.ENDED):
        instance = await store.move(instance, step)


def whys(events: list[Event]) -> list[str]:
    return [event.why for event in events]


# -- events ----------------------------------------------------------------------------------------


async def test_a_note_is_an_event_of_its_own(store: Store, clock: Clock) -> None:
    version = store.version
    await store.note("swapped", upstream_id="i-1", gpu=GPU, was="this", became="that")
    await store.note("nobody's")
    first, second = await store.events()
    assert first == Event(first.id, clock.now, "i-1", GPU, "this", "that", "swapped")
    assert second == Event(first.id + 1, clock.now, "", None, "", "", "nobody's")
    assert store.version == version


async def test_events_are_of_one_instance_or_gpu_and_the_newest_or_those_after_one(
    store: Store,
) -> None:
    for number in range(1, 7):
        gpu = GPU if number % 2 else None
        await store.note(f"{number}", upstream_id=f"i-{number % 3}", gpu=gpu)
    assert whys(await store.events()) == ["1", "2", "3", "4", "5", "6"]
    assert whys(await store.events("i-0")) == ["3", "6"]
    assert whys(await store.events(gpu=GPU)) == ["1", "3", "5"]
    assert whys(await store.events("i-0", gpu=GPU)) == ["3"]
    assert whys(await store.events(limit=2)) == ["5", "6"]
    third = (await store.events(limit=4))[0]
    assert whys(await store.events(after=third.id)) == ["4", "5", "6"]
    assert whys(await store.events(after=third.id, limit=2)) == ["4", "5"]
    assert whys(await store.events(after=10**6)) == []


async def test_quarantine_and_release_are_events_of_the_card(store: Store) -> None:
    await store.quarantine(GPU, "fans rattle")
    assert await store.release(GPU)
    assert not await store.release(GPU)
    assert [(one.gpu, one.was, one.became, one.why) for one in await store.events()] == [
        (GPU, "", "quarantined", "fans rattle"),
        (GPU, "quarantined", "released", "released from quarantine"),
    ]


async def test_a_card_quarantined_after_a_guest_names_the_guests_instance(store: Store) -> None:
    instance = await new_instance(store)
    await store.move(instance, Step.STOP_DOMAIN, quarantine={GPU: "it is silent"})
    (event,) = await store.events(gpu=GPU)
    assert (event.upstream_id, event.became) == (instance.upstream_id, "quarantined")
    assert event.why == "it is silent"


async def test_an_event_that_cannot_be_recorded_is_told_and_holds_up_nothing(store: Store) -> None:
    await store._run(lambda: store._connection.execute("DROP TABLE event"))
    with structlog.testing.capture_logs() as logs:
        await store.note("something happened")
    assert [log["event_is"] for log in logs] == ["something happened"]


# -- forgetting ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few")
async def test_old_events_go_in_batches_and_the_newest_stay_whatever_their_age(
    store: Store, clock: Clock
) -> None:
    for number in range(8):
        await store.note(f"{number}")
    clock.advance(2 * DAY_S)
    assert await store.prune(3) == 0
    await store.note("today")
    assert await store.prune(1) == 6
    assert whys(await store.events()) == ["6", "7", "today"]
    clock.advance(1000 * DAY_S)
    assert await store.prune(1) == 0


@pytest.mark.usefixtures("few")
async def test_a_live_instance_has_only_so_many_events_and_the_others_keep_theirs(
    store: Store,
) -> None:
    rebooting, quiet = await new_instance(store, 1), await new_instance(store, 2)
    ended = await new_instance(store, 3)
    await end(store, ended)
    for number in range(9):
        await store.guest_booted(rebooting.upstream_id, f"boot-{number}")
    assert await store.prune(90) == 5
    assert len(await store.events(rebooting.upstream_id)) == 5
    assert whys(await store.events(quiet.upstream_id)) == ["order accepted"]
    assert len(await store.events(ended.upstream_id)) == 1 + len(RELEASE_STEPS) + 1


@pytest.mark.usefixtures("few")
async def test_forgetting_touches_no_instance_and_an_old_order_is_still_the_same_one(
    store: Store, clock: Clock
) -> None:
    ended = await new_instance(store)
    await end(store, ended)
    before = await store.find("order-1")
    clock.advance(10 * 365 * DAY_S)
    for number in range(5):
        await store.note(f"{number}")
    assert await store.prune(1) == 1 + len(RELEASE_STEPS) + 1
    assert await store.events(ended.upstream_id) == []
    again = await store.admit(order("order-1"), granting(grant(1)))
    assert (again.replayed, again.instance) == (True, before)
    assert await store.find(ended.upstream_id) == before


@pytest.mark.usefixtures("few")
async def test_an_order_comes_in_between_two_batches(store: Store, clock: Clock) -> None:
    for number in range(40):
        await store.note(f"{number}")
    clock.advance(2 * DAY_S)
    pruning = asyncio.create_task(store.prune(1))
    await asyncio.sleep(0)
    await new_instance(store)
    assert not pruning.done()
    assert len(await store.events()) > 10
    await pruning


@pytest.mark.usefixtures("few")
async def test_events_are_forgotten_at_once_and_then_every_day(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_DAY_S", 0.005)
    for number in range(5):
        await store.note(f"{number}")
    clock.advance(2 * DAY_S)
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(store.keep_short(1))
        await until(lambda: logs)
        await store.note("5")
        clock.advance(2 * DAY_S)
        await until(lambda: len(logs) > 1)
    task.cancel()
    assert [log["events"] for log in logs] == [2, 1]


async def test_a_day_on_which_it_fails_does_not_end_the_daemon(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_DAY_S", 0.001)
    await store._run(lambda: store._connection.execute("DROP TABLE event"))
    with structlog.testing.capture_logs() as logs:
        task = asyncio.create_task(store.keep_short(1))
        await until(lambda: len(logs) > 1)
    assert not task.done()
    task.cancel()


# -- many -------------------------------------------------------------------------------------------


def plan(connection: sqlite3.Connection, query: str) -> str:
    """How SQLite would go about it."""
    return "; ".join(row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {query}"))


async def plans_of(store: Store, work: Callable[[], Awaitable[object]]) -> list[str]:
    """How SQLite goes about each question that ``work`` asks: the same for ten rows or a million."""
    asked: list[str] = []
    await store._run(lambda: store._connection.set_trace_callback(asked.append))
    await work()
    await store._run(lambda: store._connection.set_trace_callback(None))
    queries = [query for query in asked if query.startswith(("SELECT", "DELETE"))]
    return [await store._run(partial(plan, store._connection, query)) for query in queries]


async def test_ended_instances_are_not_read_through_when_the_state_is_opened(store: Store) -> None:
    async def load() -> None:
        await store._run(store._load)

    assert [step for step in await plans_of(store, load) if "instance" in step] == [
        "SCAN instance USING INDEX instance_live",  # which holds the live ones alone
        "SCAN instance USING INDEX instance_created",  # for the newest: it ends with the first
    ]


async def test_the_newest_instances_are_found_without_sorting_all(store: Store) -> None:
    assert await plans_of(store, lambda: store.recent(3)) == [
        "SCAN instance USING INDEX instance_created"
    ]


async def test_an_order_and_a_question_for_an_instance_find_theirs_by_key(store: Store) -> None:
    plans = await plans_of(store, lambda: store.find("order-1"))
    plans += await plans_of(store, lambda: store.admit(order(), granting(grant())))
    assert not any("SCAN" in step for step in plans if "instance" in step)


async def test_each_question_about_events_finds_an_index(store: Store) -> None:
    await new_instance(store)
    questions: dict[str, Callable[[], Awaitable[object]]] = {
        "SEARCH event USING INDEX event_instance (upstream_id=? AND id>?)":
            lambda: store.events("i-1"),
        "SEARCH event USING INDEX event_gpu (gpu=? AND id>?)": lambda: store.events(gpu=GPU),
        "SEARCH event USING INTEGER PRIMARY KEY (rowid>?)": store.events,
    }  # fmt: skip
    for wanted, ask in questions.items():
        assert await plans_of(store, ask) == [wanted]
    old, of_one = await plans_of(store, lambda: store.prune(90))
    assert "event_at (at<?)" in old
    assert "event_instance (upstream_id=?)" in of_one


async def test_a_state_file_with_events_of_an_older_gpud_is_pruned_too(
    clock: Clock,
    few: None,  # noqa: ARG001
) -> None:
    with quick_directory() as state_dir:
        await (await Store.open(state_dir, clock)).close()
        with closing(sqlite3.connect(Path(state_dir) / "state.sqlite")) as connection, connection:
            query = (
                "INSERT INTO event (at, upstream_id, was, became, why) VALUES (1, 'i', '', '', '')"
            )
            connection.executemany(query, [()] * 10)
        store = await Store.open(state_dir, clock)
        assert await store.prune(90) == 7
        await store.close()
