"""The part of the record about the host's cards: what was learned of each, and which are quarantined."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeVar

from gpud.model import KnownCard, PciAddress, Quarantine
from gpud.schema import known_card_from, known_card_row

T = TypeVar("T")


class CardRecord:
    """Base of the store. The mappings are replaced after a commit, never changed in place."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._connection = connection
        self._clock = clock
        self._cards_changed = False
        self._known_cards: Mapping[PciAddress, KnownCard] = {}
        self._quarantines: Mapping[PciAddress, Quarantine] = {}

    @property
    def known_cards(self) -> Mapping[PciAddress, KnownCard]:
        """What was last learned of each card, by address; as of the last commit."""
        return MappingProxyType(self._known_cards)

    @property
    def quarantines(self) -> Mapping[PciAddress, Quarantine]:
        """The cards that must not be sold, by address; as of the last commit."""
        return MappingProxyType(self._quarantines)

    async def remember_card(self, card: KnownCard) -> None:
        """Record what was learned of a card."""
        await self._change(lambda: self._remember_card(card))

    async def forget_card(self, address: PciAddress) -> bool:
        """Forget what was learned of the card at ``address``; False when nothing was known."""
        return await self._change(lambda: self._delete("known_card", address))

    async def quarantine(self, address: PciAddress, reason: str) -> None:
        """Sell the card no more. The first reason stays until :meth:`release`."""
        await self._change(lambda: self._quarantine(address, reason))

    async def release(self, address: PciAddress) -> bool:
        """End a card's quarantine; False when there was none."""
        return await self._change(lambda: self._delete("quarantine", address))

    async def _change(self, work: Callable[[], T]) -> T:
        raise NotImplementedError

    # -- on the store's thread, inside a transaction -----------------------------------------------

    def _remember_card(self, card: KnownCard) -> None:
        query = "INSERT OR REPLACE INTO known_card VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._connection.execute(query, known_card_row(card))
        self._cards_changed = True

    def _quarantine(self, address: PciAddress, reason: str) -> None:
        query = "INSERT OR IGNORE INTO quarantine VALUES (?, ?, ?)"
        self._connection.execute(query, (str(address), self._clock(), reason))
        self._cards_changed = True

    def _delete(self, table: str, address: PciAddress) -> bool:
        query = f"DELETE FROM {table} WHERE gpu = ?"  # noqa: S608 - names from this module
        self._cards_changed = True
        return self._connection.execute(query, (str(address),)).rowcount > 0

    def _load_cards(self) -> None:
        found = map(known_card_from, self._connection.execute("SELECT * FROM known_card"))
        self._known_cards = {card.address: card for card in found}
        self._quarantines = {
            address: Quarantine(address, row["since"], row["reason"])
            for row in self._connection.execute("SELECT * FROM quarantine")
            for address in [PciAddress.parse(row["gpu"])]
        }
        self._cards_changed = False
