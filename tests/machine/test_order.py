"""Orders on a real gpud, libvirtd, QEMU and guest; one test for each story."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import urllib.request
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.machine.conftest import ServerFactory
from tests.machine.gpu_ai import GpuAi, TunnelEnd
from tests.machine.processes import free_port, output_of
from tests.machine.server import GpudServer

BOOT_TIMEOUT_S = 600
USER = "ubuntu"


def metric(server: GpudServer, name: str) -> float:
    """The value of one line of the metrics page."""
    url = f"http://127.0.0.1:{server.config['metrics']['port']}/metrics"
    with urllib.request.urlopen(url) as page:
        lines = page.read().decode().splitlines()
    return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")))


async def row(server: GpudServer, upstream_id: str) -> dict[str, object]:
    """An instance as the operator sees it."""
    listed = json.loads(await server.gpud("instances", "--all", "--json"))
    found: dict[str, object] = next(one for one in listed if one["upstream_id"] == upstream_id)
    return found


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = 60) -> None:
    """Wait until ``condition()`` is true; rarely asked, so that the guest gets the processor."""
    async with asyncio.timeout(timeout_s):
        while not await condition():
            await asyncio.sleep(3)


async def nothing_left(server: GpudServer, caller: GpuAi, upstream_id: str) -> None:
    await caller.wait_for(upstream_id, "terminated", 60)
    assert not [name for name in await server.domains() if upstream_id in name]
    assert not [path for path in server.leftovers() if upstream_id in path]


async def test_an_order_outlives_the_daemon_and_its_own_guest(
    start_server: ServerFactory, tunnel: TunnelEnd
) -> None:
    """SIGKILL while creating; the guest powers itself off and is started again; then DELETE."""
    server, caller = await start_server()
    port = free_port()
    # Nothing a shell or YAML or XML would trip over may change on the way.
    script = tunnel.startup_script(
        port,
        "cat >/run/odd <<'EOF'\n<a b=\"c\">&amp;{x: [y]}</a>\r\n%s $HOME `id` \\n ünïcödé 日本\nEOF",
        ": '" + "x" * 200_000 + "'",
    )
    order = {
        "instance_id": "story-1", "gpu_type": "h100_sxm", "gpu_count": 2, "tier": "on_demand",
        "ssh_public_keys": [tunnel.customer_public_key], "startup_script": script,
    }  # fmt: skip
    accepted = await caller.order(**order)
    upstream_id = accepted["upstream_id"]
    assert accepted["status"] == "creating"
    assert accepted["cost_per_hour"] == 6.98
    for pause_s in (0.1, 0.4, 1.5):
        await asyncio.sleep(pause_s)
        server.daemon.kill()
        await server.start_daemon()
    await caller.fetch_token()
    assert (await caller.order(**order))["upstream_id"] == upstream_id
    running = await caller.wait_for(upstream_id, "running", BOOT_TIMEOUT_S)
    assert running["ip"] == "10.0.2.15"
    assert len([name for name in await server.domains() if upstream_id in name]) == 1

    seen = await tunnel.log_in(port, USER, "hostname; lspci -n; nproc; cat /run/odd;"
                               "sudo sha256sum /usr/local/lib/gpud/script")  # fmt: skip
    assert upstream_id in seen
    assert seen.count("1234:11e8") == 2
    assert '<a b="c">&amp;{x: [y]}</a>\r\n%s $HOME `id` \\n ünïcödé 日本\n' in seen
    assert hashlib.sha256(script.encode()).hexdigest() in seen

    boot_id = await tunnel.log_in(port, USER, "cat /proc/sys/kernel/random/boot_id")
    with pytest.raises(AssertionError):
        await output_of(*tunnel.login_command(port, USER), "sudo systemctl poweroff; sleep 60")

    async def started_again() -> bool:
        return (await row(server, upstream_id))["restarts"] == 1

    await until(started_again, 120)
    assert (await caller.show(upstream_id))["status"] == "running"
    again = await tunnel.log_in(port, USER, "cat /proc/sys/kernel/random/boot_id", BOOT_TIMEOUT_S)
    assert again != boot_id
    status = await caller.show(upstream_id)
    assert status["status"] == "running"
    assert status["uptime_seconds"] > 0

    await caller.delete(upstream_id)
    await caller.delete(upstream_id)
    await nothing_left(server, caller, upstream_id)
    assert await caller.offerings() != []
    assert secret_free(server, tunnel)


def secret_free(server: GpudServer, tunnel: TunnelEnd) -> bool:
    """No file of the state, no log, holds the script's key once the instance has ended."""
    secret = (tunnel.customer_key_file.parent / "tunnel").read_text().splitlines()[2].encode()
    files = [path for path in server.state_dir.glob("*") if path.is_file()]
    assert Path(server.state_dir / "state.sqlite") in files
    return not any(secret in path.read_bytes() for path in files)


