"""The operator's side door: what the ``gpud`` command asks the daemon, over a Unix socket.

Who may use it is a matter of the socket's file mode; there is no token.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import structlog
from aiohttp import web

from gpud.api.problem import from_http, problem_in_full
from gpud.api.schemas import uptime_s
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.history import Event
from gpud.inventory import Card, Inventory
from gpud.model import UPSTREAM_ID, Instance, PciAddress
from gpud.offers import as_number
from gpud.store import Store

Release = Callable[[PciAddress], Awaitable[bool]]
"""Ends a card's quarantine; False when there is none."""

Reconcile = Callable[[], Awaitable[None]]
"""Removes what has our mark and belongs to no live instance."""

_log = structlog.get_logger()

_FOLLOW_EVERY_S = 0.5
_ENDED_SHOWN = 20
_EVENTS_SHOWN = 10_000
_LAST_ID = 2**63 - 1


class Admin:
    """Handlers of the side door."""

    def __init__(
        self,
        store: Store,
        desk: OrderDesk,
        inventory: Inventory,
        release: Release,
        consoles: ConsoleLogs,
        clock: Callable[[], float] = time.time,
        *,
        reconcile: Reconcile,
    ) -> None:
        self._store = store
        self._desk = desk
        self._inventory = inventory
        self._release = release
        self._consoles = consoles
        self._clock = clock
        self._reconcile = reconcile

    def build_app(self) -> web.Application:
        """Put the application together."""
        app = web.Application(middlewares=[_problems])
        app.add_routes(
            [
                web.get("/instances", self.instances),
                web.get("/instances/{id}/console", self.console),
                web.get("/events", self.events),
                web.get("/offers", self.offers),
                web.get("/gpus", self.gpus),
                web.post("/gpus/{address}/quarantine", self.quarantine),
                web.post("/gpus/{address}/release", self.release),
                web.post("/gpus/{address}/confirm", self.confirm),
                web.post("/reconcile", self.reconcile),
            ]
        )
        return app

    async def instances(self, request: web.Request) -> web.Response:
        """Live instances, and with ``?all=1`` the newest ended ones too."""
        shown = list(self._store.live.values())
        if request.query.get("all"):
            shown = await self._store.recent(len(shown) + _ENDED_SHOWN)
        shown.sort(key=lambda one: one.created_at)
        return web.json_response({"instances": [self._instance(one) for one in shown]})

    async def events(self, request: web.Request) -> web.Response:
        """What happened: the newest, or what came ``after`` one; of an ``instance``, of a ``gpu``."""
        query = request.query
        events = await self._store.events(
            await self._upstream_id(query["instance"]) if "instance" in query else None,
            limit=_number(query.get("limit", str(_EVENTS_SHOWN)), 1, _EVENTS_SHOWN),
            after=_number(query.get("after", "0"), 0, _LAST_ID),
            gpu=_address(query["gpu"]) if "gpu" in query else None,
        )
        return web.json_response({"events": [_event(event) for event in events]})

    async def offers(self, _: web.Request) -> web.Response:
        """Every offering, also those with nothing available."""
        return web.json_response({"offerings": [one.as_json() for one in self._desk.offerings()]})

    async def gpus(self, _: web.Request) -> web.Response:
        """Every card, whether it can be sold or why not."""
        cards = self._inventory.cards
        return web.json_response({"gpus": [card.as_json() for card in cards]})

    async def quarantine(self, request: web.Request) -> web.Response:
        """Sell a card no more, for the reason given; an instance that has it keeps it."""
        card = self._card(request)
        body = await request.json()
        reason = str(body.get("reason") or "") if isinstance(body, dict) else ""
        if not reason:
            raise GpudError(Code.INVALID_REQUEST, 'a quarantine needs a reason: {"reason": "…"}')
        await self._store.quarantine(card.address, reason)
        return await self._changed(card.address, "quarantined by the operator", reason=reason)

    async def release(self, request: web.Request) -> web.Response:
        """End a card's quarantine; one that a guest had is cleaned first, which may take minutes."""
        address = _address(request.match_info["address"])
        if not await self._release(address):
            raise GpudError(Code.GPU_NOT_FOUND, f"GPU {address} is not quarantined")
        return await self._changed(address, "released from quarantine")

    async def confirm(self, request: web.Request) -> web.Response:
        """Take the card that is at an address now for the right one."""
        address = _address(request.match_info["address"])
        if not await self._inventory.confirm(address):
            raise _no_gpu(address)
        await self._store.note("confirmed by the operator", gpu=address, became="confirmed")
        return await self._changed(address, "confirmed by the operator")

    async def reconcile(self, _: web.Request) -> web.Response:
        """Remove what belongs to no live instance now, instead of within minutes."""
        await self._reconcile()
        return web.json_response({})

    async def console(self, request: web.Request) -> web.StreamResponse:
        """What is kept of a guest's console; with ``?follow=1`` also what comes, until it ends."""
        instance = await self._store.find(request.match_info["id"])
        if instance is None:
            raise _no_instance(request.match_info["id"])
        upstream_id = instance.upstream_id
        response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
        await response.prepare(request)
        shown = await asyncio.to_thread(self._consoles.read, upstream_id)
        await response.write(shown)
        while request.query.get("follow") and upstream_id in self._store.live:
            await asyncio.sleep(_FOLLOW_EVERY_S)
            kept = await asyncio.to_thread(self._consoles.read, upstream_id)
            await response.write(_added(shown, kept))
            shown = kept
        await response.write_eof()
        return response

    async def _upstream_id(self, either_id: str) -> str:
        """Of an instance, or of one that the record has lost: what is left of it has events too."""
        instance = await self._store.find(either_id)
        if instance is None and not UPSTREAM_ID.fullmatch(either_id):
            raise _no_instance(either_id)
        return instance.upstream_id if instance is not None else either_id

    def _card(self, request: web.Request) -> Card:
        address = _address(request.match_info["address"])
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

    def _instance(self, instance: Instance) -> dict[str, Any]:
        grant = instance.grant
        return {
            "upstream_id": instance.upstream_id,
            "instance_id": instance.instance_id,
            "status": instance.status.value,
            "step": instance.step.value,
            "in_step_seconds": max(0, int(self._clock() - instance.step_since)),
            "gpu_type": grant.shape.gpu_type,
            "gpus": [str(gpu.address) for gpu in grant.gpus],
            "tier": instance.tier.value,
            "cpu_cores": grant.shape.cpu_cores,
            "memory_mib": grant.shape.memory_mib,
            "storage_gib": grant.shape.storage_gib,
            "address": str(grant.address) if grant.address else None,
            "cost_per_hour": as_number(grant.cost_per_hour),
            "uptime_seconds": uptime_s(instance, self._clock()),
            "script_exit_code": instance.script_exit_code,
            "restarts": instance.restarts,
            "failure": instance.failure,
        }


