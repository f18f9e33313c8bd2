"""Debian's Prometheus watches a real gpud: what it scraped, what it computes, which alerts it raises."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from gpud import __version__
from tests.machine.gpu_ai import gpu_ai
from tests.machine.processes import output_of
from tests.machine.prometheus import ALERTS, CONFIG, Prometheus
from tests.machine.server import GpudServer

NOWHERE = "test:///default"  # libvirt's own test driver: its guests are words
EIGHT_GPUS = {"instance_id": "no", "gpu_type": "h100_sxm", "gpu_count": 8, "tier": "on_demand"}


@asynccontextmanager
async def watched(server: GpudServer) -> AsyncIterator[Prometheus]:
    server.issuer.start()
    await server.issuer.listening(int(server.issuer_url.rsplit(":", 1)[1]))
    await server.start_daemon()
    prometheus = Prometheus(server.state_dir, f"127.0.0.1:{server.config['metrics']['port']}")
    try:
        prometheus.program.start()
        await prometheus.ready()
        await prometheus.until('up{job="gpud"}', 1)
        yield prometheus
    finally:
        prometheus.program.stop()
        server.stop()
        server.erase()


async def health(server: GpudServer, path: str) -> tuple[int, Any]:
    url = f"http://127.0.0.1:{server.config['metrics']['port']}/{path}"
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return answer.status, await answer.json()


async def test_promtool_finds_no_fault_in_the_alerts() -> None:
    assert "rules found" in await output_of("promtool", "check", "rules", str(ALERTS))
    tests = Path(__file__).with_name("alerts_test.yaml")
    assert "SUCCESS" in await output_of("promtool", "test", "rules", str(tests))


async def test_prometheus_scrapes_what_happened_and_raises_what_is_wrong(state_dir: Path) -> None:
    server = GpudServer.with_own_ports(state_dir, libvirt={"uri": NOWHERE})
    metrics_port = server.config["metrics"]["port"]
    async with watched(server) as prometheus:
        page = f"http://127.0.0.1:{metrics_port}/metrics"
        lint = f"curl -s {page} | promtool check metrics"
        assert await output_of("bash", "-o", "pipefail", "-c", lint) == ""

        await prometheus.until("gpud_libvirt_up", 1)
        assert await health(server, "healthz") == (200, {"problems": {}})
        status, told = await health(server, "readyz")
        assert (status, list(told["problems"])) == (503, ["image"])  # it has none
        assert await prometheus.value(f'gpud_build_info{{version="{__version__}"}}') == 1
        await prometheus.until('gpud_gpus{gpu_type="h100_sxm", state="available"}', 2)
        await prometheus.until("gpud_guest_image_usable", 0)

        disk = state_dir / "no system.qcow2"
        await output_of("qemu-img", "create", "-q", "-f", "qcow2", str(disk), "1M")
        name = server.config["guest"]["image"]
        await server.gpud("image", "add", str(disk), "--name", name, "--unsealed")
        await prometheus.until("gpud_guest_image_usable", 1)
        await prometheus.until("sum(gpud_offers_available)", 6)

        async with gpu_ai(server.url, server.issuer_url) as caller:
            for _ in range(3):
                assert (await caller.call("POST", "/v1/instances", EIGHT_GPUS))[0] == 422
            accepted = await caller.order(**{**EIGHT_GPUS, "instance_id": "a", "gpu_count": 2})
            one_more = {**EIGHT_GPUS, "instance_id": "b", "gpu_count": 1}
            assert (await caller.call("POST", "/v1/instances", one_more))[0] == 409
            await prometheus.until('gpud_gpus{state="in_use"}', 2)
            await prometheus.until('gpud_instances{status="creating"}', 1)
            await prometheus.until("sum(gpud_offers_available)", 0)
            await caller.delete(accepted["upstream_id"])
            await caller.wait_for(accepted["upstream_id"], "terminated", 30)
            assert (await caller.call("GET", "/v1/instances/made-up"))[0] == 404
            caller.token = "x.y.z"
            assert (await caller.call("GET", "/v1/gpu/available"))[0] == 401
        refused = 'gpud_orders_total{outcome="not_offered"}'
        await prometheus.until(refused, 3)
        await prometheus.until(f"increase({refused}[1m]) > bool 0", 1)
        await prometheus.until('gpud_orders_total{outcome="accepted"}', 1)
        await prometheus.until('gpud_gpu_claims_total{tier="on_demand"}', 2)
        await prometheus.until('gpud_capacity_refusals_total{shortage="gpus"}', 1)
        await prometheus.until('gpud_step_seconds_count{step="return_gpus"}', 1)
        await prometheus.until('gpud_libvirt_calls_total{call="start", outcome="ok"}', 1)
        await prometheus.until('gpud_gpus{state="available"}', 2)
        await prometheus.until("sum(gpud_instances)", 0)
        await prometheus.until('gpud_token_failures_total{reason="malformed"}', 1)
        requests = "gpud_api_requests_total"
        await prometheus.until(f'sum({requests}{{route="/v1/instances", status="422"}})', 3)
        await prometheus.until(f'{requests}{{route="/v1/instances/{{id}}", status="404"}}', 1)
        assert await prometheus.value(f'{requests}{{route=~".*made-up.*"}}') is None
        timed = 'gpud_api_request_seconds_count{route="/v1/instances"}'
        await prometheus.until(timed, 5)

        card = (await prometheus.ask("query", query="gpud_gpu_info"))["result"][0]["metric"]["gpu"]
        await server.gpud("gpus", "quarantine", card, "--reason", "a test")
        await prometheus.until(f'gpud_gpu_not_sold{{gpu="{card}", reason="quarantined"}}', 1)
        firing = 'ALERTS{alertname="GpudGpuQuarantined", alertstate="firing"}'
        await prometheus.until(f"{firing} * on (gpu) group_left (gpu_type) gpud_gpu_info", 1)

        for panel in json.loads((CONFIG / "grafana-dashboard.json").read_text())["panels"]:
            for target in panel.get("targets", []):
                await prometheus.ask("query", query=filled_in(target["expr"]))
        groups = (await prometheus.ask("rules"))["groups"]
        assert {rule["health"] for group in groups for rule in group["rules"]} == {"ok"}

        server.daemon.kill()
        await prometheus.until('up{job="gpud"}', 0)
        pending = 'ALERTS{alertname="GpudDown", alertstate="pending"}'
        await prometheus.until(f"count({pending})", 1)


async def test_a_gpud_without_libvirt_says_so(state_dir: Path) -> None:
    server = GpudServer.with_own_ports(state_dir, libvirt={"uri": "qemu+unix:///system?socket=/no"})
    async with watched(server) as prometheus:
        await prometheus.until("gpud_libvirt_up", 0)
        status, told = await health(server, "readyz")
        assert (status, list(told["problems"])) == (503, ["libvirt", "image"])
        assert (await health(server, "healthz"))[0] == 200


def filled_in(expression: str) -> str:
    """As Grafana asks it, for all servers."""
    for name, value in (("$server", ".*"), ("$__rate_interval", "1m"), ("$__range", "1h")):
        expression = expression.replace(name, value)
    return expression
