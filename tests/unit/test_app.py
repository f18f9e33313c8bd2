"""The daemon put together, on libvirt's own test driver."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gpud import adminclient, app
from gpud.config import Config
from gpud.configfile import parse_config
from gpud.dev.issuer import Issuer, running_issuer
from gpud.errors import Code, GpudError
from gpud.reload import Reload
from gpud.statefile import claim
from tests.machine.processes import free_port

pytestmark = pytest.mark.real_command("head")  # which asks the PCI functions of the machine

CONFIG = """
state_dir: {state_dir}
server: {{listen: 127.0.0.1, port: {port}}}
metrics: {{port: {metrics_port}, enabled: {metrics}}}
auth: {{issuer: "{issuer}", audience: [gpud], jwks_url: "{issuer}/.well-known/jwks.json"}}
site: {{region: US, datacenter_location: here}}
offers:
  - {{gpu_type: l40s, per_gpu: {{cpu_cores: 1, memory_gib: 0.25, storage_gib: 1}},
      price_per_gpu_hour: {{on_demand: 1}}}}
host_reserve: {{cpu_cores: 0, memory_gib: 0, storage_gib: 0}}
gpus: {{stand_ins: [{{gpu_type: l40s, count: 1}}]}}
network: {{mode: user}}
libvirt: {{uri: "test:///default"}}
"""


def config_for(state_dir: Path, issuer: Issuer | None = None, **changes: Any) -> Config:
    values = {
        "state_dir": state_dir,
        "port": free_port(),
        "metrics_port": free_port(),
        "metrics": "true",
        "issuer": issuer.url if issuer else "http://127.0.0.1:1",
        **changes,
    }
    return parse_config(CONFIG.format(**values))


def running(config: Config) -> AbstractAsyncContextManager[Reload]:
    """The daemon, whose configuration stays as it is."""
    return app.running(config, lambda: config, claim(config.state_dir))


async def get(url: str, **headers: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, await answer.text()


async def test_all_doors_open_and_close(tmp_path: Path) -> None:
    async with running_issuer(client_id="c", client_secret="s", audience="gpud") as issuer:
        config = config_for(tmp_path, issuer)
        url = f"http://127.0.0.1:{config.server.port}/v1/gpu/available"
        async with running(config):
            status, body = await get(url, Authorization=f"Bearer {issuer.mint()}")
            assert (status, body) == (200, '{"offerings": []}')
            assert (await get(url))[0] == 401
            page = (await get(f"http://127.0.0.1:{config.metrics.port}/metrics"))[1]
            assert 'gpud_gpus{gpu_type="l40s",state="available"} 1.0' in page
            assert 'gpud_instances{status="running"} 0.0' in page
            watch = f"http://127.0.0.1:{config.metrics.port}"
            assert await get(f"{watch}/healthz") == (200, '{"problems": {}}')
            async with asyncio.timeout(10):
                while json.loads((await get(f"{watch}/readyz"))[1])["problems"].keys() != {"image"}:
                    await asyncio.sleep(0.005)
            listed = await asyncio.to_thread(
                adminclient.get, config.admin_socket_path, "/instances"
            )
            assert listed == {"instances": []}
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(url)
        assert not config.admin_socket_path.exists()


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=["a shell's umask", "the unit's"])
async def test_directories_have_their_modes(tmp_path: Path, umask: int) -> None:
    state_dir = tmp_path / "state"
    before = os.umask(umask)
    try:
        async with running(config_for(state_dir)):
            modes = {
                name: stat.S_IMODE((state_dir / name).stat().st_mode)
                for name in (".", "images", "instances", "console", "state.sqlite")
            }
    finally:
        os.umask(before)
    assert modes == {
        ".": 0o711, "images": 0o755, "instances": 0o711, "console": 0o700, "state.sqlite": 0o600,
    }  # fmt: skip


async def test_it_starts_while_the_issuer_is_away_and_says_so(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    async with running(config):
        url = f"http://127.0.0.1:{config.server.port}/v1/gpu/available"
        status, body = await get(url, Authorization="Bearer eyJhbGciOiJSUzI1NiJ9.e30.c2ln")
        watch = f"http://127.0.0.1:{config.metrics.port}"
        alive, (readiness, told) = await get(f"{watch}/healthz"), await get(f"{watch}/readyz")
    assert alive[0] == 200
    assert readiness == 503
    assert "keys" in told
    assert status == 503
    assert "auth_unavailable" in body


async def test_metrics_can_be_switched_off(tmp_path: Path) -> None:
    config = config_for(tmp_path, metrics="false")
    async with running(config):
        with pytest.raises(aiohttp.ClientConnectorError):
            await get(f"http://127.0.0.1:{config.metrics.port}/metrics")


async def test_a_second_daemon_on_the_same_state_is_refused(tmp_path: Path) -> None:
    async with running(config_for(tmp_path)):
        with pytest.raises(GpudError, match="another gpud is running"):
            async with running(config_for(tmp_path)):
                pass


async def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    config = config_for(tmp_path)
    async with running(config):
        with pytest.raises(GpudError, match=f"port {config.server.port}") as caught:
            async with running(config_for(tmp_path / "other", port=config.server.port)):
                pass
    assert caught.value.code is Code.CONFIG_INVALID


async def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GpudError, match=r"file/state"):
        async with running(config_for(tmp_path / "file" / "state")):
            pass


async def test_a_background_task_that_dies_ends_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr("gpud.lifecycle.reconcile.Reconciler.run", broken)
    with pytest.raises(RuntimeError, match="defect"):
        async with running(config_for(tmp_path)):
            await asyncio.sleep(5)


async def test_background_tasks_that_die_together_are_all_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: object) -> None:
        raise RuntimeError("defect")

    monkeypatch.setattr("gpud.lifecycle.reconcile.Reconciler.run", broken)
    monkeypatch.setattr("gpud.inventory.Inventory.run", broken)
    with pytest.raises(ExceptionGroup) as caught:
        async with running(config_for(tmp_path)):
            await asyncio.sleep(5)
    assert len(caught.value.exceptions) == 2


async def test_serve_runs_until_it_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("gpud.systemd.notify", told.append)
    config = config_for(tmp_path)
    task = asyncio.create_task(app.serve(config, lambda: config, claim(config.state_dir)))
    async with asyncio.timeout(10):
        while not told:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await task
    assert told[0].startswith("READY=1")
    assert told[1] == "STOPPING=1"
