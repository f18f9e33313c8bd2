from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpud.errors import Code, GpudError
from gpud.model import (
    FIRST_STEP,
    LEGAL_STATUS,
    LEGAL_STEPS,
    Grant,
    GuestInput,
    Instance,
    Status,
    Step,
)
from gpud.store import Store
from tests.unit.fakes.orders import SHAPE, Clock, grant, granting, order, quick_directory
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, RELEASE_STEPS

SECRET = b"#!/bin/sh\nexport TOKEN=s3cr3t-in-a-script\n"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAISecretKeyOfATenant me"
RELEASE = (*RELEASE_STEPS, Step.ENDED)
CREATE = CREATE_STEPS[1:]

OpenStore = Callable[[], Awaitable[Store]]


@pytest.fixture
async def open_store(state_dir: Path, clock: Clock) -> AsyncIterator[OpenStore]:
    """Open the store, closing the one before as a crash would leave it: with what was committed."""
    opened: list[Store] = []

    async def reopen() -> Store:
        while opened:
            await opened.pop().close()
        opened.append(await Store.open(state_dir, clock))
        return opened[-1]

    yield reopen
    while opened:
        await opened.pop().close()


@pytest.fixture
async def store(open_store: OpenStore) -> Store:
    return await open_store()


async def admit(
    store: Store, instance_id: str = "order-1", number: int = 1, **given: Any
) -> Instance:
    admission = await store.admit(order(instance_id, **given), granting(grant(number)))
    return admission.instance


async def walk(store: Store, instance: Instance, *steps: Step) -> Instance:
    for step in steps:
        instance = await store.move(instance, step)
    return instance


async def run_it(store: Store, instance: Instance) -> Instance:
    instance = await walk(store, instance, *CREATE)
    changes: dict[str, Any] = {"status": Status.RUNNING, "running_at": instance.created_at + 40}
    return await store.move(instance, Step.RUNNING, **changes)


async def claims(state_dir: Path, table: str = "gpu_claim") -> list[tuple[str, str]]:
    connection = sqlite3.connect(state_dir / "state.sqlite")
    try:
        return connection.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall()  # noqa: S608
    finally:
        connection.close()


# -- admission -------------------------------------------------------------------------------------


async def test_an_accepted_order_is_creating_at_its_first_step(store: Store, clock: Clock) -> None:
    admission = await store.admit(order(), granting(grant()))
    instance = admission.instance
    assert not admission.replayed
    assert admission.usual_boot_s is None
    assert (instance.status, instance.step) == (Status.CREATING, FIRST_STEP)
    assert (instance.created_at, instance.step_since) == (clock.now, clock.now)
    assert instance.grant == grant()
    assert store.live == {instance.upstream_id: instance}


async def test_the_same_order_again_is_the_same_instance(store: Store) -> None:
    first = await admit(store)
    running = await run_it(store, first)
    again = await store.admit(order(), must_not_decide)
    assert again.replayed
    assert again.instance == running


async def test_a_repeat_of_an_ended_order_is_a_replay_too(store: Store) -> None:
    instance = await admit(store)
    await store.request_delete(instance.upstream_id)
    ended = await walk(store, store.live[instance.upstream_id], *RELEASE)
    again = await store.admit(order(), must_not_decide)
    assert (again.replayed, again.instance) == (True, ended)


async def test_the_same_id_with_another_body_is_refused(store: Store) -> None:
    await admit(store)
    with pytest.raises(GpudError) as caught:
        await store.admit(order(script=b"other"), must_not_decide)
    assert caught.value.code is Code.INSTANCE_ID_REUSED
    assert len(store.live) == 1


def must_not_decide(_grants: Sequence[Grant]) -> Grant:
    raise AssertionError("decided for a repeat")


async def test_a_refusal_records_nothing(store: Store, state_dir: Path) -> None:
    def refuse(_grants: Sequence[Grant]) -> Grant:
        raise GpudError(Code.NO_CAPACITY, "full")

    with pytest.raises(GpudError, match="full"):
        await store.admit(order(), refuse)
    assert store.live == {}
    assert store.version == 0
    assert await store.recent(10) == []
    assert await store.events() == []
    assert await claims(state_dir) == []
    assert (await admit(store)).status is Status.CREATING


