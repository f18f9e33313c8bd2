"""libvirt's own test driver, private to each test, and faults that it cannot produce by itself."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import libvirt
import pytest

from gpud.hypervisor import connection as connection_module
from gpud.hypervisor.libvirtd import Hypervisor

libvirt.registerErrorHandler(lambda _context, _error: None, None)


class Faulty:
    """A real libvirt object of which single methods are replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.real = real
        vars(self).update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


@pytest.fixture
def faulty() -> Callable[..., Any]:
    """Make a libvirt object misbehave: ``faulty(connection, getLibVersion=hang)``."""
    return Faulty


@pytest.fixture
def libvirt_error() -> Callable[..., libvirt.libvirtError]:
    """Make an error as libvirt raises it."""

    def make(
        message: str, code: int, domain: int = libvirt.VIR_FROM_QEMU, int1: int = -1
    ) -> libvirt.libvirtError:
        error = libvirt.libvirtError(message)
        error.err = (code, domain, message, libvirt.VIR_ERR_ERROR, None, None, None, int1, -1)
        return error

    return make


@pytest.fixture
def test_uri(tmp_path: Path) -> str:
    """A test driver with nothing in it; every open of it starts afresh."""
    node = tmp_path / "node.xml"
    node.write_text("<node/>")
    return f"test://{node}"


@pytest.fixture
def plain_connection(test_uri: str) -> libvirt.virConnect:
    return libvirt.open(test_uri)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every connection that gpud opens in this test, each open to interference."""
    connections: list[Any] = []
    real_open = libvirt.open

    def open_faulty(uri: str) -> Any:
        connections.append(Faulty(real_open(uri)))
        return connections[-1]

    monkeypatch.setattr(libvirt, "open", open_faulty)
    monkeypatch.setattr(connection_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(connection_module, "LONGEST_PAUSE_S", 0.002)
    return connections


@pytest.fixture
def running(
    test_uri: str, tmp_path: Path
) -> Callable[..., contextlib.AbstractAsyncContextManager[Hypervisor]]:
    """Make a hypervisor on the test driver, connected for the length of a ``with`` block."""

    @contextlib.asynccontextmanager
    async def run(
        call_timeout_s: float = 5, cpu_flags: str = "fpu", *, connected: bool = True
    ) -> AsyncIterator[Hypervisor]:
        cpuinfo = tmp_path / "cpuinfo"
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {cpu_flags} sse2\nbugs\t\t: none\n")
        hypervisor = Hypervisor(test_uri, call_timeout_s, threads=2, cpuinfo=cpuinfo)
        task = asyncio.create_task(hypervisor.run())
        try:
            if connected:
                await asyncio.wait_for(hypervisor.wait_available(), 5)
            yield hypervisor
        finally:
            task.cancel()
            await asyncio.wait([task])

    return run
