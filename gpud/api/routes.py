"""The four endpoints of the Supplier API."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

import structlog
from aiohttp import web
from pydantic_core import to_json

from gpud.api.schemas import instance_json, parse_order
from gpud.config import Network
from gpud.desk import OrderDesk
from gpud.errors import Code, GpudError
from gpud.model import Instance
from gpud.offers import as_number
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

REQUEST_ID = web.RequestKey("request_id", str)
BODY = web.RequestKey("body", bytes)

_JSON: Final = {"Content-Type": "application/json"}
_USER_MODE_ADDRESS = "10.0.2.15"


class Routes:
    """Handlers; each request has passed the gate, so its caller is known and its body is read.

    Args:
        desk: Sells.
        store: Knows the instances.
        network: Where guests have their addresses.
        metrics: Where orders are counted.
        in_time: Bounds what a read waits for; of other requests the gate bounds all.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        desk: OrderDesk,
        store: Store,
        network: Network,
        metrics: Metrics,
        in_time: Callable[[], AbstractAsyncContextManager[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._desk = desk
        self._store = store
        self._network = network
        self._metrics = metrics
        self._in_time = in_time
        self._clock = clock

    async def available(self, _: web.Request) -> web.Response:
        """``GET /v1/gpu/available``."""
        return web.Response(body=self._desk.available_json(), headers=_JSON)

    async def create(self, request: web.Request) -> web.Response:
        """``POST /v1/instances``. The answer leaves after the order is durable.

        What the body is declared to be does not matter: a 4xx would be final, and it is JSON or not.
        """
        try:
            order, unknown_fields = parse_order(request[BODY])
        except GpudError as error:
            self._metrics.orders.labels(error.code.value).inc()
            raise
        if unknown_fields:
            self._metrics.unknown_fields.inc(unknown_fields)
        accepted = await self._desk.order(order)
        instance = accepted.instance
        _log.info(
            "order accepted", request_id=request[REQUEST_ID], instance=instance.upstream_id,
            instance_id=instance.instance_id, shape=instance.grant.shape.name,
            replayed=accepted.replayed,
        )  # fmt: skip
        answer = {
            "upstream_id": instance.upstream_id,
            "status": instance.status.value,
            "cost_per_hour": as_number(instance.grant.cost_per_hour),
            "estimated_ready_seconds": accepted.estimated_ready_s,
            "datacenter_location": instance.grant.datacenter_location,
            "region": instance.grant.region,
        }
        headers = {"Idempotent-Replayed": "true"} if accepted.replayed else {}
        headers["Location"] = f"/v1/instances/{instance.upstream_id}"
        return web.json_response(answer, status=201, headers=headers)

    async def show(self, request: web.Request) -> web.Response:
        """``GET /v1/instances/{id}``, by either id."""
        either_id = request.match_info["id"]
        instance = self._store.find_live(either_id)
        if instance is None:
            async with self._in_time():
                instance = await self._store.find(either_id)
        if instance is None:
            raise _unknown()
        body = to_json(instance_json(instance, self._clock(), self._address(instance)))
        return web.Response(body=body, headers=_JSON)

    async def delete(self, request: web.Request) -> web.Response:
        """``DELETE /v1/instances/{id}``. The answer leaves after the intent is durable."""
        instance = await self._store.request_delete(request.match_info["id"])
        if instance is None:
            raise _unknown()
        _log.info("delete accepted", request_id=request[REQUEST_ID], instance=instance.upstream_id)
        return web.Response(status=204)

    def _address(self, instance: Instance) -> str | None:
        """The guest's address, while it has one; in user mode QEMU gives every guest the same."""
        if not instance.live:
            return None
        if instance.grant.address is not None:
            return str(instance.grant.address)
        return _USER_MODE_ADDRESS


def _unknown() -> GpudError:
    return GpudError(Code.INSTANCE_NOT_FOUND, "this server has no instance of that id")
