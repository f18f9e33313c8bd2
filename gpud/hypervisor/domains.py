"""What is done to domains, as blocking functions of one libvirt connection.

Each can be repeated: a start of a running guest and a stop of one that is gone are successes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal
from uuid import UUID
from xml.etree import ElementTree as ET

import libvirt

from gpud.errors import Code, GpudError
from gpud.hypervisor.domainxml import METADATA_NAMESPACE, Identity, identify
from gpud.hypervisor.faults import code_of
from gpud.hypervisor.passthroughxml import passed_functions
from gpud.model import PciAddress


class DomainState(StrEnum):
    """What a domain does now (libvirt's ``virDomainState``)."""

    UNKNOWN = "unknown"
    RUNNING = "running"
    BLOCKED = "blocked"
    PAUSED = "paused"
    SHUTTING_DOWN = "shutting_down"
    OFF = "off"
    CRASHED = "crashed"
    SUSPENDED = "suspended"


_STATES = {
    libvirt.VIR_DOMAIN_RUNNING: DomainState.RUNNING,
    libvirt.VIR_DOMAIN_BLOCKED: DomainState.BLOCKED,
    libvirt.VIR_DOMAIN_PAUSED: DomainState.PAUSED,
    libvirt.VIR_DOMAIN_SHUTDOWN: DomainState.SHUTTING_DOWN,
    libvirt.VIR_DOMAIN_SHUTOFF: DomainState.OFF,
    libvirt.VIR_DOMAIN_CRASHED: DomainState.CRASHED,
    libvirt.VIR_DOMAIN_PMSUSPENDED: DomainState.SUSPENDED,
}

_NOT_AS_SEEN = {libvirt.VIR_ERR_NO_DOMAIN, libvirt.VIR_ERR_OPERATION_INVALID}
"""It ended, or went on, by itself a moment ago."""

_PAUSED_BY_QEMU = (libvirt.VIR_DOMAIN_PAUSED, libvirt.VIR_DOMAIN_PAUSED_IOERROR)


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain as libvirt knows it.

    Attributes:
        uuid: Its UUID.
        name: Its name.
        state: What it does now.
        io_error: Whether QEMU paused it because its disk could not be written or read.
        passed: The host's PCI functions that it has.
        identity: Which gpud made it for which instance; None when none did.
    """

    uuid: UUID
    name: str
    state: DomainState
    identity: Identity | None
    io_error: bool = False
    passed: frozenset[PciAddress] = frozenset()


def start(connection: libvirt.virConnect, uuid: UUID, xml: str) -> None:
    """Start the transient domain that ``xml`` describes, unless it runs already.

    Raises:
        GpudError: A domain of that UUID runs which belongs to somebody else.
        libvirt.libvirtError: libvirt cannot start it.
    """
    running = find(connection, uuid)
    if running is None:
        connection.createXML(xml, 0)
    elif running.identity != identify(xml):
        raise GpudError(
            Code.GUEST_FAILED,
            f"cannot start guest {uuid}: domain {running.name} has that UUID and is not ours",
            hint=f"find out whose it is: virsh dumpxml {running.name}",
        )


def stop(connection: libvirt.virConnect, uuid: UUID) -> None:
    """End a domain at once, and see that it is gone.

    Raises:
        GpudError: It is still there.
        libvirt.libvirtError: libvirt cannot end it.
    """
    domain = _lookup(connection, uuid)
    if domain is None:
        return
    try:
        domain.destroy()
    except libvirt.libvirtError as error:
        if code_of(error) not in _NOT_AS_SEEN:
            raise
    if find(connection, uuid) is not None:
        raise GpudError(
            Code.GUEST_FAILED,
            f"guest {uuid} still runs after libvirt has destroyed it",
            hint="its QEMU process may hang in the kernel: look at dmesg",
            transient=True,
        )


def resume(connection: libvirt.virConnect, uuid: UUID) -> None:
    """Let a paused domain go on; one that is gone, or runs, is left as it is.

    Raises:
        libvirt.libvirtError: libvirt cannot resume it.
    """
    domain = _lookup(connection, uuid)
    if domain is None:
        return
    try:
        domain.resume()
    except libvirt.libvirtError as error:
        if code_of(error) not in _NOT_AS_SEEN:
            raise


def find(connection: libvirt.virConnect, uuid: UUID) -> Domain | None:
    """Look up an active domain; None when it does not run."""
    domain = _lookup(connection, uuid)
    return None if domain is None else _describe(domain)


def active(connection: libvirt.virConnect) -> list[Domain]:
    """List every active domain of the host, other people's included."""
    domains = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    described = (_describe(domain) for domain in domains)
    return [domain for domain in described if domain is not None]


def passed(connection: libvirt.virConnect) -> dict[PciAddress, str]:
    """List the PCI functions of the host that active domains have, each with its domain's name."""
    return {one: domain.name for domain in active(connection) for one in domain.passed}


def open_console(connection: libvirt.virConnect, uuid: UUID) -> libvirt.virStream:
    """Open a guest's serial console, taking it over from whoever holds it."""
    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    domain = connection.lookupByUUIDString(str(uuid))
    domain.openConsole(None, stream, libvirt.VIR_DOMAIN_CONSOLE_FORCE)
    return stream


def open_channel(connection: libvirt.virConnect, uuid: UUID, target: str) -> libvirt.virStream:
    """Open the host's end of a guest's virtio-serial port, taking it over from whoever holds it."""
    stream = connection.newStream(libvirt.VIR_STREAM_NONBLOCK)
    domain = connection.lookupByUUIDString(str(uuid))
    domain.openChannel(target, stream, libvirt.VIR_DOMAIN_CHANNEL_FORCE)
    return stream


def best_type(connection: libvirt.virConnect, cpuinfo: str) -> Literal["kvm", "qemu"]:
    """Choose ``kvm`` where both the host's CPU and libvirt have it, else ``qemu``.

    A ``/dev/kvm`` alone proves nothing: there are machines that have one and cannot run a guest.

    Args:
        connection: Where to ask for libvirt's capabilities.
        cpuinfo: Content of ``/proc/cpuinfo``.
    """
    flags = {
        flag
        for line in cpuinfo.splitlines()
        if line.startswith("flags")
        for flag in line.partition(":")[2].split()
    }
    if not flags & {"vmx", "svm"}:
        return "qemu"
    capabilities = ET.fromstring(connection.getCapabilities())  # noqa: S314 - libvirt wrote it
    kvm = capabilities.find("guest/arch[@name='x86_64']/domain[@type='kvm']")
    return "qemu" if kvm is None else "kvm"


def version(connection: libvirt.virConnect) -> str:
    """Name the versions of libvirt and of the hypervisor under it: ``libvirt 9.0.0, QEMU 7.2.22``."""
    daemon, hypervisor = connection.getLibVersion(), connection.getVersion()
    return f"libvirt {_dotted(daemon)}, {connection.getType()} {_dotted(hypervisor)}"


def _dotted(number: int) -> str:
    # https://libvirt.org/html/libvirt-libvirt-host.html#virConnectGetLibVersion
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"


def _lookup(connection: libvirt.virConnect, uuid: UUID) -> libvirt.virDomain | None:
    try:
        return connection.lookupByUUIDString(str(uuid))
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:
            return None
        raise


def _describe(domain: libvirt.virDomain) -> Domain | None:
    try:
        if not domain.isActive():
            return None
        state, reason = domain.state()
        return Domain(
            uuid=UUID(bytes=domain.UUID()),
            name=domain.name(),
            state=_STATES.get(state, DomainState.UNKNOWN),
            passed=frozenset(passed_functions(domain.XMLDesc())),
            identity=_identity(domain),
            io_error=(state, reason) == _PAUSED_BY_QEMU,
        )
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN:  # ended while we looked
            return None
        raise


def _identity(domain: libvirt.virDomain) -> Identity | None:
    try:
        return identify(domain.metadata(libvirt.VIR_DOMAIN_METADATA_ELEMENT, METADATA_NAMESPACE))
    except libvirt.libvirtError as error:
        if code_of(error) == libvirt.VIR_ERR_NO_DOMAIN_METADATA:
            return None
        raise