async def test_a_decision_sees_the_grants_of_all_live_instances(store: Store) -> None:
    seen: list[Sequence[Grant]] = []

    def decide(grants: Sequence[Grant]) -> Grant:
        seen.append(grants)
        return grant(len(seen))

    for number in range(3):
        await store.admit(order(f"order-{number}"), decide)
    assert seen == [[], [grant(1)], [grant(1), grant(2)]]


@pytest.mark.parametrize(
    "second", [grant(1), grant(2, "10.77.0.9")], ids=["the same GPU", "the same address"]
)
async def test_nothing_is_claimed_twice_even_by_a_wrong_decision(
    store: Store, state_dir: Path, second: Grant
) -> None:
    first = grant(1, "10.77.0.9")
    instance = (await store.admit(order("a"), granting(first))).instance
    with pytest.raises(sqlite3.IntegrityError):
        await store.admit(order("b"), granting(second))
    assert set(store.live) == {instance.upstream_id}
    assert await store.find("b") is None
    assert len(await claims(state_dir)) == 1


async def test_one_gpu_twice_in_one_grant_is_refused(store: Store) -> None:
    doubled = replace(grant(1), gpus=grant(1).gpus * 2)
    with pytest.raises(sqlite3.IntegrityError):
        await store.admit(order(), granting(doubled))
    assert store.live == {}


async def test_twenty_copies_of_an_order_at_once_make_one_instance(store: Store) -> None:
    admissions = await asyncio.gather(*(store.admit(order(), granting(grant())) for _ in range(20)))
    assert len({admission.instance.upstream_id for admission in admissions}) == 1
    assert sum(not admission.replayed for admission in admissions) == 1


async def test_of_many_orders_at_once_as_many_win_as_there_are_gpus(store: Store) -> None:
    def decide(taken: Sequence[Grant]) -> Grant:
        free = {1, 2, 3} - {gpu.address.bus for one in taken for gpu in one.gpus}
        if not free:
            raise GpudError(Code.NO_CAPACITY, "full")
        return grant(min(free))

    outcomes = await asyncio.gather(
        *(store.admit(order(f"order-{number}"), decide) for number in range(30)),
        return_exceptions=True,
    )
    assert sum(not isinstance(outcome, BaseException) for outcome in outcomes) == 3
    held = [gpu for one in store.live.values() for gpu in one.grant.gpus]
    assert len(held) == len(set(held)) == 3


async def test_a_caller_that_goes_away_does_not_undo_the_admission(store: Store) -> None:
    task = asyncio.create_task(store.admit(order(), granting(grant())))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    found = await store.find("order-1")
    # Either it never began, or it is whole.
    assert found is None or store.live[found.upstream_id] == found


async def test_the_usual_boot_is_the_upper_quartile_of_the_shapes_recent_boots(
    store: Store, clock: Clock
) -> None:
    for number, boot_s in enumerate((400, 10, 30, 20)):
        instance = await walk(store, await admit(store, f"order-{number}", number), *CREATE)
        clock.advance(boot_s)
        changes: dict[str, Any] = {"status": Status.RUNNING, "running_at": clock.now}
        await store.move(instance, Step.RUNNING, **changes)
    other_shape = grant(9, shape=replace(SHAPE, gpu_count=2))
    assert (await store.admit(order("x"), granting(other_shape))).usual_boot_s is None
    assert (await store.admit(order("y"), granting(grant(8)))).usual_boot_s == 400
    assert (await store.admit(order("order-1"), must_not_decide)).usual_boot_s == 400


# -- moves -----------------------------------------------------------------------------------------


async def test_an_illegal_move_is_refused_and_records_nothing(store: Store) -> None:
    instance = await admit(store)
    events = await store.events()
    with pytest.raises(ValueError, match="cannot go from lease_address to running"):
        await store.move(instance, Step.RUNNING)
    assert store.live[instance.upstream_id] == instance
    assert await store.events() == events


