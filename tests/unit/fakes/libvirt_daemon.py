"""An in-memory libvirtd: domains, networks, events, consoles and channels, and guests in it.

libvirt's own ``test:///`` driver takes no ``type='kvm'`` domain, has no streams and forgets all with
its connection, so it cannot play a daemon that outlives gpud. This one can; it takes the place of
``libvirt.open``, and everything of gpud runs on it unchanged. ``test_libvirt_daemon.py`` holds its
answers against the real test driver's.
"""
# ruff: noqa: N802 - libvirt's names

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4
from xml.etree import ElementTree as ET

import libvirt

from tests.unit.fakes.libvirt_network import Network, NetworkHandle

T = TypeVar("T")

CAPABILITIES = (
    "<capabilities><guest><arch name='x86_64'><domain type='{}'/></arch></guest></capabilities>"
)
_PATIENCE_S = 20


def error(
    message: str, code: int = libvirt.VIR_ERR_INTERNAL_ERROR, domain: int = libvirt.VIR_FROM_QEMU
) -> libvirt.libvirtError:
    """Make an error as libvirt raises it."""
    made = libvirt.libvirtError(message)
    made.err = (code, domain, message, libvirt.VIR_ERR_ERROR, None, None, None, -1, -1)
    return made


def lost() -> libvirt.libvirtError:
    """What every call on a broken connection raises."""
    return error("client socket is closed", domain=libvirt.VIR_FROM_RPC)


def api(method: Callable[..., T]) -> Callable[..., T]:
    """Make a method one that libvirt's daemon answers: counted, and open to faults."""

    @functools.wraps(method)
    def call(handle: Any, *arguments: Any) -> T:
        act = functools.partial(method, handle, *arguments)
        answer: T = handle.connection.daemon.answer(method.__name__, handle.connection, act)
        return answer

    return call


class Fault:
    """What goes wrong with calls of one name: an error, or silence until :meth:`release`."""

    def __init__(self, call: str, raises: Exception | None, *, times: int, after: bool) -> None:
        self.call = call
        self.raises = raises
        self.times = times
        self.after = after
        self.reached = threading.Event()
        self.released = threading.Event()

    def strike(self) -> None:
        self.reached.set()
        self.released.wait(_PATIENCE_S)
        if self.raises is not None:
            raise self.raises

    def release(self) -> None:
        self.released.set()


class Stream:
    """A virStream; delivers on whichever thread something arrives."""

    def __init__(self) -> None:
        self._queue: deque[bytes] = deque()
        self._callback: Callable[..., None] | None = None
        self.on_abort: Callable[[], None] = lambda: None

    def eventAddCallback(self, _events: int, callback: Any, _opaque: None) -> None:
        self._callback = callback
        self._deliver()

    def eventRemoveCallback(self) -> None:
        self._callback = None

    def recv(self, size: int) -> bytes | int:
        if not self._queue:
            return -2
        item = self._queue.popleft()
        if len(item) > size:
            self._queue.appendleft(item[size:])
        return item[:size]

    def abort(self) -> None:
        self.on_abort()

    def arrive(self, item: bytes) -> None:
        self._queue.append(item)
        self._deliver()

    def _deliver(self) -> None:
        while self._queue and self._callback is not None:
            self._callback(self, libvirt.VIR_STREAM_EVENT_READABLE, None)


class Port:
    """A guest's end of a console or channel; what nobody listens to waits."""

    def __init__(self) -> None:
        self._waiting: list[bytes] = []
        self.stream: Stream | None = None
        self.opened = 0

    def write(self, data: bytes) -> None:
        if self.stream is None:
            self._waiting.append(data)
        else:
            self.stream.arrive(data)

    def connect(self, stream: Stream) -> None:
        self.hang_up()
        self.stream = stream
        self.opened += 1
        stream.on_abort = functools.partial(self._leave, stream)
        waiting, self._waiting = self._waiting, []
        for data in waiting:
            stream.arrive(data)

    def hang_up(self) -> None:
        stream, self.stream = self.stream, None
        if stream is not None:
            stream.arrive(b"")

    def _leave(self, stream: Stream) -> None:
        if self.stream is stream:
            self.stream = None


