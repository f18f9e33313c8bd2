"""The part of the record about the host's cards: what was learned of each, and which are quarantined."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from types import MappingProxyType

from gpud.drains import Drains
from gpud.model import Instance, KnownCard, PciAddress, Quarantine
from gpud.schema import drivers_json, known_card_from, known_card_row, quarantine_from


class CardRecord(Drains):
    """Base of the store: the cards. The mappings are replaced after a commit, never changed in place."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        super().__init__(connection, clock)
        self._known_cards: Mapping[PciAddress, KnownCard] = {}
        self._quarantines: Mapping[PciAddress, Quarantine] = {}
        self._resets_begun: Mapping[PciAddress, str] = {}

    @property
    def known_cards(self) -> Mapping[PciAddress, KnownCard]:
        """What was last learned of each card, by address; as of the last commit."""
        return MappingProxyType(self._known_cards)

    @property
    def quarantines(self) -> Mapping[PciAddress, Quarantine]:
        """The cards that must not be sold, by address; as of the last commit."""
        return MappingProxyType(self._quarantines)

    @property
    def resets_begun(self) -> Mapping[PciAddress, str]:
        """Cards whose reset was begun and not seen to end, each with the boot it was begun in."""
        return MappingProxyType(self._resets_begun)

    async def remember_card(self, card: KnownCard) -> None:
        """Record what was learned of a card."""
        await self._change(lambda: self._remember_card(card))

    async def forget_card(self, address: PciAddress) -> bool:
        """Forget the card at ``address``, its drain too; False when nothing was known."""
        return await self._change(lambda: self._forget_card(address))

    async def quarantine(self, address: PciAddress, reason: str) -> None:
        """Sell the card no more, because the operator says so."""
        await self._change(
            lambda: self._quarantine(Quarantine(address, 0, reason, by_operator=True))
        )

    async def release(self, address: PciAddress) -> bool:
        """End a card's quarantine; False when there was none."""
        return await self._change(lambda: self._release(address))

    async def begin_reset(self, address: PciAddress, boot_id: str) -> None:
        """Write down that a card is about to be reset: it may take the server down with it."""
        await self._change(lambda: self._begin_reset(address, boot_id))

    async def end_reset(self, address: PciAddress) -> None:
        """Write down that a reset has come to its end, good or bad."""
        await self._change(lambda: self._delete("reset_begun", address))

    # -- on the store's thread, inside a transaction -----------------------------------------------

    def _remember_card(self, card: KnownCard) -> None:
        query = "INSERT OR REPLACE INTO known_card VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
        self._connection.execute(query, known_card_row(card))
        self._cards_changed = True

    def _forget_card(self, address: PciAddress) -> bool:
        undrained = self._undrain(address, "the card was taken out")
        return self._delete("known_card", address) or undrained

    def _quarantine_cards_of(self, instance: Instance, reasons: Mapping[PciAddress, str]) -> None:
        for gpu in instance.grant.gpus:
            if gpu.address in reasons:
                former = {
                    function: driver
                    for function, driver in instance.former_drivers.items()
                    if function in gpu.functions
                }
                new = Quarantine(gpu.address, 0, reasons[gpu.address], former_drivers=former)
                self._quarantine(new, instance.upstream_id)

    def _quarantine(self, new: Quarantine, upstream_id: str = "") -> None:
        """Add to what is said of a card already; what gpud found outweighs what the operator said."""
        query = (
            "INSERT INTO quarantine VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET"
            " reason = reason || iif(instr(reason, ?3), '', '; ' || ?3),"
            " by_operator = by_operator AND ?4,"
            " former_drivers = iif(?5 = '{}', former_drivers, ?5)"
        )
        drivers = drivers_json(new.former_drivers)
        row = (str(new.address), self._clock(), new.reason, int(new.by_operator), drivers)
        self._connection.execute(query, row)
        self._note(upstream_id, "", "quarantined", new.reason, new.address)
        self._cards_changed = True

    def _release(self, address: PciAddress) -> bool:
        ended = self._delete("quarantine", address)
        if ended:
            self._note("", "quarantined", "released", "released from quarantine", address)
        return ended

    def _begin_reset(self, address: PciAddress, boot_id: str) -> None:
        query = "INSERT OR REPLACE INTO reset_begun VALUES (?, ?)"
        self._connection.execute(query, (str(address), boot_id))
        self._cards_changed = True

    def _delete(self, table: str, address: PciAddress) -> bool:
        query = f"DELETE FROM {table} WHERE gpu = ?"  # noqa: S608 - names from this module
        self._cards_changed = True
        return self._connection.execute(query, (str(address),)).rowcount > 0

    def _load_cards(self) -> None:
        rows = self._connection.execute
        known = map(known_card_from, rows("SELECT * FROM known_card"))
        self._known_cards = {card.address: card for card in known}
        quarantines = map(quarantine_from, rows("SELECT * FROM quarantine"))
        self._quarantines = {one.address: one for one in quarantines}
        begun = rows("SELECT gpu, boot_id FROM reset_begun")
        self._resets_begun = {PciAddress.parse(row["gpu"]): row["boot_id"] for row in begun}
        self._load_drains()
        self._cards_changed = False
