"""The worker on steps that a test writes: what it does with each outcome and each failure."""

# ruff: noqa: ARG001 - fixtures that only have to be there

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import structlog.testing

from gpud.config import Deadlines
from gpud.errors import Code, GpudError
from gpud.lifecycle import worker as worker_module
from gpud.lifecycle.outcome import Fail, Hop, Nap, Outcome, StepFunction
from gpud.lifecycle.worker import Worker, _backoff_s
from gpud.model import FIRST_STEP, LEGAL_STEPS, RELEASE_STEPS, Instance, Status, Step
from gpud.store import Store
from gpud.telemetry import Metrics
from tests.unit.fakes.orders import Clock, grant, granting, order, until
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, LIVING_STEPS
from tests.unit.lifecycle.gpud_under_test import RELEASE_STEPS as RELEASE_WAY

TRANSIENT = GpudError(Code.HYPERVISOR_UNAVAILABLE, "libvirt is away", transient=True)
FINAL = GpudError(Code.GUEST_FAILED, "QEMU will not start /var/lib/secret/path")


class Script:
    """Steps that do nothing but go on, unless told what a step shall come to.

    Attributes:
        runs: Steps that were run, with their instance's own id.
        outcomes: What the next runs of a step come to; the last one stays.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[str, Step]] = []
        self.outcomes: dict[Step, list[Outcome | Exception]] = {}
        changes = {"status": Status.RUNNING, "running_at": 1.0}
        straight = {step: Hop(min(LEGAL_STEPS[step])) for step in RELEASE_STEPS}
        straight |= {a: Hop(b) for a, b in pairwise(CREATE_STEPS)}
        straight[CREATE_STEPS[-1]] = Hop(Step.RUNNING, changes=changes)
        self._straight: dict[Step, Outcome] = {**straight, Step.RUNNING: Nap(1000)}

    def functions(self) -> Mapping[Step, StepFunction]:
        return {step: self._function(step) for step in Step if step is not Step.ENDED}

    def of(self, instance: Instance) -> list[Step]:
        return [step for upstream_id, step in self.runs if upstream_id == instance.upstream_id]

    def _function(self, step: Step) -> StepFunction:
        async def act(instance: Instance) -> Outcome:
            self.runs.append((instance.upstream_id, step))
            outcomes = self.outcomes.get(step, [self._straight[step]])
            outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
            if isinstance(outcome, Exception):
                raise outcome
            return outcome

        return act


@pytest.fixture(autouse=True)
def _short_pauses(short_pauses: None) -> None:
    """No retry waits long here."""


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def worker(
    store: Store, script: Script, metrics: Metrics, monotonic: Clock
) -> AsyncIterator[Worker]:
    worker = Worker(store, script.functions(), Deadlines(), metrics, monotonic=monotonic)
    worker.start()
    yield worker
    await worker.close()


Order = Callable[..., Any]


@pytest.fixture
def admit(store: Store) -> Order:
    numbers = iter(range(1, 100))

    async def place() -> Instance:
        number = next(numbers)
        admission = await store.admit(order(f"order-{number}"), granting(grant(number)))
        return admission.instance

    return place


async def end_of(store: Store, instance: Instance) -> Instance:
    await until(lambda: instance.upstream_id not in store.live)
    found = await store.find(instance.upstream_id)
    assert found is not None
    return found


async def at(store: Store, instance: Instance, step: Step) -> Instance:
    await until(lambda: store.live[instance.upstream_id].step is step)
    return store.live[instance.upstream_id]


def failures(metrics: Metrics, step: Step, code: Code) -> float:
    labels = {"step": step.value, "code": code.value}
    return metrics.registry.get_sample_value("gpud_step_failures_total", labels) or 0


# -- the plain way ---------------------------------------------------------------------------------


async def test_steps_are_run_in_order_and_each_is_committed(
    worker: Worker, store: Store, script: Script, admit: Order, metrics: Metrics
) -> None:
    instance = await admit()
    running = await at(store, instance, Step.RUNNING)
    await until(lambda: script.of(instance)[-1] is Step.RUNNING)
    assert running.status is Status.RUNNING
    assert script.of(instance) == [*CREATE_STEPS, Step.RUNNING]
    events = [event.became for event in await store.events(instance.upstream_id)]
    assert events == [*(f"creating/{step}" for step in CREATE_STEPS), "running/running"]
    counted = metrics.registry.get_sample_value(
        "gpud_step_seconds_count", {"step": CREATE_STEPS[0].value}
    )
    assert counted == 1


async def test_delete_ends_it_through_every_release_step(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    instance = await admit()
    await at(store, instance, Step.RUNNING)
    await store.request_delete(instance.upstream_id)
    ended = await end_of(store, instance)
    assert ended.status is Status.TERMINATED
    assert script.of(instance)[-len(RELEASE_WAY) :] == RELEASE_WAY
    await until(lambda: not any((worker._tasks, worker._wakes, worker._entered)))


async def test_a_nap_ends_early_when_woken(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    instance = await admit()
    await until(lambda: Step.RUNNING in script.of(instance))
    worker.wake(instance.upstream_id)
    await until(lambda: script.of(instance).count(Step.RUNNING) == 2)
    worker.wake_all()
    await until(lambda: script.of(instance).count(Step.RUNNING) == 3)


async def test_a_nap_ends_by_itself(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    script.outcomes[FIRST_STEP] = [Nap(0.002), Hop(Step.CLONE_DISK)]
    await at(store, await admit(), Step.RUNNING)


def test_waking_what_is_not_driven_is_no_matter(worker: Worker) -> None:
    worker.wake("i-0123456789abcdef")


async def test_steps_of_one_instance_never_overlap_and_those_of_two_do(
    store: Store, metrics: Metrics, monotonic: Clock, script: Script, admit: Order
) -> None:
    inside: list[str] = []
    both = asyncio.Event()

    async def slow(instance: Instance) -> Outcome:
        assert instance.upstream_id not in inside
        inside.append(instance.upstream_id)
        if len(inside) == 2:
            both.set()
        own.wake(instance.upstream_id)
        await both.wait()
        inside.remove(instance.upstream_id)
        return Hop(Step.CLONE_DISK)

    functions = {**script.functions(), FIRST_STEP: slow}
    own = Worker(store, functions, Deadlines(), metrics, monotonic=monotonic)
    own.start()
    instances = [await admit(), await admit()]
    for instance in instances:
        await at(store, instance, Step.RUNNING)
    await own.close()


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_an_order_that_cannot_be_kept_is_released_and_ends_as_error(
    worker: Worker, store: Store, script: Script, admit: Order, metrics: Metrics, step: Step
) -> None:
    script.outcomes[step] = [FINAL]
    instance = await admit()
    ended = await end_of(store, instance)
    assert ended.status is Status.ERROR
    assert script.of(instance) == [*CREATE_STEPS[: CREATE_STEPS.index(step) + 1], *RELEASE_WAY]
    assert failures(metrics, step, Code.GUEST_FAILED) == 1
    given_up = {"step": step.value}
    assert metrics.registry.get_sample_value("gpud_order_failures_total", given_up) == 1
    again = await store.admit(order("next"), granting(grant(1)))
    assert again.instance.grant.gpus == instance.grant.gpus


@pytest.mark.parametrize("step", CREATE_STEPS)
async def test_a_caller_is_told_what_failed_without_path_or_secret(
    worker: Worker, store: Store, script: Script, admit: Order, step: Step
) -> None:
    script.outcomes[step] = [FINAL]
    ended = await end_of(store, await admit())
    assert ended.failure is not None
    assert ended.failure.endswith("(guest_failed)")
    assert "/" not in ended.failure


@pytest.mark.parametrize("step", CREATE_STEPS)
@pytest.mark.parametrize("error", [TRANSIENT, RuntimeError("a defect")], ids=["transient", "bug"])
async def test_what_may_pass_is_tried_again(
    worker: Worker, store: Store, script: Script, admit: Order, step: Step, error: Exception
) -> None:
    hop = Script()._straight[step]
    script.outcomes[step] = [error, error, error, hop]
    instance = await admit()
    running = await at(store, instance, Step.RUNNING)
    assert running.status is Status.RUNNING
    assert script.of(instance).count(step) == 4


@pytest.mark.parametrize("step", CREATE_STEPS)
@pytest.mark.parametrize(
    ("error", "code"),
    [(TRANSIENT, "hypervisor_unavailable"), (RuntimeError("a defect"), "internal_error")],
    ids=["transient", "bug"],
)
async def test_what_does_not_pass_within_the_deadline_fails(
    worker: Worker,
    store: Store,
    script: Script,
    admit: Order,
    monotonic: Clock,
    step: Step,
    error: Exception,
    code: str,
) -> None:
    script.outcomes[step] = [error]
    instance = await admit()
    await until(lambda: script.of(instance).count(step) > 3)
    deadline_s = Deadlines().of(step)
    assert deadline_s is not None
    monotonic.advance(deadline_s + 1)
    ended = await end_of(store, instance)
    assert (ended.status, code in (ended.failure or "")) == (Status.ERROR, True)


async def test_a_wait_beyond_the_deadline_fails(
    worker: Worker, store: Store, script: Script, admit: Order, monotonic: Clock
) -> None:
    script.outcomes[Step.AWAIT_READY] = [Nap(0.001)]
    instance = await admit()
    await until(lambda: script.of(instance).count(Step.AWAIT_READY) > 2)
    monotonic.advance(901)
    ended = await end_of(store, instance)
    assert ended.failure == "its guest did not report the startup script started within 900 s"


async def test_what_stood_in_the_way_of_a_wait_is_told_to_the_operator_alone(
    worker: Worker, store: Store, script: Script, admit: Order, monotonic: Clock
) -> None:
    script.outcomes[Step.AWAIT_READY] = [Nap(0.001, "cannot open its channel: no lock file")]
    instance = await admit()
    await until(lambda: script.of(instance).count(Step.AWAIT_READY) > 2)
    monotonic.advance(901)
    ended = await end_of(store, instance)
    failure = "its guest did not report the startup script started within 900 s"
    assert ended.failure == failure
    events = await store.events(instance.upstream_id)
    told = f"{failure}: cannot open its channel: no lock file"
    assert told in [event.why for event in events]


async def test_each_step_has_its_deadline_for_itself(
    worker: Worker, store: Store, script: Script, admit: Order, monotonic: Clock
) -> None:
    deadlines = Deadlines()
    for step in CREATE_STEPS:
        script.outcomes[step] = [Nap(0.001)]
    instance = await admit()
    for step in CREATE_STEPS:
        await until(lambda step=step: script.of(instance).count(step) > 1)  # type: ignore[misc]
        limit = deadlines.of(step)
        assert limit is not None
        monotonic.advance(limit - 1)
        runs = script.of(instance).count(step)
        await until(lambda step=step, runs=runs: script.of(instance).count(step) > runs + 1)  # type: ignore[misc]
        script.outcomes[step] = [Script()._straight[step]]
    assert (await at(store, instance, Step.RUNNING)).status is Status.RUNNING


async def test_a_step_of_a_former_life_gets_its_time_from_the_start(
    store: Store, script: Script, metrics: Metrics, monotonic: Clock, admit: Order, clock: Clock
) -> None:
    instance = await admit()
    clock.advance(10_000)
    script.outcomes[FIRST_STEP] = [TRANSIENT]
    worker = Worker(store, script.functions(), Deadlines(), metrics, monotonic=monotonic)
    worker.start()
    await until(lambda: len(script.runs) > 2)
    assert store.live[instance.upstream_id].status is Status.CREATING
    monotonic.advance(61)
    assert (await end_of(store, instance)).status is Status.ERROR
    await worker.close()


@pytest.mark.parametrize("step", RELEASE_WAY)
@pytest.mark.parametrize("error", [TRANSIENT, FINAL, RuntimeError("a defect")])
async def test_giving_back_is_never_given_up(
    worker: Worker,
    store: Store,
    script: Script,
    admit: Order,
    monotonic: Clock,
    step: Step,
    error: Exception,
) -> None:
    script.outcomes[step] = [error]
    instance = await admit()
    await store.request_delete(instance.upstream_id)
    await until(lambda: script.of(instance).count(step) > 2)
    monotonic.advance(100_000)
    runs = script.of(instance).count(step)
    await until(lambda: script.of(instance).count(step) > runs + 1)
    assert store.live[instance.upstream_id].status is Status.STOPPING
    script.outcomes[step] = [Script()._straight[step]]
    assert (await end_of(store, instance)).status is Status.TERMINATED


async def test_a_release_step_that_naps_late_goes_on(
    worker: Worker, store: Store, script: Script, admit: Order, monotonic: Clock
) -> None:
    script.outcomes[Step.STOP_DOMAIN] = [Nap(0.001)]
    instance = await admit()
    await store.request_delete(instance.upstream_id)
    await until(lambda: script.of(instance).count(Step.STOP_DOMAIN) > 1)
    monotonic.advance(100_000)
    runs = script.of(instance).count(Step.STOP_DOMAIN)
    await until(lambda: script.of(instance).count(Step.STOP_DOMAIN) > runs + 1)
    assert store.live[instance.upstream_id].status is Status.STOPPING


@pytest.mark.parametrize("error", [TRANSIENT, FINAL, RuntimeError("a defect")])
async def test_a_running_guest_is_never_given_up_for_a_fault_of_ours(
    worker: Worker,
    store: Store,
    script: Script,
    admit: Order,
    monotonic: Clock,
    error: Exception,
) -> None:
    script.outcomes[Step.RUNNING] = [error]
    instance = await admit()
    await until(lambda: script.of(instance).count(Step.RUNNING) > 2)
    monotonic.advance(1e7)
    runs = script.of(instance).count(Step.RUNNING)
    await until(lambda: script.of(instance).count(Step.RUNNING) > runs + 1)
    assert store.live[instance.upstream_id].status is Status.RUNNING


async def test_a_failed_step_says_itself_that_the_order_cannot_be_kept(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    script.outcomes[Step.RUNNING] = [Fail("its guest ended by itself 11 times in a row")]
    ended = await end_of(store, await admit())
    assert ended.status is Status.ERROR
    assert ended.failure == "its guest ended by itself 11 times in a row"


async def test_one_instances_fault_does_not_stop_the_others(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    script.outcomes[FIRST_STEP] = [ZeroDivisionError(), Hop(Step.CLONE_DISK)]
    script.outcomes[Step.CLONE_DISK] = [FINAL, Hop(Step.WRITE_SEED)]
    first, second, third = await admit(), await admit(), await admit()
    await until(lambda: len(store.live) == 2)
    statuses = set()
    for instance in (first, second, third):
        if instance.upstream_id in store.live:
            await at(store, instance, Step.RUNNING)
        found = await store.find(instance.upstream_id)
        assert found is not None
        statuses.add(found.status)
    assert statuses == {Status.RUNNING, Status.ERROR}


async def test_a_commit_that_fails_is_tried_again_with_its_step(
    worker: Worker, store: Store, script: Script, admit: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, faults = store.move, [OSError("disk full")] * 3

    async def move(*arguments: Any, **changes: Any) -> Instance:
        if faults:
            raise faults.pop()
        return await real(*arguments, **changes)

    monkeypatch.setattr(store, "move", move)
    instance = await admit()
    await at(store, instance, Step.RUNNING)
    assert script.of(instance).count(FIRST_STEP) == 4


async def test_an_unexpected_error_is_logged_with_its_place_and_an_expected_one_without(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    script.outcomes[FIRST_STEP] = [RuntimeError("a defect"), TRANSIENT, Hop(Step.CLONE_DISK)]
    with structlog.testing.capture_logs() as logs:
        await at(store, await admit(), Step.RUNNING)
    failed = [log for log in logs if log["event"].startswith("step failed")]
    assert [("exc_info" in log, log["log_level"]) for log in failed] == [
        (True, "error"),
        (False, "warning"),
    ]


# -- DELETE ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", LIVING_STEPS)
async def test_delete_lets_the_act_under_way_end_and_then_comes_first(
    store: Store, script: Script, metrics: Metrics, monotonic: Clock, admit: Order, step: Step
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    functions = dict(script.functions())
    act = functions[step]

    async def held(instance: Instance) -> Outcome:
        reached.set()
        await go_on.wait()
        return await act(instance)

    functions[step] = held
    worker = Worker(store, functions, Deadlines(), metrics, monotonic=monotonic)
    worker.start()
    instance = await admit()
    await reached.wait()
    await store.request_delete(instance.upstream_id)
    assert store.live[instance.upstream_id].step is step
    go_on.set()
    ended = await end_of(store, instance)
    assert ended.status is Status.TERMINATED
    way = [*CREATE_STEPS, Step.RUNNING]
    assert script.of(instance) == [*way[: way.index(step) + 1], *RELEASE_WAY]
    await worker.close()


async def test_delete_ends_a_retry_at_once(
    worker: Worker,
    store: Store,
    script: Script,
    admit: Order,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "_FIRST_RETRY_S", 1000)
    monkeypatch.setattr(worker_module, "_LAST_RETRY_S", 1000)
    script.outcomes[FIRST_STEP] = [TRANSIENT]
    instance = await admit()
    await until(lambda: script.runs)
    await store.request_delete(instance.upstream_id)
    assert (await end_of(store, instance)).status is Status.TERMINATED


async def test_an_order_that_fails_while_it_is_deleted_is_terminated(
    worker: Worker, store: Store, script: Script, admit: Order
) -> None:
    async def delete_and_fail(instance: Instance) -> Outcome:
        await store.request_delete(instance.upstream_id)
        raise FINAL

    functions: Any = worker._steps
    functions[Step.CLONE_DISK] = delete_and_fail
    ended = await end_of(store, await admit())
    assert ended.status is Status.TERMINATED


# -- lives -----------------------------------------------------------------------------------------


async def test_nothing_is_driven_before_the_start_nor_after_the_end(
    store: Store, script: Script, metrics: Metrics, admit: Order
) -> None:
    worker = Worker(store, script.functions(), Deadlines(), metrics)
    early = await admit()
    await asyncio.sleep(0.005)
    assert script.runs == []
    worker.start()
    await at(store, early, Step.RUNNING)
    await worker.close()
    runs = list(script.runs)
    await admit()
    await asyncio.sleep(0.005)
    assert script.runs == runs


async def test_closing_stops_in_the_middle_of_a_step_and_a_new_worker_carries_on(
    store: Store, script: Script, metrics: Metrics, admit: Order
) -> None:
    functions = dict(script.functions())
    reached = asyncio.Event()

    async def endless(_instance: Instance) -> Outcome:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    functions[Step.CLONE_DISK] = endless
    first = Worker(store, functions, Deadlines(), metrics)
    first.start()
    instance = await admit()
    await reached.wait()
    await first.close()
    assert store.live[instance.upstream_id].step is Step.CLONE_DISK
    second = Worker(store, script.functions(), Deadlines(), metrics)
    second.start()
    await at(store, instance, Step.RUNNING)
    await second.close()


def test_retries_wait_longer_each_time_up_to_a_minute_and_are_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "_FIRST_RETRY_S", 0.5)
    monkeypatch.setattr(worker_module, "_LAST_RETRY_S", 60.0)
    for failures_so_far, middle_s in ((1, 0.5), (2, 1), (5, 8), (8, 60), (5000, 60)):
        waits = [_backoff_s(failures_so_far) for _ in range(50)]
        assert middle_s * 0.8 <= min(waits) < max(waits) <= middle_s * 1.2