class Guest:
    """A running domain, and the operating system in it."""

    def __init__(self, daemon: LibvirtDaemon, xml: str) -> None:
        self.xml = ET.fromstring(xml)  # noqa: S314 - a test wrote it
        self.name = self.xml.findtext("name", "")
        self.uuid = UUID(self.xml.findtext("uuid") or str(uuid4()))
        self.state = libvirt.VIR_DOMAIN_RUNNING
        self.reason = 0
        self.disk_full = False
        self.console = Port()
        self.channels = {
            target.get("name", ""): Port()
            for target in self.xml.iterfind("devices/channel/target[@type='virtio']")
        }
        self._daemon = daemon
        self._started = b""

    def make_nvram(self) -> None:
        """Give it a file for its firmware's variables, as libvirt does where there is none."""
        nvram = Path(self.xml.findtext("os/nvram") or "/nowhere/nvram.fd")
        if nvram.parent.is_dir():
            nvram.touch()

    def prints(self, output: bytes) -> None:
        self.console.write(output)

    def reports(self, data: bytes) -> None:
        for port in self.channels.values():
            port.write(data)

    def boots(self) -> str:
        """Boot with the startup script started; returns the boot id."""
        boot_id = str(uuid4())
        self._started = f"gpud1 started {boot_id}\n".encode()
        self.reports(self._started)
        return boot_id

    def listen(self, name: str, stream: Stream) -> None:
        """Connect to a channel. A guest says again and again that its script was started."""
        self.channels[name].connect(stream)
        if self._started:
            self.channels[name].write(self._started)

    def powers_off(self) -> None:
        self._daemon.remove(self.uuid, libvirt.VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN)
        self._daemon.tell()

    def cannot_write(self) -> None:
        """QEMU pauses it, until it can write again and somebody resumes it."""
        self.disk_full = True
        self.state = libvirt.VIR_DOMAIN_PAUSED
        self.reason = libvirt.VIR_DOMAIN_PAUSED_IOERROR

    def goes_on(self) -> None:
        if self.state != libvirt.VIR_DOMAIN_PAUSED:
            raise error("domain is already running", libvirt.VIR_ERR_OPERATION_INVALID)
        if not self.disk_full:
            self.state, self.reason = libvirt.VIR_DOMAIN_RUNNING, 0

    def unplug(self, function: str) -> None:
        """A passed-through function, such as ``0x01:0x00.0x0``, is pulled out."""
        devices = self.xml.find("devices")
        assert devices is not None
        for hostdev in devices.findall("hostdev"):
            address = hostdev.find("source/address")
            assert address is not None
            if function == "{bus}:{slot}.{function}".format(**address.attrib):
                devices.remove(hostdev)

    def hang_up(self) -> None:
        for port in self.ports():
            port.hang_up()

    def ports(self) -> list[Port]:
        return [self.console, *self.channels.values()]


class DomainHandle:
    """A virDomain."""

    def __init__(self, connection: ConnectionHandle, guest: Guest) -> None:
        self.connection = connection
        self._guest = guest

    def UUID(self) -> bytes:
        return self._guest.uuid.bytes

    def name(self) -> str:
        return self._guest.name

    @api
    def isActive(self) -> int:
        return int(self._guest.uuid in self.connection.daemon.guests)

    @api
    def state(self) -> list[int]:
        return [self._here().state, self._guest.reason]

    @api
    def resume(self) -> int:
        self._here().goes_on()
        return 0

    @api
    def XMLDesc(self) -> str:
        return ET.tostring(self._here().xml, encoding="unicode")

    @api
    def metadata(self, _kind: int, namespace: str) -> str:
        for element in self._here().xml.iterfind("metadata/*"):
            if element.tag.startswith(f"{{{namespace}}}"):
                return ET.tostring(element, encoding="unicode")
        raise error("metadata not found", libvirt.VIR_ERR_NO_DOMAIN_METADATA)

    @api
    def destroy(self) -> int:
        self._here()
        detail = libvirt.VIR_DOMAIN_EVENT_STOPPED_DESTROYED
        self.connection.daemon.remove(self._guest.uuid, detail)
        return 0

    @api
    def openConsole(self, _device: None, stream: Stream, _flags: int) -> int:
        self._here().console.connect(stream)
        return 0

    @api
    def openChannel(self, name: str, stream: Stream, _flags: int) -> int:
        self._here().listen(name, stream)
        return 0

    def _here(self) -> Guest:
        if self._guest.uuid not in self.connection.daemon.guests:
            raise error("domain is not running", libvirt.VIR_ERR_OPERATION_INVALID)
        return self._guest


