"""A guest's console or channel as an asynchronous stream of bytes.

libvirt's client takes in whatever the daemon sends and queues it without limit until it is read
(measured with libvirt 9.0: a guest writing to its serial port put 190 kB/s into this process). Leaving
bytes unread therefore does not slow the guest down; it only moves the heap into libvirt. So everything
is read at once, on libvirt's event thread, and *our* buffer has the limit: the oldest bytes give way.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Final

import libvirt

from gpud.hypervisor.calls import Calls

CHUNK_BYTES: Final = 64 * 1024
UNREAD_LIMIT_BYTES: Final = 256 * 1024
_CLOSE_TIMEOUT_S = 5
_NOTHING_YET = -2


class GuestStream:
    """One open console or channel."""

    def __init__(
        self, stream: libvirt.virStream, calls: Calls, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Take over ``stream``, non-blocking and connected to its source. Any thread may do this."""
        self.dropped_bytes = 0
        self._stream = stream
        self._calls = calls
        self._loop = loop
        self._lock = threading.Lock()
        self._unread = bytearray()
        self._ended = False
        self._closed = False
        self._waking = False
        self._arrived = asyncio.Event()
        stream.eventAddCallback(
            libvirt.VIR_STREAM_EVENT_READABLE
            | libvirt.VIR_STREAM_EVENT_ERROR
            | libvirt.VIR_STREAM_EVENT_HANGUP,
            self._on_event,
            None,
        )

    async def read(self) -> bytes:
        """Give the next bytes, at most :data:`CHUNK_BYTES`; ``b""`` once the stream has ended.

        It ends with the guest and with the connection. When somebody else opens the same console, it
        gets no more bytes, and ends unless libvirt was just sending some (libvirt 9.0 then forgets to
        say so: 3 of 60 take-overs from a guest that wrote without pause). A stream that has ended is
        still to be closed.
        """
        while True:
            with self._lock:
                data = bytes(self._unread[:CHUNK_BYTES])
                del self._unread[:CHUNK_BYTES]
                ended = self._ended
                self._arrived.clear()
            if data or ended:
                return data
            await self._arrived.wait()

    def end(self) -> None:
        """Let no more bytes come: the connection is lost, of which libvirt tells no stream."""
        with self._lock:
            self._ended = True
        self._arrived.set()

    async def close(self) -> None:
        """Let go of the console or channel; a pending :meth:`read` ends. May be called twice."""
        self.end()
        already_closed, self._closed = self._closed, True
        if not already_closed:
            with contextlib.suppress(TimeoutError):
                await self._calls.run(f"stream {id(self)}", self._dismiss, _CLOSE_TIMEOUT_S)

    def _dismiss(self) -> None:
        # Neither is left to do on a stream that has ended, and libvirt says so.
        with contextlib.suppress(libvirt.libvirtError):
            self._stream.eventRemoveCallback()
        with contextlib.suppress(libvirt.libvirtError):
            self._stream.abort()

    def _on_event(self, stream: libvirt.virStream, _events: int, _opaque: None) -> None:
        """Read what has come. Runs on libvirt's event thread; ``recv`` only empties a local queue."""
        try:
            data: bytes | int = stream.recv(CHUNK_BYTES)
        except libvirt.libvirtError:
            data = b""  # aborted, or the connection is lost
        if data == _NOTHING_YET:
            return
        if not data:
            stream.eventRemoveCallback()
        self._take(bytes(data))

    def _take(self, data: bytes) -> None:
        with self._lock:
            self._unread += data
            self._ended |= not data
            excess = max(0, len(self._unread) - UNREAD_LIMIT_BYTES)
            del self._unread[:excess]
            self.dropped_bytes += excess
            # One wake-up at a time, or a flood would queue millions of them on a busy loop.
            wake, self._waking = not self._waking, True
        if wake:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        with self._lock:
            self._waking = False
        self._arrived.set()
