from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import libvirt
import pytest

from gpud.hypervisor.calls import Calls
from gpud.hypervisor.stream import CHUNK_BYTES, UNREAD_LIMIT_BYTES, GuestStream

READABLE = libvirt.VIR_STREAM_EVENT_READABLE


class FakeStream:
    """A libvirt stream; the test driver has none. ``arrive`` plays libvirt's event thread."""

    def __init__(self) -> None:
        self.queued: deque[Any] = deque()
        self.callback: Callable[..., None] | None = None
        self.aborted_in: threading.Thread | None = None

    def eventAddCallback(self, events: int, callback: Any, _opaque: None) -> None:  # noqa: N802
        assert events & READABLE
        assert events & libvirt.VIR_STREAM_EVENT_HANGUP
        self.callback = callback

    def eventRemoveCallback(self) -> None:  # noqa: N802
        self.callback = None

    def recv(self, size: int) -> bytes | int:
        if not self.queued:
            return -2
        item = self.queued.popleft()
        if isinstance(item, Exception):
            raise item
        assert len(item) <= size
        return bytes(item)

    def abort(self) -> None:
        self.aborted_in = threading.current_thread()

    def arrive(self, *items: bytes | Exception) -> None:
        self.queued.extend(items)
        thread = threading.Thread(target=self._deliver)
        thread.start()
        thread.join()

    def _deliver(self) -> None:
        while self.queued and self.callback is not None:
            self.callback(self, READABLE, None)


@pytest.fixture
def fake() -> FakeStream:
    return FakeStream()


@pytest.fixture
async def stream(fake: FakeStream) -> GuestStream:
    return GuestStream(fake, Calls(2), asyncio.get_running_loop())


async def test_bytes_arrive_in_order(stream: GuestStream, fake: FakeStream) -> None:
    fake.arrive(b"boot", b"ing\n")
    assert await stream.read() == b"booting\n"
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    fake.arrive(b"login:")
    assert await waiting == b"login:"


async def test_end_is_an_empty_read_for_ever(stream: GuestStream, fake: FakeStream) -> None:
    fake.arrive(b"last words", b"")
    assert await stream.read() == b"last words"
    assert await stream.read() == b""
    assert await stream.read() == b""
    assert fake.callback is None


async def test_lost_connection_ends_the_stream(stream: GuestStream, fake: FakeStream) -> None:
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    fake.arrive(libvirt.libvirtError("client socket is closed"))
    assert await waiting == b""
    assert fake.callback is None


async def test_stream_told_of_the_lost_connection_ends(
    stream: GuestStream, fake: FakeStream
) -> None:
    fake.arrive(b"last words")
    stream.end()
    assert await stream.read() == b"last words"
    assert await stream.read() == b""


async def test_event_without_data_changes_nothing(stream: GuestStream, fake: FakeStream) -> None:
    assert fake.callback is not None
    fake.callback(fake, READABLE, None)
    fake.arrive(b"x")
    assert await stream.read() == b"x"


async def test_one_read_gives_a_chunk_at_most(stream: GuestStream, fake: FakeStream) -> None:
    fake.arrive(b"a" * CHUNK_BYTES, b"b")
    assert await stream.read() == b"a" * CHUNK_BYTES
    assert await stream.read() == b"b"


async def test_flooding_guest_loses_its_oldest_bytes(stream: GuestStream, fake: FakeStream) -> None:
    chunks = 2 * UNREAD_LIMIT_BYTES // CHUNK_BYTES
    fake.arrive(*(bytes([number]) * CHUNK_BYTES for number in range(chunks)), b"")
    assert stream.dropped_bytes == UNREAD_LIMIT_BYTES
    kept = [await stream.read() for _ in range(chunks // 2)]
    assert [chunk[0] for chunk in kept] == list(range(chunks // 2, chunks))
    assert await stream.read() == b""


async def test_flood_wakes_the_event_loop_once(fake: FakeStream) -> None:
    class CountingLoop:
        wakes: list[Callable[[], None]] = []  # noqa: RUF012

        def call_soon_threadsafe(self, callback: Callable[[], None]) -> None:
            self.wakes.append(callback)

    loop: Any = CountingLoop()
    stream = GuestStream(fake, Calls(2), loop)
    fake.arrive(*[b"x"] * 100)
    assert len(loop.wakes) == 1
    loop.wakes[0]()
    assert await stream.read() == b"x" * 100
    fake.arrive(b"y")
    assert len(loop.wakes) == 2


async def test_close_ends_a_pending_read_and_aborts_in_a_thread(
    stream: GuestStream, fake: FakeStream
) -> None:
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    await stream.close()
    assert await waiting == b""
    assert fake.aborted_in not in {None, threading.current_thread()}
    assert fake.callback is None
    fake.aborted_in = None
    await stream.close()
    assert fake.aborted_in is None


async def test_close_on_a_broken_connection_is_quiet(stream: GuestStream, fake: FakeStream) -> None:
    # Also on one that has ended: libvirt knows neither its callback nor its stream any more.
    def fail() -> None:
        raise libvirt.libvirtError("client socket is closed")

    fake.abort = fake.eventRemoveCallback = fail  # type: ignore[method-assign]
    await stream.close()
    assert await stream.read() == b""


def test_bytes_for_a_closed_event_loop_are_let_go(fake: FakeStream) -> None:
    async def make() -> GuestStream:
        return GuestStream(fake, Calls(2), asyncio.get_running_loop())

    stream = asyncio.run(make())
    fake.arrive(b"nobody listens")
    assert stream.dropped_bytes == 0