class ConnectionHandle:
    """A virConnect."""

    def __init__(self, daemon: LibvirtDaemon) -> None:
        self.connection = self
        self.daemon = daemon
        self.open = True
        self.on_event: Callable[..., None] | None = None
        self.on_close: Callable[..., None] | None = None
        self._streams: list[Stream] = []

    def setKeepAlive(self, _interval: int, _count: int) -> int:
        return 0

    def registerCloseCallback(self, callback: Callable[..., None], _opaque: None) -> int:
        self.on_close = callback
        return 0

    def unregisterCloseCallback(self) -> int:
        self.on_close = None
        return 0

    @api
    def domainEventRegisterAny(
        self, _domain: None, _event: int, callback: Callable[..., None], _opaque: None
    ) -> int:
        self.on_event = callback
        return 1

    def domainEventDeregisterAny(self, _event_id: int) -> int:
        self.on_event = None
        return 0

    def close(self) -> int:
        self.open = False
        self.leave_streams()
        if self in self.daemon.connections:
            self.daemon.connections.remove(self)
        return 0

    @api
    def getLibVersion(self) -> int:
        return 9_000_000

    @api
    def getCapabilities(self) -> str:
        return CAPABILITIES.format(self.daemon.best_type)

    @api
    def createXML(self, xml: str, _flags: int) -> DomainHandle:
        guest = Guest(self.daemon, xml)
        if guest.uuid in self.daemon.guests:
            raise error("domain is already active", libvirt.VIR_ERR_OPERATION_INVALID)
        if guest.name in {other.name for other in self.daemon.guests.values()}:
            message = f"domain '{guest.name}' already exists with uuid x"
            raise error(message, libvirt.VIR_ERR_OPERATION_FAILED)
        guest.make_nvram()
        self.daemon.add(guest)
        return DomainHandle(self, guest)

    @api
    def lookupByUUIDString(self, uuid: str) -> DomainHandle:
        guest = self.daemon.guests.get(UUID(uuid))
        if guest is None:
            raise error("no domain with matching uuid", libvirt.VIR_ERR_NO_DOMAIN)
        return DomainHandle(self, guest)

    @api
    def listAllDomains(self, _flags: int) -> list[DomainHandle]:
        return [DomainHandle(self, guest) for guest in self.daemon.guests.values()]

    @api
    def newStream(self, flags: int) -> Stream:
        assert flags == libvirt.VIR_STREAM_NONBLOCK
        self._streams.append(Stream())
        return self._streams[-1]

    def leave_streams(self) -> None:
        for stream in self._streams:
            stream.on_abort()

    @api
    def networkLookupByName(self, name: str) -> NetworkHandle:
        if name not in self.daemon.networks:
            code, part = libvirt.VIR_ERR_NO_NETWORK, libvirt.VIR_FROM_NETWORK
            raise error(f"Network not found: no network '{name}'", code, part)
        return NetworkHandle(self, self.daemon.networks[name])

    @api
    def networkDefineXML(self, xml: str) -> NetworkHandle:
        network = Network(xml)
        self.daemon.networks[network.name] = network
        return NetworkHandle(self, network)


