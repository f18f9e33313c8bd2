"""gpud dies at every step of one real order, and is stopped and started under its running guest."""

from __future__ import annotations

import time
from contextlib import suppress

import aiohttp
import pytest

from gpud.model import LEGAL_STATUS, Status
from tests.machine.conftest import InOrder, ServerFactory
from tests.machine.gpu_ai import GpuAi, TunnelEnd
from tests.machine.points import CREATE_STEPS, RELEASE_STEPS, points
from tests.machine.processes import free_port
from tests.machine.server import GpudServer

BOOT_TIMEOUT_S = 600
DEATH_TIMEOUT_S = 60
USER = "ubuntu"


class Deaths:
    """Starts the daemon to die at one point after another."""

    def __init__(self, server: GpudServer) -> None:
        self.server = server
        self.count = 0
        self.slowest_s = 0.0

    async def at(self, point: str, timeout_s: float = DEATH_TIMEOUT_S) -> None:
        """Die there. Getting there means to have recovered from the death before."""
        began = time.monotonic()
        self.server.strike_at(point)
        self.server.daemon.start()
        await self.server.daemon.killed(timeout_s)
        self.count += 1
        if point != "after:await_ready":  # which waits for the guest's boot
            self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    async def of_request(self, point: str, request: str, caller: GpuAi, body: object) -> None:
        """Die at a point that a request leads to, whose answer may be lost with the daemon."""
        method, path = request.split()
        self.server.strike_at(point)
        await self.server.start_daemon()
        with suppress(aiohttp.ClientError):
            status, answer = await caller.call(method, path, body)
            assert status in {201, 204}, answer
        await self.server.daemon.killed(DEATH_TIMEOUT_S)
        self.count += 1

    async def no_more(self) -> None:
        self.server.strike_at()
        began = time.monotonic()
        await self.server.start_daemon()
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)


def no_status_went_back(server: GpudServer) -> bool:
    """Every event's statuses follow each other legally."""
    rows = server.ask("SELECT was, became FROM event WHERE was LIKE '%/%' AND became LIKE '%/%'")
    moves = [[Status(place.partition("/")[0]) for place in row] for row in rows]
    return bool(moves) and all(
        was is became or became in LEGAL_STATUS[was] for was, became in moves
    )


@pytest.mark.long
async def test_an_order_outlives_deaths_at_every_step_and_orderly_stops(
    start_server: ServerFactory, tunnel: TunnelEnd, in_order: InOrder
) -> None:
    server, caller = await start_server()
    server.daemon.stop()
    port = free_port()
    order = {
        "instance_id": "story", "gpu_type": "h100_sxm", "gpu_count": 2, "tier": "on_demand",
        "ssh_public_keys": [tunnel.customer_public_key],
        "startup_script": tunnel.startup_script(port, "echo ran >>/var/lib/ran"),
    }  # fmt: skip
    deaths = Deaths(server)
    first, *others = points(CREATE_STEPS)
    await deaths.of_request(first, "POST /v1/instances", caller, order)
    for point in others:
        await deaths.at(point, BOOT_TIMEOUT_S if point == "after:await_ready" else DEATH_TIMEOUT_S)
    await deaths.at("before:running")
    await deaths.no_more()

    accepted = await caller.order(**order)
    upstream_id = accepted["upstream_id"]
    assert server.ask("SELECT upstream_id FROM instance") == [(upstream_id,)]
    await caller.wait_for(upstream_id, "running", 10)
    qemu = server.qemu(upstream_id)
    look = "cat /var/lib/ran; cat /proc/sys/kernel/random/boot_id; ls -d /sys/module/pvpanic*"
    seen = await tunnel.log_in(port, USER, look)
    ran, boot_id, *pvpanic = seen.splitlines()
    assert ran == "ran"
    assert pvpanic  # or a panic would leave a dead guest that looks alive
    boots = "SELECT boot_id, guest_boots, restarts FROM instance"
    assert server.ask(boots) == [(boot_id, 1, 0)]
    await in_order(server, "gpud killed at a step of a create (QEMU)",
                   deaths.slowest_s, deaths.count)  # fmt: skip

    # An orderly stop, and a start, as for an upgrade.
    server.daemon.stop()
    assert server.qemu(upstream_id) == qemu
    assert await tunnel.log_in(port, USER, "cat /var/lib/ran") == "ran\n"
    began = time.monotonic()
    await server.start_daemon()
    assert (await caller.show(upstream_id))["status"] == "running"
    took_s = time.monotonic() - began
    assert server.qemu(upstream_id) == qemu
    assert server.ask(boots) == [(boot_id, 1, 0)]
    assert await tunnel.log_in(port, USER, "cat /var/lib/ran") == "ran\n"
    await in_order(server, "gpud stopped and started under a running guest (QEMU)", took_s)

    server.daemon.stop()
    deaths = Deaths(server)
    await caller.fetch_token()
    first, *others = points(RELEASE_STEPS)
    await deaths.of_request(first, f"DELETE /v1/instances/{upstream_id}", caller, None)
    for point in others:
        await deaths.at(point)
    await deaths.no_more()
    await caller.delete(upstream_id)
    await caller.wait_for(upstream_id, "terminated", 30)
    assert server.qemu(upstream_id) is None
    assert server.leftovers() == []
    assert no_status_went_back(server)
    await in_order(server, "gpud killed at a step of a delete (QEMU)",
                   deaths.slowest_s, deaths.count)  # fmt: skip
    assert len(await caller.wait_for_offerings()) == 4
