"""The part of the record about drains: what the operator keeps from new orders. Who has it keeps it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from gpud.history import History
from gpud.model import PciAddress

_WHOLE_SERVER: Final = ""


@dataclass(frozen=True, slots=True)
class Drain:
    """A card, or the whole server, that gets no new orders.

    Attributes:
        address: The card; None for the whole server.
        since: Seconds since the epoch.
        reason: In the operator's words; may be empty.
    """

    address: PciAddress | None
    since: float
    reason: str


class Drains(History):
    """Base of the store: the drains. The mapping is replaced after a commit, never changed in place."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        super().__init__(connection, clock)
        self._cards_changed = False
        self._drains: Mapping[PciAddress | None, Drain] = {}

    @property
    def drains(self) -> Mapping[PciAddress | None, Drain]:
        """What is drained, by a card's address, or None for the whole server; as of the last commit."""
        return MappingProxyType(self._drains)

    async def drain(self, address: PciAddress | None, reason: str = "") -> None:
        """Give no new order a card, or with None any; done again, it takes the new reason if any."""
        await self._change(lambda: self._drain(address, reason))

    async def undrain(self, address: PciAddress | None) -> bool:
        """End the drain of a card, or with None the server's own; False when there was none."""
        return await self._change(lambda: self._undrain(address, "by the operator"))

    # -- on the store's thread, inside a transaction -----------------------------------------------

    def _drain(self, address: PciAddress | None, reason: str) -> None:
        query = (
            "INSERT INTO drain VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET reason = excluded.reason"
            " WHERE excluded.reason NOT IN ('', reason)"
        )
        row = (_key(address), self._clock(), reason)
        if self._connection.execute(query, row).rowcount > 0:
            self._note("", "", "drained", _why(address, reason or "by the operator"), address)
            self._cards_changed = True

    def _undrain(self, address: PciAddress | None, why: str) -> bool:
        query = "DELETE FROM drain WHERE gpu = ?"
        ended = self._connection.execute(query, (_key(address),)).rowcount > 0
        if ended:
            self._note("", "drained", "undrained", _why(address, why), address)
            self._cards_changed = True
        return ended

    def _load_drains(self) -> None:
        drains = map(drain_from, self._connection.execute("SELECT * FROM drain"))
        self._drains = {drain.address: drain for drain in drains}


def drain_from(row: sqlite3.Row) -> Drain:
    """The drain of a ``drain`` row."""
    address = None if row["gpu"] == _WHOLE_SERVER else PciAddress.parse(row["gpu"])
    return Drain(address, row["since"], row["reason"])


def _why(address: PciAddress | None, why: str) -> str:
    return f"the whole server: {why}" if address is None else why


def _key(address: PciAddress | None) -> str:
    return _WHOLE_SERVER if address is None else str(address)
