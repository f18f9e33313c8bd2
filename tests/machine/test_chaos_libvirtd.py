"""libvirtd dies during every step; the guest does not notice, and no status lies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from gpud.model import Step
from tests.machine.conftest import InOrder, ServerFactory
from tests.machine.points import CREATE_STEPS, RELEASE_STEPS, Held, points
from tests.machine.private_libvirtd import PrivateDaemon
from tests.machine.small_guest import small_guest

STEP_TIMEOUT_S = 90
CREATE = {"creating"}
LIVE = {**dict.fromkeys(CREATE_STEPS, CREATE), Step.RUNNING: {"running"}}
# What the guest has reported is true, and committed, whether libvirtd is there or not.
LIVE[Step.AWAIT_READY] = CREATE | LIVE[Step.RUNNING]
RELEASE = {"stopping", "terminated"}


@pytest.mark.long
async def test_libvirtd_dies_during_every_step(
    private: PrivateDaemon, state_dir: Path, start_server: ServerFactory,
    in_order: InOrder,
) -> None:  # fmt: skip
    private.own(state_dir)
    server, caller = await start_server(
        await small_guest(), private.as_user,
        libvirt={"uri": private.uri}, guest={"firmware": "bios"},
    )  # fmt: skip
    server.daemon.stop()
    creating, releasing = [*points(CREATE_STEPS), "before:running"], points(RELEASE_STEPS)
    held = Held(server, state_dir / "held", *creating, *releasing)
    private.own(state_dir / "held")
    await server.start_daemon()
    await caller.wait_for_offerings()
    order = {"instance_id": "story", "gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}
    upstream_id = (await caller.order(**order))["upstream_id"]
    slowest_s, qemu = 0.0, None

    async def without_libvirtd(point: str, expected: set[str]) -> None:
        await asyncio.to_thread(private.kill)
        try:
            held.let_go(point)
            await asyncio.sleep(0.3)
            assert (await caller.show(upstream_id))["status"] in expected
        finally:
            await asyncio.to_thread(private.start)

    for point, following in zip(creating, [*creating[1:], ""], strict=True):
        await held.at(point)
        before = server.qemu(upstream_id)
        assert qemu is None or before == qemu  # it was not started twice, nor did it notice
        qemu = before
        await without_libvirtd(point, LIVE[Step(point.partition(":")[2])])
        began = time.monotonic()
        if following:
            await held.at(following)
        slowest_s = max(slowest_s, time.monotonic() - began)
    assert qemu is not None
    assert server.qemu(upstream_id) == qemu
    await caller.wait_for_offerings()
    await in_order(server, "libvirtd killed during a step of a create (QEMU)",
                   slowest_s, len(creating))  # fmt: skip

    # A guest ends while nobody can tell.
    await asyncio.to_thread(private.kill)
    os.kill(qemu, signal.SIGKILL)
    async with asyncio.timeout(STEP_TIMEOUT_S):
        while await caller.offerings():  # until it knows
            await asyncio.sleep(0.1)
    status, answer = await caller.call("POST", "/v1/instances", {**order, "instance_id": "other"})
    assert (status, answer["code"]) == (503, "hypervisor_unavailable")
    assert (await caller.show(upstream_id))["status"] == "running"
    await asyncio.to_thread(private.start)
    began = time.monotonic()
    async with asyncio.timeout(STEP_TIMEOUT_S):
        while server.qemu(upstream_id) in {None, qemu}:
            await asyncio.sleep(0.1)
    took_s = time.monotonic() - began
    assert server.ask("SELECT restarts, status FROM instance") == [(1, "running")]
    await in_order(server, "QEMU killed while libvirtd was away (QEMU)", took_s)

    await caller.delete(upstream_id)
    slowest_s = 0.0
    for point, following in zip(releasing, [*releasing[1:], ""], strict=True):
        await held.at(point)
        await without_libvirtd(point, RELEASE)
        began = time.monotonic()
        if following:
            await held.at(following)
        slowest_s = max(slowest_s, time.monotonic() - began)
    await caller.wait_for(upstream_id, "terminated", STEP_TIMEOUT_S)
    assert server.qemu(upstream_id) is None
    assert server.leftovers() == []
    await caller.wait_for_offerings(STEP_TIMEOUT_S)
    await in_order(server, "libvirtd killed during a step of a delete (QEMU)",
                   slowest_s, len(releasing))  # fmt: skip