def _event(event: Event) -> dict[str, Any]:
    return {**asdict(event), "gpu": str(event.gpu) if event.gpu is not None else None}


def _number(text: str, least: int, most: int) -> int:
    if re.fullmatch(r"[0-9]{1,19}", text) is None or not least <= int(text) <= most:
        raise GpudError(Code.INVALID_REQUEST, f"{text[:20]!r} is no number from {least} to {most}")
    return int(text)


def _no_instance(either_id: str) -> GpudError:
    return GpudError(
        Code.INSTANCE_NOT_FOUND,
        f"there is no instance {either_id}",
        hint="`gpud instances --all` lists them",
    )


def _address(text: str) -> PciAddress:
    try:
        # People leave out the PCI domain, which is 0000 on nearly every server.
        return PciAddress.parse(text if text.count(":") > 1 else f"0000:{text}")
    except ValueError as error:
        raise GpudError(Code.INVALID_REQUEST, str(error)) from error


def _no_gpu(address: PciAddress) -> GpudError:
    return GpudError(
        Code.GPU_NOT_FOUND, f"there is no GPU at {address}", hint="`gpud gpus` lists them"
    )


def _added(before: bytes, now: bytes) -> bytes:
    """What ``now`` has that ``before`` had not, where the oldest part may have been dropped."""
    if now.startswith(before):
        return now[len(before) :]
    tail = before[-4096:]
    at = now.rfind(tail)
    return now[at + len(tail) :] if at >= 0 else now


@web.middleware
async def _problems(
    request: web.Request, handler: Callable[[web.Request], Any]
) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except GpudError as error:
        return problem_in_full(error)
    except web.HTTPException as error:
        return problem_in_full(from_http(error))
    return response