async def test_a_move_from_where_the_instance_is_no_longer_is_refused(store: Store) -> None:
    instance = await admit(store)
    await store.move(instance, Step.CLONE_DISK)
    with pytest.raises(ValueError, match="no longer at lease_address"):
        await store.move(instance, Step.CLONE_DISK)


async def test_an_ended_instance_does_not_move(store: Store) -> None:
    instance = await admit(store)
    await store.request_delete(instance.upstream_id)
    ended = await walk(store, instance, *RELEASE)
    with pytest.raises(ValueError, match="no longer at"):
        await store.move(ended, Step.STOP_DOMAIN)


async def test_a_move_restarts_the_time_in_step(store: Store, clock: Clock) -> None:
    instance = await admit(store)
    clock.advance(5)
    moved = await store.move(instance, Step.CLONE_DISK, restarts=3)
    assert (moved.step_since, moved.restarts) == (clock.now, 3)
    assert moved.created_at == clock.now - 5


async def test_a_delete_wins_over_a_step_that_ends_meanwhile(store: Store) -> None:
    instance = await walk(store, await admit(store), *CREATE)
    await store.request_delete(instance.upstream_id)
    changes: dict[str, Any] = {"status": Status.RUNNING, "running_at": 1.0}
    moved = await store.move(instance, Step.RUNNING, **changes)
    assert (moved.status, moved.step) == (Status.STOPPING, Step.RUNNING)


async def test_a_failed_order_ends_as_error_and_its_claims_are_free(
    store: Store, state_dir: Path
) -> None:
    instance = (await store.admit(order(), granting(grant(1, "10.77.0.9")))).instance
    changes: dict[str, Any] = {"status": Status.ERROR, "failure": "its disk could not be made"}
    failed = await store.move(instance, Step.STOP_DOMAIN, **changes)
    ended = await walk(store, failed, *RELEASE[1:])
    assert (ended.status, ended.failure) == (Status.ERROR, "its disk could not be made")
    assert ended.ended_at is not None
    assert store.live == {}
    assert await claims(state_dir) == []
    assert await claims(state_dir, "address_claim") == []
    assert (await admit(store, "another", 1)).grant.gpus == grant(1).gpus


async def test_guest_reports_count_boots_and_forget_the_former_exit_code(store: Store) -> None:
    upstream_id = (await admit(store)).upstream_id
    await store.guest_booted(upstream_id, "boot-1")
    assert await store.script_exited(upstream_id, 7)
    assert store.live[upstream_id].script_exit_code == 7
    await store.guest_booted(upstream_id, "boot-2")
    instance = store.live[upstream_id]
    assert (instance.guest_boots, instance.script_exit_code) == (2, None)
    whys = [event.why for event in await store.events(upstream_id)]
    assert "the startup script ended with exit code 7" in whys


async def test_a_repeated_report_changes_nothing(store: Store) -> None:
    upstream_id = (await admit(store)).upstream_id
    await store.guest_booted(upstream_id, "boot-1")
    await store.script_exited(upstream_id, 7)
    version, events = store.version, await store.events(upstream_id)
    await store.guest_booted(upstream_id, "boot-1")
    assert not await store.script_exited(upstream_id, 7)
    assert store.version == version
    assert await store.events(upstream_id) == events


async def test_reports_of_an_ended_instance_change_nothing(store: Store) -> None:
    instance = await admit(store)
    await store.request_delete(instance.upstream_id)
    ended = await walk(store, instance, *RELEASE)
    version = store.version
    await store.guest_booted(instance.upstream_id, "boot-1")
    await store.script_exited(instance.upstream_id, 0)
    assert await store.find(instance.upstream_id) == ended
    assert store.version == version


# -- DELETE ----------------------------------------------------------------------------------------


async def test_delete_of_an_unknown_id_is_none(store: Store) -> None:
    assert await store.request_delete("never-heard-of") is None


