"""Real gpud servers for the machine tests."""

from __future__ import annotations

import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultLog
from tests.machine.gpu_ai import GpuAi, TunnelEnd, default_state, gpu_ai
from tests.machine.private_libvirtd import PrivateDaemon
from tests.machine.server import GpudServer, test_image

ServerFactory = Callable[..., Awaitable[tuple[GpudServer, GpuAi]]]
InOrder = Callable[..., Awaitable[None]]


@pytest.fixture
def state_dir() -> Path:
    """A directory that QEMU's user can get to, which pytest's own is not."""
    path = default_state(f"gpud-test-{uuid.uuid4().hex[:8]}")
    path.mkdir(parents=True)
    path.chmod(0o711)
    return path


@pytest.fixture
async def start_server(
    state_dir: Path, request: pytest.FixtureRequest
) -> AsyncIterator[ServerFactory]:
    """Starts a gpud with sections of the demo's config changed, and GPU.ai beside it."""
    async with AsyncExitStack() as stack:

        async def start(
            image: Path | None = None, prefix: Sequence[str] = (), **changes: Any
        ) -> tuple[GpudServer, GpuAi]:
            server = GpudServer.with_own_ports(state_dir, prefix, **changes)
            stack.push_async_callback(_end, server, request)
            await server.start(image or test_image())
            caller = await stack.enter_async_context(gpu_ai(server.url, server.issuer_url))
            await caller.wait_for_offerings()
            return server, caller

        yield start


@pytest.fixture
def private_home() -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="gpud-"))  # socket paths must stay short
    yield home
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def private(private_home: Path) -> Iterator[PrivateDaemon]:
    daemon = PrivateDaemon(private_home)
    yield daemon
    daemon.stop()


@pytest.fixture
def in_order(fault_log: FaultLog) -> InOrder:
    """Has ``gpud check`` look at a server after a fault, and takes down how that went."""

    async def look(server: GpudServer, fault: str, slowest_s: float, runs: int = 1) -> None:
        found = await server.findings()
        kinds = [finding["kind"] for finding in found]
        fault_log.record(
            fault, runs=runs, recovered=0 if found else runs, leaks=kinds.count("leak"),
            double_claims=kinds.count("double claim"), slowest_s=slowest_s,
        )  # fmt: skip
        assert not found

    return look


@pytest.fixture
async def tunnel(state_dir: Path) -> AsyncIterator[TunnelEnd]:
    """GPU.ai's end of the tunnels."""
    end = TunnelEnd(state_dir / "gpu-ai")
    await end.start()
    yield end
    end.sshd.stop()


async def _end(server: GpudServer, request: pytest.FixtureRequest) -> None:
    """End everything; what a failed test has left is shown, and removed."""
    failed = getattr(request.node, "failed", False)
    if failed:
        print(f"--- the daemon's log ends with\n{server.daemon.tail(40)}")
        for log in (server.state_dir / "console").glob("*"):
            print(f"--- {log.name} ends with\n{log.read_text(errors='replace')[-3000:]}")
    server.stop()
    await server.remove_domains()
    await server.remove_network()
    server.erase()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    if report.when == "call" and report.failed:
        item.failed = True  # type: ignore[attr-defined]
    return report
