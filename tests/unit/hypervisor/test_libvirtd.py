from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from ipaddress import IPv4Address, IPv4Network
from typing import Any
from uuid import UUID

import libvirt
import pytest

from gpud.errors import Code, GpudError
from gpud.hypervisor.domains import DomainState
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.hypervisor.networkxml import NetworkSpec

Running = Callable[..., AbstractAsyncContextManager[Hypervisor]]

GUEST = UUID("0d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f")
XML = f"""<domain type='test'><name>x</name><uuid>{GUEST}</uuid><memory>8192</memory>
<os><type>hvm</type></os></domain>"""


async def test_guest_is_started_found_and_stopped(running: Running) -> None:
    async with running() as hypervisor:
        await hypervisor.start(GUEST, XML)
        await hypervisor.start(GUEST, XML)
        found = await hypervisor.find(GUEST)
        assert found is not None
        assert found.state is DomainState.RUNNING
        assert await hypervisor.domains() == [found]
        await hypervisor.stop(GUEST)
        await hypervisor.stop(GUEST)
        assert await hypervisor.find(GUEST) is None


async def test_refused_start_names_guest_and_reason(running: Running) -> None:
    async with running() as hypervisor:
        with pytest.raises(GpudError, match=f"cannot start guest {GUEST}: .*os.*type") as caught:
            await hypervisor.start(GUEST, "<domain type='test'><name>x</name></domain>")
        assert caught.value.code is Code.GUEST_FAILED
        assert not caught.value.transient
        assert hypervisor.available


async def test_starts_of_one_guest_side_by_side_make_one_domain(running: Running) -> None:
    async with running() as hypervisor:
        await asyncio.gather(*(hypervisor.start(GUEST, XML) for _ in range(4)))
        assert len(await hypervisor.domains()) == 1


async def test_network_and_its_leases(running: Running) -> None:
    spec = NetworkSpec("gpud", "gpud", IPv4Network("10.77.0.0/24"))
    async with running() as hypervisor:
        await hypervisor.ensure_network(spec)
        await hypervisor.ensure_network(spec)
        assert await hypervisor.leases("gpud") == []
        assert await hypervisor.leases("absent") == []
        with pytest.raises(GpudError) as caught:
            await hypervisor.add_lease("absent", "52:00:00:00:00:01", IPv4Address("10.77.0.2"), "x")
        assert caught.value.code is Code.HOST_COMMAND_FAILED
        assert "restart" in caught.value.hint


async def test_lease_verbs_act_on_the_named_network(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The test driver cannot show a network's definition apart; test_networks covers what is done.
    acts: list[tuple[Any, ...]] = []
    base = "gpud.hypervisor.networks"
    monkeypatch.setattr(f"{base}.set_lease", lambda _c, name, lease: acts.append((name, lease)))
    monkeypatch.setattr(f"{base}.remove_lease", lambda _c, name, mac: acts.append((name, mac)))
    async with running() as hypervisor:
        await hypervisor.add_lease("gpud", "52:00:00:00:00:01", IPv4Address("10.77.0.10"), "i-1")
        await hypervisor.remove_lease("gpud", "52:00:00:00:00:01")
    assert [act[0] for act in acts] == ["gpud", "gpud"]
    assert acts[0][1].mac == acts[1][1] == "52:00:00:00:00:01"


async def test_kind_follows_the_cpu(running: Running) -> None:
    async with running(cpu_flags="fpu vme") as hypervisor:
        assert await hypervisor.kind() == "qemu"


async def test_version_names_daemon_and_hypervisor(running: Running) -> None:
    async with running() as hypervisor:
        assert (await hypervisor.version()).startswith("libvirt ")


class FakeStream:
    """The test driver opens no consoles; this records what was asked for."""

    def eventAddCallback(self, _events: int, callback: Any, _opaque: None) -> None:  # noqa: N802
        self.callback = callback

    def eventRemoveCallback(self) -> None:  # noqa: N802
        pass

    def recv(self, _size: int) -> bytes:
        return b""


class QuietDomain:
    """A domain whose console and channel open and then say nothing."""

    def openConsole(self, _device: None, _stream: FakeStream, _flags: int) -> None:  # noqa: N802
        pass


async def test_streams_end_with_the_connection(running: Running, opened: list[Any]) -> None:
    async with running() as hypervisor:
        opened[0].newStream = lambda _flags: FakeStream()
        opened[0].lookupByUUIDString = lambda _uuid: QuietDomain()
        console = await hypervisor.console(GUEST)
        reading = asyncio.create_task(console.read())
        await asyncio.sleep(0)
        assert not reading.done()
    assert await asyncio.wait_for(reading, 1) == b""


async def test_stream_opened_on_a_connection_lost_meanwhile_has_ended(
    running: Running, opened: list[Any], libvirt_error: Callable[..., Exception]
) -> None:
    def lost(*_arguments: object) -> None:
        raise libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC)

    begun, slow = threading.Event(), threading.Event()

    def open_slowly(_uuid: str) -> QuietDomain:
        begun.set()
        slow.wait(5)
        return QuietDomain()

    async with running() as hypervisor:
        opened[0].newStream = lambda _flags: FakeStream()
        opened[0].lookupByUUIDString = open_slowly
        opening = asyncio.create_task(hypervisor.console(GUEST))
        assert await asyncio.to_thread(begun.wait, 5)
        opened[0].getLibVersion = opened[0].listAllDomains = lost
        with pytest.raises(GpudError):
            await hypervisor.domains()
        async with asyncio.timeout(5):
            while len(opened) < 2:
                await asyncio.sleep(0.001)
        slow.set()
        assert await asyncio.wait_for((await opening).read(), 1) == b""


async def test_console_and_channel_are_taken_over_by_force(
    running: Running, opened: list[Any], faulty: Callable[..., Any]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def open_console(device: None, _stream: FakeStream, flags: int) -> None:
        asked.append((device, flags))

    def open_channel(name: str, _stream: FakeStream, flags: int) -> None:
        asked.append((name, flags))

    streams: list[FakeStream] = []

    def new_stream(flags: int) -> FakeStream:
        assert flags == libvirt.VIR_STREAM_NONBLOCK
        streams.append(FakeStream())
        return streams[-1]

    async with running() as hypervisor:
        opened[0].newStream = new_stream
        opened[0].lookupByUUIDString = lambda _uuid: faulty(
            None, openConsole=open_console, openChannel=open_channel
        )
        console = await hypervisor.console(GUEST)
        channel = await hypervisor.channel(GUEST)
        for stream in streams:
            stream.callback(stream, 1, None)
        assert await console.read() == b"" == await channel.read()
    assert asked == [
        (None, libvirt.VIR_DOMAIN_CONSOLE_FORCE),
        ("ai.gpu.gpud.0", libvirt.VIR_DOMAIN_CHANNEL_FORCE),
    ]


async def test_console_of_a_guest_that_is_gone_is_refused(running: Running) -> None:
    async with running() as hypervisor:
        with pytest.raises(GpudError, match="open the console of guest"):
            await hypervisor.console(GUEST)