@pytest.mark.parametrize("by", ["instance_id", "upstream_id"])
async def test_delete_is_recorded_once_whatever_the_id(store: Store, clock: Clock, by: str) -> None:
    instance = await admit(store)
    first = await store.request_delete(getattr(instance, by))
    clock.advance(60)
    assert await store.request_delete(getattr(instance, by)) == first
    assert first is not None
    assert (first.status, first.step) == (Status.STOPPING, FIRST_STEP)
    assert first.delete_requested_at == clock.now - 60
    assert len(await store.events()) == 2


@pytest.mark.parametrize("length", range(len(CREATE) + 1))
async def test_delete_in_every_create_step_is_stopping(store: Store, length: int) -> None:
    instance = await walk(store, await admit(store), *CREATE[:length])
    deleted = await store.request_delete(instance.upstream_id)
    assert deleted is not None
    assert (deleted.status, deleted.step) == (Status.STOPPING, instance.step)


async def test_delete_of_a_running_one_is_stopping_and_it_ends_terminated(store: Store) -> None:
    running = await run_it(store, await admit(store))
    await store.request_delete(running.upstream_id)
    assert store.live[running.upstream_id].status is Status.STOPPING
    ended = await walk(store, running, *RELEASE)
    assert ended.status is Status.TERMINATED


@pytest.mark.parametrize("length", range(len(RELEASE) - 1))
async def test_delete_of_a_failed_one_that_is_being_released_ends_terminated(
    store: Store, length: int
) -> None:
    instance = await store.move(await admit(store), RELEASE[0], status=Status.ERROR)
    instance = await walk(store, instance, *RELEASE[1 : length + 1])
    deleted = await store.request_delete(instance.upstream_id)
    assert deleted is not None
    assert deleted.status is Status.STOPPING
    ended = await walk(store, instance, *RELEASE[length + 1 :])
    assert ended.status is Status.TERMINATED


async def test_delete_of_an_ended_error_is_terminated_at_once(store: Store) -> None:
    failed = await store.move(await admit(store), RELEASE[0], status=Status.ERROR)
    ended = await walk(store, failed, *RELEASE[1:])
    heard: list[Instance] = []
    store.subscribe(heard.append)
    deleted = await store.request_delete(ended.upstream_id)
    assert deleted is not None
    assert deleted.status is Status.TERMINATED
    assert await store.find(ended.upstream_id) == deleted
    assert heard == [deleted]
    assert store.live == {}


async def test_delete_of_a_terminated_one_stays_terminated(store: Store) -> None:
    running = await run_it(store, await admit(store))
    stopping = await store.move(running, Step.STOP_DOMAIN, status=Status.STOPPING)
    ended = await walk(store, stopping, *RELEASE[1:])
    assert ended.delete_requested_at is None
    deleted = await store.request_delete(ended.upstream_id)
    assert deleted is not None
    assert (deleted.status, deleted.live) == (Status.TERMINATED, False)


# -- reading, listeners, events --------------------------------------------------------------------


async def test_an_instance_is_found_by_both_ids_live_and_ended(store: Store) -> None:
    instance = await admit(store)
    for either in (instance.instance_id, instance.upstream_id):
        assert store.find_live(either) == instance
        assert await store.find(either) == instance
    await store.request_delete(instance.upstream_id)
    ended = await walk(store, instance, *RELEASE)
    for either in (instance.instance_id, instance.upstream_id):
        assert store.find_live(either) is None
        assert await store.find(either) == ended
    assert await store.find("nobody") is None


async def test_our_own_id_goes_before_a_caller_who_uses_it_as_theirs(store: Store) -> None:
    first = await admit(store, "order-1", 1)
    await admit(store, first.upstream_id, 2)
    assert await store.find(first.upstream_id) == first
    deleted = await store.request_delete(first.upstream_id)
    assert deleted is not None
    assert deleted.upstream_id == first.upstream_id


async def test_recent_instances_come_newest_first(store: Store, clock: Clock) -> None:
    for number in range(3):
        clock.advance(1)
        await admit(store, f"order-{number}", number)
    assert [one.instance_id for one in await store.recent(2)] == ["order-2", "order-1"]


