"""What instances have earned: a counter that restarts of the daemon neither lose nor double.

Prometheus takes a counter that shrinks for one that began at zero again, and would count everything
once more. So the counter shows the whole sum since the first instance, made from the record: a daemon
that starts goes on where the last one stopped. It is added up in whole numbers, because floats added in
another order may come out smaller, and divided when it is shown.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable
from decimal import Decimal
from typing import Final

from prometheus_client import Counter

from gpud.model import Instance
from gpud.store import Store

_MICRO: Final = 1_000_000
_HOUR_S: Final = 3600

Kind = tuple[str, str]
"""GPU type and tier."""


class Earnings:
    """Follows the record. What an instance earns is its cost times its uptime in whole seconds, as the
    API tells both, until the caller asked to terminate it.

    Args:
        store: The record.
        counter: Dollars, by GPU type and tier.
        clock: Seconds since the epoch.
    """  # noqa: D205 - one sentence

    def __init__(
        self, store: Store, counter: Counter, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._counter = counter
        self._clock = clock
        self._added_up = asyncio.Event()
        self._live: dict[str, Instance] = {}
        self._ended: collections.Counter[Kind] = collections.Counter()
        self._shown: collections.Counter[Kind] = collections.Counter()

    async def add_up(self) -> None:
        """Add up what has ended, and follow what lives. To be begun before anything can end."""
        self._store.subscribe(self._follow)
        self._live = dict(self._store.live)
        for gpu_type, tier, cost_per_hour, uptime_s in await self._store.ended_uptimes():
            self._ended[gpu_type, tier] += _earning(Decimal(cost_per_hour), uptime_s)
        self._added_up.set()

    async def added_up(self) -> None:
        """Wait until the sum is whole: a part of it, shown, would later look like a gain."""
        await self._added_up.wait()

    def update(self) -> None:
        """Bring the counter up to now. It never goes back, even if the clock does."""
        now = self._clock()
        earned = self._ended.copy()
        for instance in self._live.values():
            earned[_kind(instance)] += _earned(instance, now)
        for kind, earning in earned.items():
            more = max(0, earning // _HOUR_S - self._shown[kind])
            self._counter.labels(*kind).inc(more / _MICRO)
            self._shown[kind] += more

    def _follow(self, instance: Instance) -> None:
        if instance.live:
            self._live[instance.upstream_id] = instance
        elif self._live.pop(instance.upstream_id, None) is not None:  # its row may change once more
            self._ended[_kind(instance)] += _earned(instance, self._clock())


async def earned_since(store: Store, since: float, now: float) -> float:
    """What instances have earned from one moment to another, in dollars."""
    runs = await store.runs_since(since)
    earned = sum(
        _earning(
            Decimal(cost_per_hour),
            _whole_seconds(max(began, since), now if until is None else until),
        )
        for cost_per_hour, began, until in runs
    )
    return earned / _HOUR_S / _MICRO


def earned_usd(instance: Instance, now: float) -> float:
    """What one instance has earned, in dollars."""
    return _earned(instance, now) / _HOUR_S / _MICRO


def _kind(instance: Instance) -> Kind:
    return instance.grant.shape.gpu_type, instance.tier.value


def _earned(instance: Instance, now: float) -> int:
    if instance.running_at is None:
        return 0
    ends = (instance.delete_requested_at, instance.ended_at)
    until = min((end for end in ends if end is not None), default=now)
    return _earning(instance.grant.cost_per_hour, _whole_seconds(instance.running_at, until))


def _earning(cost_per_hour: Decimal, uptime_s: int) -> int:
    """In millionths of a dollar, times the seconds of an hour."""
    return int(cost_per_hour * _MICRO) * uptime_s


def _whole_seconds(since: float, until: float) -> int:
    return max(0, int(until - since))
