"""The part of the record about what happened: events, and how they are kept from growing for ever.

An event is written in the transaction that it tells of. It names ids, steps and reasons, never what a
guest was given. Only events are ever forgotten: an instance's row, which makes a repeated order the same
instance, stays.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

import structlog

from gpud.errors import GpudError
from gpud.model import Instance, PciAddress

T = TypeVar("T")

_log = structlog.get_logger()

PER_INSTANCE: Final = 1000
"""Events kept of a live instance: its tenant can make one a minute by rebooting."""

_NEWEST: Final = 1000
"""Events kept of whatever age: a clock that jumped ahead must not forget all, nor an id come again."""
_BATCH: Final = 500
"""Events forgotten in one transaction, which takes milliseconds; orders come in between."""
_DAY_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to an instance, to a GPU, or to a thing that nobody owned.

    Attributes:
        id: Grows with every event.
        at: Seconds since the epoch.
        upstream_id: The instance, or what is left of one; empty where there is none.
        gpu: The GPU, where it is about one.
        was: Of a transition: ``status/step``.
        became: Likewise; of anything else a word for what it is now.
        why: In plain words.
    """

    id: int
    at: float
    upstream_id: str
    gpu: PciAddress | None
    was: str
    became: str
    why: str


class History:
    """Base of the store: what happened."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._live: dict[str, Instance] = {}

    async def events(
        self,
        upstream_id: str | None = None,
        limit: int = 1000,
        after: int = 0,
        gpu: PciAddress | None = None,
    ) -> list[Event]:
        """What happened, oldest first: the newest events, or the first ones ``after`` an event's id.

        Args:
            upstream_id: Only of this instance.
            limit: At most so many.
            after: For reading on: only events with a greater id, the oldest of them first.
            gpu: Only of this GPU.
        """
        query, values = _selection(upstream_id, after, gpu)
        rows = await self._run(lambda: self._connection.execute(query, (*values, limit)).fetchall())
        events = [_event(row) for row in rows]
        return events if after else events[::-1]

    async def note(
        self,
        why: str,
        *,
        upstream_id: str = "",
        gpu: PciAddress | None = None,
        was: str = "",
        became: str = "",
    ) -> None:
        """Record what happened that is no transition of an instance; if it can be recorded.

        What it tells of has been done by now: a full disk does not make that fail.
        """
        try:
            await self._change(lambda: self._note(upstream_id, was, became, why, gpu))
        except (GpudError, sqlite3.Error) as error:
            _log.warning("event not recorded", event_is=why, error=str(error))

    async def ended_uptimes(self) -> list[tuple[str, str, str, int]]:
        """Of ended instances of each GPU type, tier and cost per hour: for how many seconds, in all, they
        ran and were their callers'. Whole seconds of each instance, as the API tells its uptime.
        """  # noqa: D205 - one sentence
        # The signs keep SQLite from following an index all over the file: seven times as long.
        query = (
            "SELECT gpu_type, tier, cost_per_hour, sum(max(0, CAST("
            "min(ended_at, coalesce(delete_requested_at, ended_at)) - running_at AS INTEGER)))"
            " FROM instance WHERE +running_at IS NOT NULL AND +step = 'ended' GROUP BY 1, 2, 3"
        )
        rows = await self._run(lambda: self._connection.execute(query).fetchall())
        return [tuple(row) for row in rows]

    async def runs_since(self, since: float) -> list[tuple[str, float, float | None]]:
        """Of each instance that runs, or has ended since a moment after it ran: cost per hour, since
        when, and until when it was the caller's; None where it still is.
        """  # noqa: D205 - one sentence
        query = (
            "SELECT cost_per_hour, running_at, delete_requested_at FROM instance"
            " WHERE step != 'ended' AND running_at IS NOT NULL"
            " UNION ALL SELECT cost_per_hour, running_at,"
            " min(ended_at, coalesce(delete_requested_at, ended_at)) FROM instance"
            " WHERE ended_at >= ? AND running_at IS NOT NULL"
        )
        rows = await self._run(lambda: self._connection.execute(query, (since,)).fetchall())
        return [tuple(row) for row in rows]

    async def keep_short(self, days: float) -> None:
        """Forget old events now and every day, for as long as the daemon lives."""
        while True:
            try:
                await self.prune(days)
            except (GpudError, sqlite3.Error) as error:  # a full disk must not end the daemon
                _log.warning("old events not forgotten; tomorrow again", error=str(error))
            await asyncio.sleep(_DAY_S)

    async def prune(self, days: float) -> int:
        """Forget events older than ``days``, and of live instances all but :data:`PER_INSTANCE`.

        The newest of all stay whatever their age. Done in batches, so nobody waits for it for long.

        Returns:
            How many were forgotten.
        """
        before = self._clock() - days * _DAY_S
        forgotten = await self._in_batches(lambda: self._prune_old(before))
        for upstream_id in tuple(self._live):
            forgotten += await self._in_batches(partial(self._prune_of, upstream_id))
        if forgotten:
            _log.info("old events forgotten", events=forgotten)
        return forgotten

    async def _in_batches(self, prune: Callable[[], int]) -> int:
        forgotten = 0
        while batch := await self._change(prune):
            forgotten += batch
        return forgotten

    async def _run(self, work: Callable[[], T]) -> T:
        raise NotImplementedError

    async def _change(self, work: Callable[[], T]) -> T:
        raise NotImplementedError

    # -- on the store's thread, inside a transaction -----------------------------------------------

    def _note(
        self, upstream_id: str, was: str, became: str, why: str, gpu: PciAddress | None = None
    ) -> None:
        query = (
            "INSERT INTO event (at, upstream_id, gpu, was, became, why) VALUES (?, ?, ?, ?, ?, ?)"
        )
        row = (self._clock(), upstream_id, str(gpu) if gpu else None, was, became, why)
        self._connection.execute(query, row)

    def _prune_old(self, before: float) -> int:
        query = (
            "DELETE FROM event WHERE id IN (SELECT id FROM event WHERE at < ?"
            " AND id <= (SELECT max(id) FROM event) - ? LIMIT ?)"
        )
        return self._connection.execute(query, (before, _NEWEST, _BATCH)).rowcount

    def _prune_of(self, upstream_id: str) -> int:
        query = (
            "DELETE FROM event WHERE id IN (SELECT id FROM event WHERE upstream_id = ?"
            " ORDER BY id DESC LIMIT ? OFFSET ?)"
        )
        return self._connection.execute(query, (upstream_id, _BATCH, PER_INSTANCE)).rowcount


def _selection(
    upstream_id: str | None, after: int, gpu: PciAddress | None
) -> tuple[str, Iterable[object]]:
    """Only the conditions that are asked for, so that each finds its index."""
    conditions: list[tuple[str, object]] = [("id > ?", after)]
    if upstream_id is not None:
        conditions.append(("upstream_id = ?", upstream_id))
    if gpu is not None:
        conditions.append(("gpu = ?", str(gpu)))
    where = " AND ".join(condition for condition, _ in conditions)
    order = "ASC" if after else "DESC"
    query = (
        "SELECT id, at, upstream_id, gpu, was, became, why FROM event"  # noqa: S608 - words from above
        f" WHERE {where} ORDER BY id {order} LIMIT ?"
    )
    return query, [value for _, value in conditions]


def _event(row: sqlite3.Row) -> Event:
    gpu = PciAddress.parse(row["gpu"]) if row["gpu"] else None
    return Event(**{**dict(row), "gpu": gpu})
