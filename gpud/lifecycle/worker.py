"""Drives every live instance through its steps, one task for each.

A step is run, its outcome committed, and so on; what a crash interrupts is run again, because the
record of the step is all there is to go by. A DELETE pre-empts any step that is not giving back, but
only between two runs: an act under way is always seen through, so nothing is created behind the back
of its own removal.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping

import structlog

from gpud.config import Deadlines
from gpud.errors import Code, GpudError
from gpud.lifecycle.cards import step_limit_s
from gpud.lifecycle.outcome import Fail, Hop, Nap, Outcome, StepFunction
from gpud.model import FIRST_RELEASE_STEP, RELEASE_STEPS, Instance, Status, Step
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

_FIRST_RETRY_S = 0.5
_LAST_RETRY_S = 60.0

_FAILURES = {
    Step.LEASE_ADDRESS: "its network address could not be set up",
    Step.CLONE_DISK: "its disk could not be made",
    Step.WRITE_SEED: "its guest configuration could not be written",
    Step.CHECK_GPUS: "its GPUs cannot be handed over",
    Step.BIND_GPUS: "its GPUs could not be handed over",
    Step.START_DOMAIN: "its virtual machine could not be started",
    Step.AWAIT_READY: "its guest did not report the startup script started",
}


class Worker:
    """Owns one task for each live instance.

    Args:
        store: The record; the worker follows its changes.
        steps: The function of every step but the last.
        deadlines: How long each step may take.
        metrics: Where durations and failures are counted.
        monotonic: Seconds that never jump.
    """

    def __init__(
        self,
        store: Store,
        steps: Mapping[Step, StepFunction],
        deadlines: Deadlines,
        metrics: Metrics,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._steps = steps
        self._deadlines = deadlines
        self._metrics = metrics
        self._monotonic = monotonic
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._wakes: dict[str, asyncio.Event] = {}
        self._entered: dict[str, tuple[Step, float]] = {}
        self._running = False
        store.subscribe(self._follow)

    def start(self) -> None:
        """Take up every live instance where its record says it stands."""
        self._running = True
        for instance in self._store.live.values():
            self._follow(instance)

    async def close(self) -> None:
        """Stop driving. Guests and records stay as they are."""
        self._running = False
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self, upstream_id: str) -> None:
        """Run the instance's step now instead of at the end of its nap."""
        if upstream_id in self._wakes:
            self._wakes[upstream_id].set()

    def wake_all(self) -> None:
        """Run every instance's step now."""
        for wake in self._wakes.values():
            wake.set()

    def _follow(self, instance: Instance) -> None:
        if not self._running:
            return
        if instance.live and instance.upstream_id not in self._tasks:
            self._wakes[instance.upstream_id] = asyncio.Event()
            task = asyncio.create_task(self._drive(instance.upstream_id), name=instance.upstream_id)
            self._tasks[instance.upstream_id] = task
            task.add_done_callback(lambda _: self._forget(instance.upstream_id))
        self.wake(instance.upstream_id)

    def _forget(self, upstream_id: str) -> None:
        self._tasks.pop(upstream_id, None)
        self._wakes.pop(upstream_id, None)
        self._entered.pop(upstream_id, None)

    async def _drive(self, upstream_id: str) -> None:
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(instance=upstream_id)
        wake = self._wakes[upstream_id]
        failures = 0
        while (instance := self._store.live.get(upstream_id)) is not None:
            wake.clear()
            try:
                nap_s = await self._advance(instance)
                failures = 0
            except Exception as error:  # noqa: BLE001 - one order's fault must not stop the others
                failures += 1
                self._report(instance, error)
                nap_s = _backoff_s(failures)
            if nap_s:
                await _sleep(wake, nap_s)

    async def _advance(self, instance: Instance) -> float:
        """Run the step once and commit what it came to; returns how long to nap before the next run.

        Whatever it raises, the step is to be tried again.
        """
        releasing = instance.step in RELEASE_STEPS
        if instance.delete_requested_at is not None and not releasing:
            await self._commit(instance, Hop(FIRST_RELEASE_STEP, "termination comes first"))
            return 0
        deadline_s = step_limit_s(self._deadlines, instance)
        try:
            outcome = await self._steps[instance.step](instance)
        except Exception as error:
            if not self._may_give_up(instance) or not self._final(instance, error):
                raise
            self._report(instance, error)
            message = f"{_FAILURES[instance.step]} ({_code(error).value})"
            outcome = Fail(message, _told(error))
        if isinstance(outcome, Nap) and self._late(instance) and self._may_give_up(instance):
            message = f"{_FAILURES[instance.step]} within {deadline_s:g} s"
            outcome = Fail(message, f"{message}: {outcome.why}" if outcome.why else "")
        return await self._commit(instance, outcome)

    async def _commit(self, instance: Instance, outcome: Outcome) -> float:
        if isinstance(outcome, Nap):
            return outcome.seconds
        if isinstance(outcome, Fail):
            changes = {"status": Status.ERROR, "failure": outcome.message}
            _log.error("order failed", step=instance.step.value, reason=outcome.message)
            self._metrics.order_failures.labels(instance.step.value).inc()
            outcome = Hop(
                FIRST_RELEASE_STEP, outcome.why or outcome.message, changes, outcome.quarantine
            )
        moved = await self._store.move(
            instance,
            outcome.step,
            why=outcome.why,
            quarantine=outcome.quarantine,
            **outcome.changes,
        )
        for address, reason in outcome.quarantine.items():
            _log.error("GPU quarantined", gpu=str(address), reason=reason)
            self._metrics.quarantines.inc()
        spent_s = self._in_step_s(instance)
        self._entered[instance.upstream_id] = (moved.step, self._monotonic())
        self._metrics.step_seconds.labels(instance.step.value).observe(spent_s)
        _log.info(
            "step done", step=instance.step.value, next=moved.step.value, status=moved.status.value,
            seconds=round(spent_s, 3),
        )  # fmt: skip
        return 0

    def _may_give_up(self, instance: Instance) -> bool:
        """What is being given back is never given up; nor is a guest that has run: its disk is a
        tenant's work, which outweighs any wait for a host to be mended.
        """  # noqa: D205 - one sentence
        return instance.step not in RELEASE_STEPS and instance.running_at is None

    def _final(self, instance: Instance, error: Exception) -> bool:
        expected = isinstance(error, GpudError) and not error.transient
        return expected or self._late(instance)

    def _late(self, instance: Instance) -> bool:
        deadline_s = step_limit_s(self._deadlines, instance)
        return deadline_s is not None and self._in_step_s(instance) > deadline_s

    def _in_step_s(self, instance: Instance) -> float:
        """Seconds in the step; of a step entered before this process started, since the start."""
        step, since = self._entered.get(instance.upstream_id, (None, 0.0))
        if step is not instance.step:
            since = self._monotonic()
            self._entered[instance.upstream_id] = (instance.step, since)
        return self._monotonic() - since

    def _report(self, instance: Instance, error: Exception) -> None:
        code, step = _code(error), instance.step.value
        self._metrics.step_failures.labels(step, code.value).inc()
        if isinstance(error, GpudError):
            late = self._late(instance)
            _log.warning("step failed", step=step, code=code.value, error=str(error), late=late)
        else:
            _log.error("step failed unexpectedly", step=step, exc_info=error)


def _code(error: Exception) -> Code:
    return error.code if isinstance(error, GpudError) else Code.INTERNAL


def _told(error: Exception) -> str:
    """What the operator is told: an unexpected error's text may quote its input, so its type alone."""
    return error.detail if isinstance(error, GpudError) else type(error).__name__


def _backoff_s(failures: int) -> float:
    wait_s: float = min(_LAST_RETRY_S, _FIRST_RETRY_S * 2 ** min(failures - 1, 10))
    return wait_s * random.uniform(0.8, 1.2)  # noqa: S311 - spreads retries, guards nothing


async def _sleep(wake: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