async def test_the_live_view_cannot_be_written_to(store: Store) -> None:
    live: Any = store.live
    with pytest.raises(TypeError):
        live["x"] = None


async def test_listeners_hear_each_commit_on_the_event_loop_before_its_caller_goes_on(
    store: Store,
) -> None:
    heard: list[tuple[Step, bool]] = []

    def listener(instance: Instance) -> None:
        asyncio.get_running_loop()
        heard.append((instance.step, store.live.get(instance.upstream_id) == instance))

    store.subscribe(listener)
    instance = await admit(store)
    assert heard == [(FIRST_STEP, True)]
    await store.move(instance, Step.CLONE_DISK)
    assert heard[1:] == [(Step.CLONE_DISK, True)]
    assert store.version == 2


async def test_every_transition_is_an_event(store: Store, clock: Clock) -> None:
    first = await admit(store, "a", 1)
    await admit(store, "b", 2)
    clock.advance(1)
    await store.move(first, Step.STOP_DOMAIN, why="it failed", status=Status.ERROR)
    events = await store.events(first.upstream_id)
    assert [(event.was, event.became, event.why) for event in events] == [
        ("", "creating/lease_address", "order accepted"),
        ("creating/lease_address", "error/stop_domain", "it failed"),
    ]
    assert events[1].at == events[0].at + 1
    assert len(await store.events()) == 3
    assert [event.why for event in await store.events(limit=1)] == ["it failed"]


# -- secrets ---------------------------------------------------------------------------------------


async def test_guest_input_is_kept_byte_for_byte_until_the_end(store: Store) -> None:
    script = bytes(range(256)) + "é\r\n".encode()
    instance = await admit(store, script=script, keys=(KEY, "zweiter Schlüssel"), image="a/b:1")
    given = await store.guest_input(instance.upstream_id)
    assert given == GuestInput((KEY, "zweiter Schlüssel"), "a/b:1", script)
    await store.request_delete(instance.upstream_id)
    await walk(store, instance, *RELEASE)
    assert await store.guest_input(instance.upstream_id) == GuestInput()


@pytest.mark.parametrize("padding_bytes", [0, 500 * 1024], ids=["small", "of 500 KiB"])
async def test_nothing_of_script_and_keys_is_left_in_the_files_after_the_end(
    store: Store, state_dir: Path, padding_bytes: int
) -> None:
    script = SECRET + b"x" * padding_bytes + SECRET
    instance = await admit(store, script=script, keys=(KEY,))
    await admit(store, "stays", 2, script=b"#!/bin/sh\nstays\n")
    assert SECRET in on_disk(state_dir)
    await store.request_delete(instance.upstream_id)
    await walk(store, instance, *RELEASE)
    left = on_disk(state_dir)
    assert b"s3cr3t" not in left
    assert b"SecretKeyOfATenant" not in left
    assert b"stays" in left


class FailingDisk:
    """A connection whose commits fail: by then SQLite may have written their frames into the log."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def execute(self, query: str, *values: Any) -> sqlite3.Cursor:
        if query == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self._connection.execute(query, *values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


async def test_what_a_failed_commit_may_have_left_in_the_log_goes_with_the_next_that_succeeds(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one such transaction behind the log's end would be taken for damage at the next start."""
    log = state_dir / "state.sqlite-wal"
    instance = await admit(store, script=b"#!/bin/sh\n" + b"x" * 60_000)
    full = log.stat().st_size
    with monkeypatch.context() as patch:
        patch.setattr(store, "_connection", FailingDisk(store._connection))
        with pytest.raises(GpudError, match="cannot be written at the moment"):
            await admit(store, "refused", 2)
    assert log.stat().st_size == full
    await store.request_delete(instance.upstream_id)
    assert log.stat().st_size < full
    assert instance.upstream_id in store.live


