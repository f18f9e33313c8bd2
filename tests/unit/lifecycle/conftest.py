"""A libvirtd in memory, qemu-img without QEMU, and gpud upon them with its pauses cut short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import libvirt
import pytest
import structlog

from gpud import command
from gpud.guest.image import ImageStore
from gpud.host.nvml import Nvml
from gpud.hypervisor import connection
from gpud.inventory import bus
from gpud.lifecycle import guests, worker
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import Clock
from tests.unit.fakes.qemu_img import QemuImg, base_image
from tests.unit.lifecycle.gpud_under_test import Gpud, StepsMapping, make_config, make_server

StartGpud = Callable[..., Awaitable[Gpud]]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "leaves_a_mess: what the test leaves behind is not held against the record"
    )


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Log nowhere: structlog's own way to print a traceback takes seconds."""
    before = structlog.get_config()
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory(), processors=[_drop])
    yield
    structlog.configure(**before)


def _drop(_logger: object, _method: str, _event: object) -> str:
    raise structlog.DropEvent


@pytest.fixture
def libvirtd(monkeypatch: pytest.MonkeyPatch) -> LibvirtDaemon:
    daemon = LibvirtDaemon()
    monkeypatch.setattr(libvirt, "open", daemon.open)
    monkeypatch.setattr(connection, "start_event_loop", lambda: None)
    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(connection, "LONGEST_PAUSE_S", 0.002)
    return daemon


@pytest.fixture
def qemu_img(monkeypatch: pytest.MonkeyPatch) -> QemuImg:
    program = QemuImg()
    monkeypatch.setattr(command, "run", program.run)
    return program


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_FRESH_S", -1)
    monkeypatch.setattr(worker, "_FIRST_RETRY_S", 0.001)
    monkeypatch.setattr(worker, "_LAST_RETRY_S", 0.002)
    monkeypatch.setattr(guests, "_PAUSE_S", 0)
    monkeypatch.setattr(guests, "_PAUSE_AFTER_REPORT_S", 0)
    monkeypatch.setattr(guests, "_BOOT_EVERY_S", 0)


@pytest.fixture
def monotonic() -> Clock:
    return Clock(1000)


@pytest.fixture
async def image(state_dir: Path, qemu_img: QemuImg) -> str:  # noqa: ARG001 - has to be there
    source = state_dir / "source"
    source.write_bytes(base_image())
    added = await ImageStore(state_dir / "images").add(source, "base")
    return added.digest


@pytest.fixture
def kernel(state_dir: Path) -> FakeKernel:
    return make_server(state_dir / "host")


@pytest.fixture
async def start_gpud(
    request: pytest.FixtureRequest,
    state_dir: Path,
    kernel: FakeKernel,
    clock: Clock,
    monotonic: Clock,
    libvirtd: LibvirtDaemon,  # noqa: ARG001 - they only have to be there
    image: str,  # noqa: ARG001
    short_pauses: None,  # noqa: ARG001
) -> AsyncIterator[StartGpud]:
    """Start a gpud; at the end nothing may be left that ought not to be, and it is stopped."""
    lives: list[Gpud] = []

    async def start(
        around: Callable[[StepsMapping], StepsMapping] = lambda it: it,
        *,
        server: FakeKernel = kernel,
        nvml: Nvml | None = None,
        **options: object,
    ) -> Gpud:
        gpud = Gpud(make_config(state_dir, **options), server, clock, monotonic, nvml)  # type: ignore[arg-type]
        lives.append(gpud)
        return await asyncio.wait_for(gpud.start(around), 5)

    yield start
    findings = []
    tidy = request.node.get_closest_marker("leaves_a_mess") is None
    for gpud in lives:
        if gpud.stopped:
            continue
        try:
            findings += await gpud.findings() if tidy and gpud.settled else []
        finally:
            await gpud.stop()
    assert findings == []


@pytest.fixture
async def gpud(start_gpud: StartGpud) -> Gpud:
    return await start_gpud()
