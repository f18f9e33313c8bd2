from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any
from uuid import UUID

import libvirt
import pytest

from gpud.errors import Code, GpudError
from gpud.hypervisor import connection as connection_module
from gpud.hypervisor.connection import _pause_s
from gpud.hypervisor.events import DomainEvent
from gpud.hypervisor.libvirtd import Hypervisor

Running = Callable[..., AbstractAsyncContextManager[Hypervisor]]
MakeError = Callable[..., libvirt.libvirtError]

NAME_UUID = UUID("0d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f")
XML = f"""<domain type='test'><name>x</name><uuid>{NAME_UUID}</uuid><memory>8192</memory>
<os><type>hvm</type></os></domain>"""


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def hang() -> AsyncIterator[Callable[..., int]]:
    """A libvirt call that does not return before the test ends."""
    released = threading.Event()

    def wait(*_arguments: object) -> int:
        released.wait(10)
        return 9_000_000

    yield wait
    released.set()


async def test_unavailable_before_the_first_connect(test_uri: str) -> None:
    hypervisor = Hypervisor(test_uri, 1, threads=2)
    assert not hypervisor.available
    with pytest.raises(GpudError, match="not connected, cannot list domains") as caught:
        await hypervisor.domains()
    assert caught.value.code is Code.HYPERVISOR_UNAVAILABLE
    assert caught.value.transient


async def test_available_while_running_and_not_after(running: Running) -> None:
    async with running() as hypervisor:
        available_inside = hypervisor.available
        assert await hypervisor.domains() == []
    assert (available_inside, hypervisor.available) == (True, False)
    assert hypervisor.calls_in_thread == 0


async def test_connects_as_soon_as_libvirt_is_there(
    running: Running, opened: list[Any], monkeypatch: pytest.MonkeyPatch, libvirt_error: MakeError
) -> None:
    open_it, failures = libvirt.open, [1, 2, 3]

    def refuse_at_first(uri: str) -> Any:
        if failures:
            failures.pop()
            raise libvirt_error("no socket", libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_FROM_RPC)
        return open_it(uri)

    monkeypatch.setattr(libvirt, "open", refuse_at_first)
    async with running() as hypervisor:
        assert hypervisor.available
    assert len(opened) == 1


async def test_lost_connection_is_opened_again_and_listeners_are_told(
    running: Running, opened: list[Any], libvirt_error: MakeError
) -> None:
    connects: list[int] = []

    def lost(*_arguments: object) -> None:
        raise libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC)

    async with running() as hypervisor:
        hypervisor.on_connect(lambda: connects.append(len(opened)))
        opened[0].getLibVersion = opened[0].listAllDomains = lost
        with pytest.raises(GpudError, match="client socket is closed") as caught:
            await hypervisor.domains()
        assert caught.value.code is Code.HYPERVISOR_UNAVAILABLE
        await until(lambda: connects)
        assert await hypervisor.domains() == []
    assert connects == [2]


@pytest.fixture
def close_callbacks(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What gpud wants called when a connection closes; the test driver's never do."""
    registered: list[Any] = []
    open_it = libvirt.open

    def open_closing(uri: str) -> Any:
        connection = open_it(uri)
        connection.setKeepAlive = lambda _interval, _count: 0
        connection.registerCloseCallback = lambda callback, _opaque: registered.append(callback)
        return connection

    monkeypatch.setattr(libvirt, "open", open_closing)
    assert opened == []
    return registered


async def test_closed_connection_is_noticed_without_a_call(
    running: Running, opened: list[Any], close_callbacks: list[Any], libvirt_error: MakeError
) -> None:
    def lost() -> None:
        raise libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC)

    async with running():
        opened[0].getLibVersion = lost
        await asyncio.to_thread(close_callbacks[0], opened[0], 1, None)
        await until(lambda: len(opened) == 2)


def test_news_for_a_closed_event_loop_is_let_go(
    running: Running, close_callbacks: list[Any]
) -> None:
    async def run() -> None:
        async with running():
            pass

    asyncio.run(run())
    close_callbacks[0](None, 1, None)


