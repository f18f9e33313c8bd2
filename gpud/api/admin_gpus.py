"""The part of the operator's side door about cards: what they are, and whether they are sold."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
from aiohttp import web

from gpud.api.rows import drain_row
from gpud.errors import Code, GpudError
from gpud.inventory import Card, Inventory
from gpud.model import PciAddress
from gpud.store import Store

Release = Callable[[PciAddress], Awaitable[bool]]
"""Ends a card's quarantine; False when there is none."""

_log = structlog.get_logger()

_LONGEST_REASON: Final = 500


class AdminGpus:
    """Handlers of the side door for cards, and for the sale of all of them."""

    def __init__(self, store: Store, inventory: Inventory, release: Release) -> None:
        self._store = store
        self._inventory = inventory
        self._release = release

    def routes(self) -> list[web.RouteDef]:
        """What is answered."""
        return [
            web.get("/gpus", self.gpus),
            web.post("/gpus/{address}/quarantine", self.quarantine),
            web.post("/gpus/{address}/release", self.release),
            web.post("/gpus/{address}/confirm", self.confirm),
            web.post("/gpus/{address}/drain", self.drain),
            web.post("/gpus/{address}/undrain", self.undrain),
            web.post("/drain", self.drain_all),
            web.post("/undrain", self.undrain_all),
        ]

    async def gpus(self, _: web.Request) -> web.Response:
        """Every card, whether it can be sold or why not."""
        cards = self._inventory.cards
        return web.json_response({"gpus": [card.as_json() for card in cards]})

    async def quarantine(self, request: web.Request) -> web.Response:
        """Sell a card no more, for the reason given; an instance that has it keeps it."""
        card = self._card(request)
        reason = await needed_reason(request)
        await self._store.quarantine(card.address, reason)
        return await self._changed(card.address, "quarantined by the operator", reason=reason)

    async def release(self, request: web.Request) -> web.Response:
        """End a card's quarantine; one that a guest had is cleaned first, which may take minutes."""
        address = address_from(request.match_info["address"])
        if not await self._release(address):
            raise GpudError(Code.GPU_NOT_FOUND, f"GPU {address} is not quarantined")
        return await self._changed(address, "released from quarantine")

    async def confirm(self, request: web.Request) -> web.Response:
        """Take the card that is at an address now for the right one."""
        address = address_from(request.match_info["address"])
        if not await self._inventory.confirm(address):
            raise _no_gpu(address)
        await self._store.note("confirmed by the operator", gpu=address, became="confirmed")
        return await self._changed(address, "confirmed by the operator")

    async def drain(self, request: web.Request) -> web.Response:
        """Give a card to no new order; an instance that has it keeps it, one that is cleaned too."""
        address = self._card(request).address
        reason = await given_reason(request)
        await self._store.drain(address, reason)
        _log.warning("drained by the operator", gpu=str(address), reason=reason)
        return web.json_response({"gpu": self._card(request).as_json()})

    async def undrain(self, request: web.Request) -> web.Response:
        """End the drain of a card, or of the slot that it was in; ``ended`` tells if there was one."""
        address = address_from(request.match_info["address"])
        ended = await self._store.undrain(address)
        card = self._inventory.card(address)
        if card is None and not ended:
            raise _no_gpu(address)
        _log.warning("undrained by the operator", gpu=str(address), ended=ended)
        told = card.as_json() if card is not None else None
        return web.json_response({"gpu": told, "ended": ended})

    async def drain_all(self, request: web.Request) -> web.Response:
        """Take no new order at all; every instance stays."""
        reason = await given_reason(request)
        await self._store.drain(None, reason)
        _log.warning("the whole server is drained by the operator", reason=reason)
        return self._whole_server(ended=False)

    async def undrain_all(self, _: web.Request) -> web.Response:
        """End the whole server's drain; cards that are drained on their own stay so."""
        ended = await self._store.undrain(None)
        _log.warning("the whole server is undrained by the operator", ended=ended)
        return self._whole_server(ended=ended)

    def _whole_server(self, *, ended: bool) -> web.Response:
        drains = [drain_row(one) for one in self._store.drains.values()]
        told = {"drains": drains, "ended": ended, "instances": sorted(self._store.live)}
        return web.json_response(told)

    def _card(self, request: web.Request) -> Card:
        address = address_from(request.match_info["address"])
        card = self._inventory.card(address)
        if card is None:
            raise _no_gpu(address)
        return card

    async def _changed(self, address: PciAddress, event: str, **context: str) -> web.Response:
        _log.warning(event, gpu=str(address), **context)
        # What was asked for is done, whether the host can be read just now or not.
        with suppress(GpudError, OSError):
            await self._inventory.refresh()
        card = self._inventory.card(address)
        return web.json_response({"gpu": card.as_json() if card is not None else None})


async def given_reason(request: web.Request) -> str:
    """The operator's reason in one line; empty where there is none.

    Raises:
        GpudError: ``INVALID_REQUEST``.
    """
    try:
        body = await request.json()
    except ValueError as error:
        raise GpudError(Code.INVALID_REQUEST, "the body is not JSON") from error
    reason = " ".join(str(body.get("reason") or "").split()) if isinstance(body, dict) else ""
    if len(reason) > _LONGEST_REASON or not reason.isprintable():
        raise GpudError(
            Code.INVALID_REQUEST, f"a reason is at most {_LONGEST_REASON} printable characters"
        )
    return reason


async def needed_reason(request: web.Request) -> str:
    """Likewise, of what is not done without.

    Raises:
        GpudError: ``INVALID_REQUEST``.
    """
    reason = await given_reason(request)
    if not reason:
        raise GpudError(Code.INVALID_REQUEST, 'this needs a reason: {"reason": "…"}')
    return reason


def address_from(text: str) -> PciAddress:
    """A GPU's address as people write it.

    Raises:
        GpudError: ``INVALID_REQUEST``.
    """
    try:
        # People leave out the PCI domain, which is 0000 on nearly every server.
        return PciAddress.parse(text if text.count(":") > 1 else f"0000:{text}")
    except ValueError as error:
        raise GpudError(Code.INVALID_REQUEST, str(error)) from error


def _no_gpu(address: PciAddress) -> GpudError:
    return GpudError(
        Code.GPU_NOT_FOUND, f"there is no GPU at {address}", hint="`gpud gpus` lists them"
    )
