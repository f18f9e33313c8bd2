"""The hypervisor as the rest of gpud sees it: guests, their streams, and their network.

Only this room imports libvirt. Everything here is asynchronous, safe to repeat, and fails with a
:class:`~gpud.errors.GpudError`: HYPERVISOR_UNAVAILABLE (transient) while libvirt is away or does not
answer, another code for what libvirt answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal, TypeVar
from uuid import UUID
from weakref import WeakSet

import libvirt

from gpud.errors import Code
from gpud.hypervisor import domains, networks
from gpud.hypervisor.connection import Connection, EventCallback
from gpud.hypervisor.domains import Domain
from gpud.hypervisor.domainxml import CHANNEL_NAME
from gpud.hypervisor.networkxml import Lease, NetworkSpec
from gpud.hypervisor.stream import GuestStream
from gpud.model import PciAddress
from gpud.telemetry import Metrics

T = TypeVar("T")


class Hypervisor:
    """libvirt's daemon. :meth:`run` must be running for anything else to work."""

    def __init__(
        self,
        uri: str,
        call_timeout_s: float,
        threads: int,
        cpuinfo: Path = Path("/proc/cpuinfo"),
        metrics: Metrics | None = None,
    ) -> None:
        """Prepare; nothing is opened yet.

        Args:
            uri: libvirt connection URI, such as ``qemu:///system``.
            call_timeout_s: How long a caller waits for one call.
            threads: How many calls may be under way at once.
            cpuinfo: Where the host's CPU flags are read.
            metrics: Where calls are counted; None where nobody looks.
        """
        self._connection = Connection(uri, call_timeout_s, threads, metrics or Metrics())
        self._cpuinfo = cpuinfo
        self._streams: WeakSet[GuestStream] = WeakSet()
        self._connection.on_disconnect(self._end_streams)

    async def run(self) -> None:
        """Keep the connection to libvirt open until cancelled."""
        await self._connection.run()

    @property
    def available(self) -> bool:
        """Whether libvirt is connected and answers."""
        return self._connection.available

    @property
    def calls_in_thread(self) -> int:
        """How many calls have not returned; more than a few for long means a libvirt that hangs."""
        return self._connection.calls.in_thread

    async def wait_available(self) -> None:
        """Wait until libvirt is connected and answers."""
        await self._connection.wait_available()

    def on_connect(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after each connect: events were missed and streams have ended."""
        self._connection.on_connect(callback)

    def subscribe(self, callback: EventCallback) -> None:
        """Call ``callback(uuid, event, detail)`` on the event loop for each lifecycle event."""
        self._connection.subscribe(callback)

    async def start(self, uuid: UUID, xml: str, timeout_s: float | None = None) -> None:
        """Start the guest that ``xml`` describes; at once done when it runs already.

        Args:
            uuid: Its UUID.
            xml: The domain XML.
            timeout_s: How long it may take, where that is longer than for other calls.

        Raises:
            GpudError: GUEST_FAILED when it cannot start, or somebody else's domain is in its place.
        """
        act = partial(domains.start, uuid=uuid, xml=xml)
        what = f"start guest {uuid}"
        await self._connection.call("start", str(uuid), what, act, timeout_s=timeout_s)

    async def stop(self, uuid: UUID) -> None:
        """End the guest without asking it; on return its domain is gone.

        Raises:
            GpudError: GUEST_FAILED when it cannot be ended.
        """
        act = partial(domains.stop, uuid=uuid)
        await self._connection.call("stop", str(uuid), f"stop guest {uuid}", act)

    async def resume(self, uuid: UUID) -> None:
        """Let a paused guest go on; at once done when it runs or is gone.

        Raises:
            GpudError: GUEST_FAILED when it cannot be resumed.
        """
        act = partial(domains.resume, uuid=uuid)
        await self._connection.call("resume", str(uuid), f"resume guest {uuid}", act)

    async def find(self, uuid: UUID) -> Domain | None:
        """Look up a running guest; None when it does not run."""
        act = partial(domains.find, uuid=uuid)
        return await self._connection.call("find", str(uuid), f"look up guest {uuid}", act)

    async def domains(self) -> list[Domain]:
        """List every active domain of the host, other people's included."""
        return await self._connection.call("domains", "domains", "list domains", domains.active)

    async def passed_functions(self) -> dict[PciAddress, str]:
        """The PCI functions of the host that active domains have, each with its domain's name."""
        what = "list devices of domains"
        return await self._connection.call("passed_functions", "domains", what, domains.passed)

    async def console(self, uuid: UUID) -> GuestStream:
        """Open the guest's serial console, taking it over from whoever holds it."""
        act = partial(domains.open_console, uuid=uuid)
        return await self._stream("console", uuid, f"open the console of guest {uuid}", act)

    async def channel(self, uuid: UUID, target: str = CHANNEL_NAME) -> GuestStream:
        """Open the host's end of the guest's port ``target``, taking it over from whoever holds it."""
        act = partial(domains.open_channel, uuid=uuid, target=target)
        return await self._stream("channel", uuid, f"open channel {target} of guest {uuid}", act)

    async def kind(self) -> Literal["kvm", "qemu"]:
        """Choose the domain type for this host: ``kvm`` where CPU and libvirt have it."""
        cpuinfo = await asyncio.to_thread(self._cpuinfo.read_text)
        act = partial(domains.best_type, cpuinfo=cpuinfo)
        return await self._connection.call("kind", "kind", "read libvirt's capabilities", act)

    async def version(self) -> str:
        """Name the versions of libvirt and of the hypervisor under it."""
        return await self._connection.call(
            "version", "version", "ask for versions", domains.version
        )

    async def ensure_network(self, spec: NetworkSpec) -> None:
        """Make the guests' network if it does not exist, and start it if it does not run.

        Raises:
            GpudError: CONFIG_INVALID when a network of that name has another subnet.
        """
        act = partial(networks.ensure, spec=spec)
        await self._network_call("ensure_network", spec.name, f"start network {spec.name}", act)

    async def add_lease(self, network: str, mac: str, address: IPv4Address, name: str) -> None:
        """Give ``address`` to ``mac`` alone; an entry that has only one of the two gives way."""
        act = partial(networks.set_lease, name=network, lease=Lease(mac, address, name))
        what = f"give {address} to {mac} in network {network}"
        await self._network_call("add_lease", network, what, act)

    async def remove_lease(self, network: str, mac: str) -> None:
        """Take the address of ``mac`` back; nothing to do when it has none."""
        act = partial(networks.remove_lease, name=network, mac=mac)
        what = f"take back the address of {mac} in {network}"
        await self._network_call("remove_lease", network, what, act)

    async def leases(self, network: str) -> list[Lease]:
        """List the fixed addresses that the network gives out now."""
        act = partial(networks.leases, name=network)
        what = f"read the addresses of network {network}"
        return await self._network_call("leases", network, what, act)

    async def _network_call(
        self, name: str, network: str, what: str, act: Callable[[libvirt.virConnect], T]
    ) -> T:
        key = f"network {network}"
        return await self._connection.call(name, key, what, act, Code.HOST_COMMAND_FAILED)

    async def _stream(
        self,
        name: str,
        uuid: UUID,
        what: str,
        act: Callable[[libvirt.virConnect], libvirt.virStream],
    ) -> GuestStream:
        calls, loop = self._connection.calls, asyncio.get_running_loop()

        def open_stream(connection: libvirt.virConnect) -> tuple[libvirt.virConnect, GuestStream]:
            return connection, GuestStream(act(connection), calls, loop)

        connection, stream = await self._connection.call(name, str(uuid), what, open_stream)
        self._streams.add(stream)
        if not self._connection.is_current(connection):  # lost while the stream was opened
            stream.end()
        return stream

    def _end_streams(self) -> None:
        for stream in self._streams:
            stream.end()