async def test_libvirt_that_does_not_answer_is_unavailable_until_it_does(
    running: Running, opened: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "PROBE_PERIOD_S", 0.005)
    answering = threading.Event()

    def wedged() -> int:
        answering.wait(10)
        return 9_000_000

    async with running(call_timeout_s=0.02) as hypervisor:
        opened[0].getLibVersion = wedged
        await until(lambda: not hypervisor.available)
        answering.set()
        await asyncio.wait_for(hypervisor.wait_available(), 5)
    assert len(opened) == 1


async def test_one_hung_guest_leaves_the_rest_available(
    running: Running, opened: list[Any], hang: Callable[..., int]
) -> None:
    async with running(call_timeout_s=0.05) as hypervisor:
        opened[0].createXML = hang
        with pytest.raises(
            GpudError, match=r"not finished within 0\.05 s to start guest"
        ) as caught:
            await hypervisor.start(NAME_UUID, XML)
        assert caught.value.code is Code.HYPERVISOR_UNAVAILABLE
        assert caught.value.transient
        assert await hypervisor.domains() == []
        assert hypervisor.available
        with pytest.raises(GpudError, match="to stop guest"):
            await hypervisor.stop(NAME_UUID)
        assert hypervisor.calls_in_thread == 1


async def test_calls_are_counted_by_name_and_outcome(
    running: Running, opened: list[Any], hang: Callable[..., int]
) -> None:
    async with running(call_timeout_s=0.5) as hypervisor:
        await hypervisor.domains()
        with pytest.raises(GpudError):
            await hypervisor.start(NAME_UUID, "<domain/>")
        opened[0].createXML = hang
        with pytest.raises(GpudError):
            await hypervisor.start(NAME_UUID, XML)
    with pytest.raises(GpudError):
        await hypervisor.domains()
    page = hypervisor._connection._metrics.registry
    counted = {
        (sample.labels["call"], sample.labels["outcome"]): sample.value
        for family in page.collect()
        for sample in family.samples
        if sample.name == "gpud_libvirt_calls_total"
    }
    assert counted == {
        ("domains", "ok"): 1,
        ("domains", "unavailable"): 1,
        ("start", "failed"): 1,
        ("start", "timeout"): 1,
    }
    assert page.get_sample_value("gpud_libvirt_call_seconds_count", {"call": "start"}) == 2


async def test_lifecycle_events_reach_every_listener_on_the_event_loop(running: Running) -> None:
    seen: list[tuple[UUID, DomainEvent, str]] = []
    threads: set[threading.Thread] = set()

    def broken(*_event: object) -> None:
        threads.add(threading.current_thread())
        raise ValueError("listener's own fault")

    async with running() as hypervisor:
        hypervisor.subscribe(broken)
        hypervisor.subscribe(lambda *event: seen.append(event))
        await hypervisor.start(NAME_UUID, XML)
        await hypervisor.stop(NAME_UUID)
        await until(lambda: len(seen) == 2)
    assert [event[:2] for event in seen] == [
        (NAME_UUID, DomainEvent.STARTED),
        (NAME_UUID, DomainEvent.STOPPED),
    ]
    assert seen[1][2] == "destroyed"
    assert threads == {threading.current_thread()}


async def test_ending_does_not_wait_for_a_libvirt_that_hangs(
    running: Running, opened: list[Any], hang: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "_GOODBYE_S", 0.01)
    async with asyncio.timeout(1):
        async with running():
            opened[0].domainEventDeregisterAny = hang


async def test_connection_is_closed_whatever_deregistering_says(
    running: Running, opened: list[Any], libvirt_error: MakeError
) -> None:
    closed = threading.Event()

    def fail(*_arguments: object) -> None:
        raise libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC)

    def close() -> None:
        closed.set()
        fail()

    async with running():
        opened[0].domainEventDeregisterAny = opened[0].unregisterCloseCallback = fail
        opened[0].close = close
    assert closed.is_set()


def test_pauses_double_up_to_half_a_minute_and_are_spread() -> None:
    for failures, longest in ((0, 1), (1, 2), (3, 8), (5, 30), (5000, 30)):
        pauses = [_pause_s(failures) for _ in range(50)]
        assert longest / 2 <= min(pauses) < max(pauses) <= longest