class LibvirtDaemon:
    """The daemon. Guests and networks outlive connections, and :meth:`stop`.

    Attributes:
        guests: What runs, by UUID.
        networks: What is defined, by name.
        calls: Names of all calls so far.
        on_start: What a guest does once it has been started.
    """

    def __init__(self) -> None:
        self.guests: dict[UUID, Guest] = {}
        self.networks: dict[str, Network] = {}
        self.connections: list[ConnectionHandle] = []
        self.calls: list[str] = []
        self.on_start: Callable[[Guest], object] = Guest.boots
        self.best_type = "kvm"
        self._up = True
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._news: deque[Callable[[], object]] = deque()

    def open(self, _uri: str) -> ConnectionHandle:
        """Stand in for ``libvirt.open``."""
        if not self._up:
            raise error("no socket", libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_FROM_RPC)
        connection = ConnectionHandle(self)
        self.connections.append(connection)
        return connection

    # -- what a test does to it ------------------------------------------------------------------

    def fault(
        self, call: str, raises: Exception | None = None, *, times: int = 1, after: bool = False
    ) -> Fault:
        """Let the next calls of one name fail; ``after`` the act means that only its answer is lost."""
        fault = Fault(call, raises or lost(), times=times, after=after)
        fault.release()
        self._faults.append(fault)
        return fault

    @contextmanager
    def hanging(self, call: str, *, after: bool = False) -> Iterator[Fault]:
        """Let calls of one name hang until the block's end."""
        fault = Fault(call, None, times=1_000_000, after=after)
        self._faults.append(fault)
        try:
            yield fault
        finally:
            if fault in self._faults:
                self._faults.remove(fault)
            fault.release()

    def heal(self) -> None:
        """Take back all faults."""
        self._faults.clear()

    def stop(self) -> None:
        """Kill the daemon. Guests run on; connections and their streams break."""
        with self._lock:
            self._up = False
            connections, self.connections = self.connections, []
            for connection in connections:
                connection.open = False
        for connection in connections:
            connection.leave_streams()  # of which libvirt tells no stream
            if connection.on_close is not None:
                connection.on_close(connection, 1, None)

    def start(self) -> None:
        """Start the daemon again."""
        self._up = True

    def begin(self, xml: str) -> Guest:
        """Let somebody start a domain."""
        guest = Guest(self, xml)
        self.add(guest)
        self.tell()
        return guest

    # -- what its parts use ----------------------------------------------------------------------

    def remove(self, uuid: UUID, detail: int) -> None:
        with self._lock:
            guest = self.guests.pop(uuid)
            self._news.append(guest.hang_up)
            self._announce(guest, libvirt.VIR_DOMAIN_EVENT_STOPPED, detail)

    def add(self, guest: Guest) -> None:
        with self._lock:
            self.guests[guest.uuid] = guest
            self._announce(guest, libvirt.VIR_DOMAIN_EVENT_STARTED, 0)
            self._news.append(functools.partial(self.on_start, guest))

    def tell(self) -> None:
        """Deliver what happened; never under the lock, as libvirt does not either."""
        while True:
            try:
                news = self._news.popleft()
            except IndexError:
                return
            news()

    def answer(self, call: str, connection: ConnectionHandle, act: Callable[[], T]) -> T:
        """Run one call."""
        self.calls.append(call)
        fault = self._next_fault(call)
        if fault is not None and not fault.after:
            fault.strike()
        try:
            with self._lock:
                if not connection.open:
                    raise lost()
                return act()
        finally:
            self.tell()
            if fault is not None and fault.after:
                fault.strike()

    def _next_fault(self, call: str) -> Fault | None:
        with self._lock:
            fault = next((one for one in self._faults if one.call == call), None)
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
            return fault

    def _announce(self, guest: Guest, event: int, detail: int) -> None:
        for connection in self.connections:
            if connection.on_event is not None:
                domain = DomainHandle(connection, guest)
                tell = functools.partial(connection.on_event, connection, domain)
                self._news.append(functools.partial(tell, event, detail, None))
