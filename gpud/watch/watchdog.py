"""Tells systemd's watchdog that the daemon works; when it hears nothing, it starts the daemon anew.

What it is for is a daemon that hangs, which a new start mends: an event loop that does not turn, a
record whose thread is stuck, calls into libvirt that do not come back and leave no room for others.
Libvirt being away is none of these. The daemon waits for it and says so, guests run on, and a daemon
that is started anew every minute would only say less. Calls that hang are given ten minutes, in which a
restart of libvirtd frees them. Whose libvirtd hangs for longer sees gpud start anew once and not again:
a new one has but one call that hangs, its first.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from gpud import systemd
from gpud.watch.health import Health, Problems
from gpud.watch.sources import Libvirt

_log = structlog.get_logger()

CALLS_STUCK_S: Final = 600.0
"""For how long there may be too many calls that do not return: longer than any step of an order takes."""

_AGAIN_S: Final = 1.0


class Watchdog:
    """Feeds systemd's watchdog.

    Args:
        health: Asks the record.
        libvirt: Tells how many calls have not returned.
        most_calls: That are waited for at once. What is above has been given up by who waited for it.
        monotonic: Seconds that only go forward.
    """

    def __init__(
        self,
        health: Health,
        libvirt: Libvirt,
        most_calls: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._health = health
        self._libvirt = libvirt
        self._most_calls = most_calls
        self._monotonic = monotonic
        self._stuck_since: float | None = None
        self._told: Problems = {}

    async def run(self, period_s: float | None) -> None:
        """Feed it twice in each ``period_s`` for as long as all is well; None where nobody watches."""
        while period_s is not None:
            fed = await self.feed()
            await asyncio.sleep(period_s / 2 if fed else min(_AGAIN_S, period_s / 2))

    async def feed(self) -> bool:
        """Feed it once, if all is well; that this is run shows that the event loop turns.

        Returns:
            Whether it was fed.
        """
        problems = {**await self._health.alive(), **self._stuck()}
        if problems != self._told and problems:
            _log.error("systemd is about to start gpud anew", problems=problems)
        self._told = problems
        if not problems:
            systemd.notify("WATCHDOG=1")
        return not problems

    def _stuck(self) -> Problems:
        calls, now = self._libvirt.calls_in_thread, self._monotonic()
        if calls <= self._most_calls:
            self._stuck_since = None
            return {}
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < CALLS_STUCK_S:
            return {}
        return {"libvirt calls": f"{calls} have not returned for {CALLS_STUCK_S:g} s"}
