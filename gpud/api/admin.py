"""The operator's side door: what the ``gpud`` command asks the daemon, over a Unix socket.

Who may use it is a matter of the socket's file mode; there is no token.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from gpud.api.admin_gpus import AdminGpus, Release, address_from, needed_reason
from gpud.api.problem import from_http, problem_in_full
from gpud.api.rows import Row, event_row, instance_row, offer_row
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.guest.console import ConsoleLogs
from gpud.inventory import Inventory
from gpud.model import UPSTREAM_ID, Instance, Status
from gpud.store import Store

Reconcile = Callable[[], Awaitable[None]]
"""Removes what has our mark and belongs to no live instance."""

Reload = Callable[[], Awaitable[list[str]]]
"""Has the daemon go by its configuration file as it is now; tells what has changed."""

Overview = Callable[[], Awaitable[Row]]
"""Tells of the whole server in brief."""

InFull = Callable[[Instance], Awaitable[Row]]
"""Tells all of an instance."""

_log = structlog.get_logger()

_FOLLOW_EVERY_S = 0.5
_ENDED_SHOWN = 20
_EVENTS_SHOWN = 10_000
_LAST_ID = 2**63 - 1
_STOPPABLE = (Status.CREATING, Status.RUNNING)


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
        reload: Reload,
        overview: Overview,
        in_full: InFull,
    ) -> None:
        self._store = store
        self._desk = desk
        self._consoles = consoles
        self._clock = clock
        self._reconcile = reconcile
        self._reload = reload
        self._overview = overview
        self._in_full = in_full
        self._gpus = AdminGpus(store, inventory, release)

    def build_app(self) -> web.Application:
        """Put the application together."""
        app = web.Application(middlewares=[_problems])
        app.add_routes(
            [
                *self._gpus.routes(),
                web.get("/status", self.status),
                web.get("/instances", self.instances),
                web.get("/instances/{id}", self.instance),
                web.post("/instances/{id}/stop", self.stop),
                web.get("/instances/{id}/console", self.console),
                web.get("/events", self.events),
                web.get("/offers", self.offers),
                web.post("/reconcile", self.reconcile),
                web.post("/reload", self.reload),
            ]
        )
        return app

    async def status(self, _: web.Request) -> web.Response:
        """The whole server in brief."""
        return web.json_response(await self._overview())

    async def instances(self, request: web.Request) -> web.Response:
        """Live instances, and with ``?all=1`` the newest ended ones too."""
        shown = list(self._store.live.values())
        if request.query.get("all"):
            shown = await self._store.recent(len(shown) + _ENDED_SHOWN)
        shown.sort(key=lambda one: one.created_at)
        rows = [instance_row(one, self._clock()) for one in shown]
        return web.json_response({"instances": rows})

    async def instance(self, request: web.Request) -> web.Response:
        """One instance in full, by either id."""
        return web.json_response(await self._in_full(await self._found(request)))

    async def stop(self, request: web.Request) -> web.Response:
        """End an instance as its caller's DELETE would; one that is ending goes on as it does."""
        instance, reason = await self._found(request), await needed_reason(request)
        stopped = instance.status in _STOPPABLE
        if stopped:
            why = f"the operator asked to terminate it: {reason}"
            instance = await self._store.request_delete(instance.upstream_id, why) or instance
            _log.warning("stopped by the operator", instance=instance.upstream_id, reason=reason)
        row = instance_row(instance, self._clock())
        return web.json_response({"instance": row, "stopped": stopped})

    async def events(self, request: web.Request) -> web.Response:
        """What happened: the newest, or what came ``after`` one; of an ``instance``, of a ``gpu``."""
        query = request.query
        events = await self._store.events(
            await self._upstream_id(query["instance"]) if "instance" in query else None,
            limit=_number(query.get("limit", str(_EVENTS_SHOWN)), 1, _EVENTS_SHOWN),
            after=_number(query.get("after", "0"), 0, _LAST_ID),
            gpu=address_from(query["gpu"]) if "gpu" in query else None,
        )
        return web.json_response({"events": [event_row(event) for event in events]})

    async def offers(self, _: web.Request) -> web.Response:
        """Every offering; where nothing is available, with why not."""
        return web.json_response({"offerings": [offer_row(*one) for one in self._desk.explained()]})

    async def reconcile(self, _: web.Request) -> web.Response:
        """Remove what belongs to no live instance now, instead of within minutes."""
        await self._reconcile()
        return web.json_response({})

    async def reload(self, _: web.Request) -> web.Response:
        """Go by the configuration file as it is now, wholly or not at all."""
        return web.json_response({"changed": await self._reload()})

    async def console(self, request: web.Request) -> web.StreamResponse:
        """What is kept of a guest's console; with ``?follow=1`` also what comes, until it ends."""
        upstream_id = (await self._found(request)).upstream_id
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

    async def _found(self, request: web.Request) -> Instance:
        either_id = request.match_info["id"]
        instance = await self._store.find(either_id)
        if instance is None:
            raise _no_instance(either_id)
        return instance

    async def _upstream_id(self, either_id: str) -> str:
        """Of an instance, or of one that the record has lost: what is left of it has events too."""
        instance = await self._store.find(either_id)
        if instance is None and not UPSTREAM_ID.fullmatch(either_id):
            raise _no_instance(either_id)
        return instance.upstream_id if instance is not None else either_id


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
