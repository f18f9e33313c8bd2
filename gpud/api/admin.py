"""The operator's side door: what the ``gpud`` command asks the daemon, over a Unix socket.

Who may use it is a matter of the socket's file mode; there is no token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog
from aiohttp import web

from gpud.api.problem import from_http, problem
from gpud.api.schemas import uptime_s
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.inventory import Card, Inventory
from gpud.model import Instance, PciAddress
from gpud.offers import as_number
from gpud.store import Store

Release = Callable[[PciAddress], Awaitable[bool]]
"""Ends a card's quarantine; False when there is none."""

_log = structlog.get_logger()

_FOLLOW_EVERY_S = 0.5
_ENDED_SHOWN = 20


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
    ) -> None:
        self._store = store
        self._desk = desk
        self._inventory = inventory
        self._release = release
        self._consoles = consoles
        self._clock = clock

    def build_app(self) -> web.Application:
        """Put the application together."""
        app = web.Application(middlewares=[_problems])
        app.add_routes(
            [
                web.get("/instances", self.instances),
                web.get("/instances/{id}/console", self.console),
                web.get("/offers", self.offers),
                web.get("/gpus", self.gpus),
                web.post("/gpus/{address}/quarantine", self.quarantine),
                web.post("/gpus/{address}/release", self.release),
                web.post("/gpus/{address}/confirm", self.confirm),
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
        address = _address(request)
        if not await self._release(address):
            raise GpudError(Code.GPU_NOT_FOUND, f"GPU {address} is not quarantined")
        return await self._changed(address, "released from quarantine")

    async def confirm(self, request: web.Request) -> web.Response:
        """Take the card that is at an address now for the right one."""
        address = _address(request)
        if not await self._inventory.confirm(address):
            raise _no_gpu(address)
        return await self._changed(address, "confirmed by the operator")

    async def console(self, request: web.Request) -> web.StreamResponse:
        """What is kept of a guest's console; with ``?follow=1`` also what comes, until it ends."""
        instance = await self._store.find(request.match_info["id"])
        if instance is None:
            raise GpudError(
                Code.INSTANCE_NOT_FOUND,
                f"there is no instance {request.match_info['id']}",
                hint="`gpud instances --all` lists them",
            )
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

    def _card(self, request: web.Request) -> Card:
        address = _address(request)
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


def _address(request: web.Request) -> PciAddress:
    text = request.match_info["address"]
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
        return problem(error, "-")
    except web.HTTPException as error:
        return problem(from_http(error), "-")
    return response
