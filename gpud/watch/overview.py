"""What an operator wants to see at one glance: the whole server, and one instance in full."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from gpud import __version__
from gpud.api.rows import Row, drain_row, event_row, instance_row, offer_row
from gpud.config import Deadlines
from gpud.guest.console import ConsoleLogs
from gpud.inventory import CardState
from gpud.lifecycle.cards import step_limit_s
from gpud.model import RELEASE_STEPS, Instance, Status
from gpud.watch.earnings import earned_since, earned_usd
from gpud.watch.health import Health
from gpud.watch.sources import Sources

_EVENTS_OF_SERVER: Final = 5
_EVENTS_OF_INSTANCE: Final = 10


class Overview:
    """Answers ``/status`` and ``/instances/{id}`` on the operator's socket.

    Args:
        deadlines: How long each step may take.
        sources: What is looked at.
        consoles: What guests have printed.
        clock: Seconds since the epoch.
        monotonic: Seconds that only go forward.
    """

    def __init__(
        self,
        deadlines: Deadlines,
        sources: Sources,
        consoles: ConsoleLogs,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._deadlines = deadlines
        self._sources = sources
        self._consoles = consoles
        self._health = Health(sources)
        self._clock = clock
        self._monotonic = monotonic
        self._started, self._up_since = clock(), monotonic()

    async def server(self) -> Row:
        """The server in brief."""
        sources, now = self._sources, self._clock()
        problems = await self._health.ready()
        midnight = _midnight(now)
        usd = await earned_since(sources.store, midnight, now)
        events = await sources.store.events(limit=_EVENTS_OF_SERVER)
        cards = Counter(card.state for card in sources.inventory.cards)
        statuses = Counter(one.status for one in sources.store.live.values())
        return {
            "version": __version__,
            "up_seconds": int(self._monotonic() - self._up_since),
            "ready": not problems,
            "problems": dict(problems),
            "nothing_sold_because": sources.desk.closed(),
            "drains": [drain_row(one) for one in sources.store.drains.values()],
            "gpus": {state.value: cards[state] for state in CardState},
            "instances": {status.value: statuses[status] for status in Status},
            "offers": [offer_row(*one) for one in sources.desk.explained()],
            "earned_today": {"usd": usd, "since": midnight},
            "events": [event_row(event) for event in events],
        }

    async def instance(self, instance: Instance) -> Row:
        """One instance in full, but for what its guest was given."""
        now, upstream_id = self._clock(), instance.upstream_id
        limit_s = step_limit_s(self._deadlines, instance)
        # A daemon that was started meanwhile gives each step its whole time.
        since = max(instance.step_since, self._started)
        events = await self._sources.store.events(upstream_id, limit=_EVENTS_OF_INSTANCE)
        return {
            **instance_row(instance, now),
            "created_at": instance.created_at,
            "running_at": instance.running_at,
            "delete_requested_at": instance.delete_requested_at,
            "ended_at": instance.ended_at,
            "step_since": instance.step_since,
            "step_due_at": since + limit_s if limit_s is not None else None,
            "can_be_given_up": instance.step not in RELEASE_STEPS and instance.running_at is None,
            "cost_so_far": earned_usd(instance, now),
            "region": instance.grant.region,
            "numa_nodes": [node.number for node in instance.grant.nodes],
            "image_digest": instance.grant.image_digest,
            "domain": instance.domain_name,
            "mac": instance.mac,
            "boots": instance.guest_boots,
            "last_start_at": instance.last_start_at,
            "console_bytes": await asyncio.to_thread(self._consoles.size, upstream_id),
            "events": [event_row(event) for event in events],
        }


def _midnight(now: float) -> float:
    """When the day began at this server's place."""
    today = datetime.fromtimestamp(now, UTC).astimezone()
    return time.mktime((today.year, today.month, today.day, 0, 0, 0, 0, 0, -1))