async def test_a_guest_in_the_network_has_its_own_address_and_runs_its_script_once(
    start_server: ServerFactory, tunnel: TunnelEnd
) -> None:
    network = {"mode": "network", "name": "gpudorder", "subnet": "10.177.0.0/24"}
    server, caller = await start_server(network=network, guest={"script_runs": "once"})
    accepted = await caller.order(
        instance_id="story-2", gpu_type="h100_sxm", gpu_count=1, tier="spot",
        ssh_public_keys=[tunnel.customer_public_key],
        startup_script="#!/bin/sh\necho ran >>/var/lib/ran\nexit 7\n",
    )  # fmt: skip
    upstream_id = accepted["upstream_id"]
    running = await caller.wait_for(upstream_id, "running", BOOT_TIMEOUT_S)
    assert running["ip"] == "10.177.0.2"
    login = ["ssh", "-i", str(tunnel.customer_key_file), "-o", "StrictHostKeyChecking=no",
             "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes",
             f"{USER}@10.177.0.2"]  # fmt: skip

    async def log_in(command: str) -> str:
        for _ in range(120):
            try:
                return await output_of(*login, command)
            except AssertionError:
                await asyncio.sleep(1)
        raise AssertionError("no login over the network")

    assert "10.177.0.2/24" in await log_in("ip -br address")

    async def exit_code_known() -> bool:
        return (await row(server, upstream_id))["script_exit_code"] == 7

    await until(exit_code_known)
    assert metric(server, 'gpud_startup_script_exits_total{result="failed"}') == 1
    await caller.delete(upstream_id)
    await nothing_left(server, caller, upstream_id)
    leases = await output_of(
        "virsh", "-c", server.config["libvirt"]["uri"], "net-dumpxml", "gpudorder"
    )
    assert "<host mac" not in leases


async def test_the_same_order_many_times_and_many_orders_for_two_gpus(
    start_server: ServerFactory,
) -> None:
    server, caller = await start_server()
    same = {"instance_id": "same", "gpu_type": "h100_sxm", "gpu_count": 1, "tier": "on_demand"}
    answers = await asyncio.gather(*(caller.order(**same) for _ in range(20)))
    assert len({answer["upstream_id"] for answer in answers}) == 1

    bodies = [{**same, "instance_id": f"other-{number}"} for number in range(9)]
    results = await asyncio.gather(*(caller.call("POST", "/v1/instances", one) for one in bodies))
    refused = [answer for status, answer in results if status == 409]
    assert len(refused) == 8
    assert {answer["code"] for answer in refused} == {"no_capacity"}
    assert await caller.offerings() == []
    live = [answers[0]["upstream_id"]] + [
        a["upstream_id"] for status, a in results if status == 201
    ]
    assert len(live) == 2

    async def both_started() -> bool:
        domains = await server.domains()
        return all(f"gpud-{upstream_id}" in domains for upstream_id in live)

    await until(both_started, 60)
    for upstream_id in live:
        await caller.delete(upstream_id)
    for upstream_id in live:
        await nothing_left(server, caller, upstream_id)
    assert len(await caller.offerings()) == 4
    assert (await row(server, live[0]))["status"] == "terminated"


async def test_a_delete_right_after_the_order_leaves_nothing(start_server: ServerFactory) -> None:
    server, caller = await start_server()
    for number, pause_s in enumerate((0, 0.05, 0.2, 0.6)):
        accepted = await caller.order(
            instance_id=f"short-{number}", gpu_type="h100_sxm", gpu_count=2, tier="on_demand"
        )
        await asyncio.sleep(pause_s)
        await caller.delete(accepted["upstream_id"])
        await nothing_left(server, caller, accepted["upstream_id"])


async def test_the_demo(tmp_path: Path) -> None:
    """README's first command, as a person would run it; it says itself whether it went well."""
    output = await output_of(sys.executable, "-m", "tests.machine.demo", timeout_s=800)
    (tmp_path / "demo.log").write_text(output)
    print(output)
    assert output.splitlines()[-1].startswith("demo: ok, ")