async def test_a_crash_right_after_the_end_leaves_no_script_to_the_next_start(
    store: Store, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as crashed:
        crashed.setattr(Store, "_empty_log", lambda _store: None)
        instance = await admit(store, script=SECRET)
        await store.request_delete(instance.upstream_id)
        await walk(store, instance, *RELEASE)
    snapshot = {file.name: file.read_bytes() for file in state_dir.iterdir() if file.is_file()}
    assert b"s3cr3t" in b"".join(snapshot.values())
    with quick_directory() as after_the_crash:
        for name, content in snapshot.items():
            (after_the_crash / name).write_bytes(content)
        second = await Store.open(after_the_crash)
        left = on_disk(after_the_crash)
        await second.close()
    assert b"s3cr3t" not in left


async def test_a_reader_that_holds_the_log_back_is_told_of_but_stops_nothing(
    store: Store, state_dir: Path
) -> None:
    store._connection.execute("PRAGMA busy_timeout = 1")
    instance = await admit(store)
    reader = sqlite3.connect(state_dir / "state.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM instance").fetchall()
    await store.request_delete(instance.upstream_id)
    with structlog.testing.capture_logs() as logs:
        ended = await walk(store, instance, *RELEASE)
    reader.close()
    assert ended.step is Step.ENDED
    assert [log["log_level"] for log in logs] == ["warning"]


def on_disk(state_dir: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(state_dir.glob("state.sqlite*")))


# -- crashes ---------------------------------------------------------------------------------------


async def test_every_commit_survives_and_reopening_gives_the_same_view(
    open_store: OpenStore,
) -> None:
    store = await open_store()
    owner = store.owner
    steps: list[Callable[[Store, Instance], Awaitable[object]]] = [
        *(lambda store, one, to=step: store.move(one, to) for step in CREATE),
        lambda store, one: store.guest_booted(one.upstream_id, "boot-1"),
        lambda store, one: store.move(one, Step.RUNNING, status=Status.RUNNING, running_at=1.5),
        lambda store, one: store.script_exited(one.upstream_id, 3),
        lambda store, one: store.move(one, Step.CHECK_GPUS, restarts=1, last_start_at=2.5),
        lambda store, one: store.request_delete(one.upstream_id),
        *(lambda store, one, to=step: store.move(one, to) for step in RELEASE[:-1]),
    ]
    full = replace(grant(1, "10.77.0.9"), gpus=(*grant(1).gpus, *grant(2).gpus))
    instance = (await store.admit(order(), granting(full))).instance
    await admit(store, "other", 3)
    for act in steps:
        await act(store, store.live[instance.upstream_id])
        before = dict(store.live)
        store = await open_store()
        assert store.live == before
        assert store.owner == owner
    await store.move(store.live[instance.upstream_id], Step.ENDED)
    store = await open_store()
    assert [one.instance_id for one in store.live.values()] == ["other"]


async def test_a_commit_that_fails_is_as_if_it_had_never_been_asked_for(store: Store) -> None:
    class FullDisk:
        """The connection, on a disk without room for the next commit."""

        def __init__(self, real: sqlite3.Connection) -> None:
            self.real = real
            self.in_transaction = True

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if statement == "COMMIT":
                self.real.execute("ROLLBACK")  # as SQLite does on its own
                self.in_transaction = False
                raise sqlite3.OperationalError("database or disk is full")
            return self.real.execute(statement, *values)

    instance = await admit(store)
    real = store._connection
    full: Any = FullDisk(real)
    store._connection = full
    with pytest.raises(GpudError, match="disk is full"):
        await store.move(instance, Step.CLONE_DISK)
    store._connection = real
    assert store.live[instance.upstream_id] == instance
    assert (await store.move(instance, Step.CLONE_DISK)).step is Step.CLONE_DISK


async def test_a_checkpoint_that_fails_undoes_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class BadDisk:
        def __init__(self, real: sqlite3.Connection) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def execute(self, statement: str, *values: Any) -> Any:
            if "checkpoint" in statement:
                raise sqlite3.OperationalError("disk I/O error")
            return self.real.execute(statement, *values)

    instance = await admit(store)
    heard: list[Instance] = []
    store.subscribe(heard.append)
    await store.request_delete(instance.upstream_id)
    bad: Any = BadDisk(store._connection)
    monkeypatch.setattr(store, "_connection", bad)
    ended = await walk(store, instance, *RELEASE)
    assert store.live == {}
    assert heard[-1] == ended


@pytest.mark.parametrize(
    "value",
    [
        "status = 'half-running'",
        "cost_per_hour = '3,49'",
        "gpus = '[{}]'",
        "gpus = 'x'",
        "nodes = '[7]'",
    ],
)
async def test_a_row_that_cannot_be_read_stops_the_start_and_frees_the_directory(
    open_store: OpenStore, state_dir: Path, value: str
) -> None:
    await admit(await open_store())
    connection = sqlite3.connect(state_dir / "state.sqlite")
    connection.execute(f"UPDATE instance SET {value}")  # noqa: S608 - from above
    connection.commit()
    connection.close()
    for _ in range(2):
        with pytest.raises(GpudError, match="holds what this gpud cannot read") as caught:
            await open_store()
        assert caught.value.code is Code.STATE_UNUSABLE


async def test_only_one_store_has_the_directory(store: Store, state_dir: Path) -> None:
    with pytest.raises(GpudError, match="another gpud is running"):
        await Store.open(state_dir)
    await admit(store)


async def test_a_start_that_is_refused_frees_the_directory(state_dir: Path) -> None:
    state_file = state_dir / "state.sqlite"
    state_file.write_bytes(b"no database" * 100)
    with pytest.raises(GpudError, match="not a database"):
        await Store.open(state_dir)
    state_file.unlink()
    await (await Store.open(state_dir)).close()


# -- any sequence of moves -------------------------------------------------------------------------

MOVES = st.lists(
    st.tuples(
        st.sampled_from(Step),
        st.none() | st.sampled_from(Status),
        st.sampled_from(["move", "delete"]),
    ),
    max_size=14,
)


def sensible(status: Status | None, step: Step) -> bool:
    """What a step may ask for: it never declares itself terminated, nor an end without a reason."""
    return status is not Status.TERMINATED and not (step is Step.ENDED and status is not None)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(moves=MOVES)
def test_no_sequence_of_moves_takes_a_status_or_a_step_where_it_may_not_go(
    moves: list[tuple[Step, Status | None, str]],
) -> None:
    async def run() -> None:
        with quick_directory() as state_dir:
            store = await Store.open(state_dir)
            try:
                await any_moves(store, moves)
            finally:
                await store.close()

    asyncio.run(run())


async def any_moves(store: Store, moves: list[tuple[Step, Status | None, str]]) -> None:
    instance = await admit(store)
    history = [instance]
    for step, status, act in moves:
        current = store.live.get(instance.upstream_id)
        if act == "delete":
            await store.request_delete(instance.upstream_id)
        elif current is None or step not in LEGAL_STEPS[current.step]:
            with pytest.raises(ValueError, match=instance.upstream_id):
                await store.move(current or instance, step)
        elif sensible(status, step):
            changes: dict[str, Any] = {} if status is None else {"status": status}
            await store.move(current, step, **changes)
        found = await store.find(instance.upstream_id)
        assert found is not None
        history.append(found)
    for before, after in pairwise(history):
        ended = {Status.TERMINATED} if after.step is Step.ENDED else set()
        assert after.status in {before.status, *LEGAL_STATUS[before.status], *ended}
        assert after.step in {before.step, *LEGAL_STEPS[before.step]}
        if before.delete_requested_at is not None:
            assert after.status in {Status.STOPPING, Status.TERMINATED}


async def test_only_the_first_end_of_a_script_in_a_boot_is_recorded(store: Store) -> None:
    """A guest could go on telling another one, and each would be a write to the disk."""
    instance = await admit(store)
    await store.guest_booted(instance.upstream_id, "boot-1")
    assert await store.script_exited(instance.upstream_id, 7)
    assert not await store.script_exited(instance.upstream_id, 0)
    assert store.live[instance.upstream_id].script_exit_code == 7
    await store.guest_booted(instance.upstream_id, "boot-2")
    assert await store.script_exited(instance.upstream_id, 0)
    assert store.live[instance.upstream_id].script_exit_code == 0
