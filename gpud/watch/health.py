"""Whether the daemon is alive, and whether it could sell: for load balancers, watchdogs and people."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from gpud.watch.sources import Sources

_STORE_TIME_LIMIT_S: Final = 2.0

Problems = Mapping[str, str]
"""What is not well, each with what is wrong; empty when all is."""


class Health:
    """Answers ``/healthz`` and ``/readyz``.

    Args:
        sources: What is looked at.
        time_limit_s: How long the record may take to answer.
    """

    def __init__(self, sources: Sources, time_limit_s: float = _STORE_TIME_LIMIT_S) -> None:
        self._sources = sources
        self._time_limit_s = time_limit_s

    async def alive(self) -> Problems:
        """What a restart might mend: that this is run shows that the event loop turns, and the record
        is read.
        """  # noqa: D205 - one sentence
        try:
            async with asyncio.timeout(self._time_limit_s):
                await self._sources.store.events(limit=1)
        except TimeoutError:
            return {"store": f"did not answer within {self._time_limit_s:g} s"}
        except Exception as error:  # noqa: BLE001 - whatever it is, the store is not well
            return {"store": f"cannot be read ({type(error).__name__})"}
        return {}

    async def ready(self) -> Problems:
        """What keeps it from taking orders and carrying them out."""
        problems = {**await self.alive(), **self._sources.desk.faults()}
        if not self._sources.keys.ready:
            problems["keys"] = (
                "tokens cannot be judged: there are no keys yet, or the issuer gives no answers"
            )
        if (unreadable := self._sources.inventory.problem) is not None:
            problems["host"] = unreadable
        return problems
