"""gpud as a program that has few file descriptors, and callers who take them all."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from gpud.dev.issuer import running_issuer
from tests.faults import FaultLog
from tests.machine.processes import GPUD, Program, free_port
from tests.unit.test_app import CONFIG

pytestmark = pytest.mark.real_command("prlimit", "qemu-img")
IDLE = 5000
ORDER = {"gpu_type": "l40s", "gpu_count": 1, "tier": "on_demand"}


@pytest.fixture(autouse=True)
def _many_sockets() -> None:
    """The callers of this test need more descriptors than a shell gives."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < IDLE + 500:
        pytest.skip(f"needs {IDLE + 500} file descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Caller:
    """Asks on a new connection each time, as a caller who meets a crowd does."""

    def __init__(self, port: int, token: str) -> None:
        self.port = port
        self._url = f"http://127.0.0.1:{port}"
        self._headers = {"Authorization": f"Bearer {token}"}

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, float]:
        began = time.perf_counter()
        limit = aiohttp.ClientTimeout(10)
        async with (
            aiohttp.ClientSession(headers=self._headers, timeout=limit) as session,
            session.request(method, self._url + path, json=body) as answer,
        ):
            await answer.read()
            return answer.status, time.perf_counter() - began


@asynccontextmanager
async def daemon(directory: Path, descriptors: int) -> AsyncIterator[Caller]:
    """The daemon with so many file descriptors, on libvirt's own test driver."""
    async with running_issuer(client_id="c", client_secret="s", audience="gpud") as issuer:
        port = free_port()
        config = directory / "gpud.yaml"
        config.write_text(
            CONFIG.format(
                state_dir=directory / "state", port=port, metrics_port=free_port(), metrics="false",
                issuer=issuer.url,
            )
        )  # fmt: skip
        argv = ["prlimit", f"--nofile={descriptors}", *GPUD, "serve", "--config", str(config)]
        program = Program("gpud", argv, directory / "log", {})
        program.start()
        try:
            await program.listening(port)
            yield Caller(port, issuer.mint())
        finally:
            program.stop()


def crowd(stack: ExitStack, port: int, number: int) -> None:
    for _ in range(number):
        idle = stack.enter_context(socket.socket())
        idle.setblocking(False)
        idle.connect_ex(("127.0.0.1", port))


@pytest.mark.parametrize("descriptors", [1024, 16384])
async def test_a_crowd_that_says_nothing_holds_nobody_up(
    tmp_path: Path, fault_log: FaultLog, descriptors: int
) -> None:
    async with daemon(tmp_path, descriptors) as caller:
        with (
            ExitStack() as stack,
            fault_log.recovering(f"{IDLE} idle connections, {descriptors} descriptors"),
        ):
            crowd(stack, caller.port, IDLE)
            slowest_s = 0.0
            # The first may have to wait until the crowd has been let in and thinned out.
            assert (await caller.ask("GET", "/v1/gpu/available"))[0] == 200
            for _ in range(50):
                status, seconds = await caller.ask("GET", "/v1/gpu/available")
                assert status == 200
                slowest_s = max(slowest_s, seconds)
                await asyncio.sleep(0.01)
            assert slowest_s < 3  # a SYN that found no place is sent again after a second
            # What needs files of its own is refused for its reason, not for want of descriptors.
            status, _ = await caller.ask("POST", "/v1/instances", {**ORDER, "instance_id": "a"})
            assert status == 409, "there is no guest image here"
        assert (await caller.ask("GET", "/v1/gpu/available"))[0] == 200
    assert "Too many open files" not in (tmp_path / "log").read_text()
