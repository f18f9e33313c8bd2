"""What libvirt says of itself and of its host, over a connection of its own. Changes nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Final, Literal
from xml.etree import ElementTree as ET

import libvirt

from gpud.errors import Code, GpudError
from gpud.hypervisor import domains
from gpud.hypervisor.calls import Calls
from gpud.hypervisor.events import start_event_loop
from gpud.hypervisor.faults import translate, unavailable
from gpud.hypervisor.networkxml import subnet_of
from gpud.model import PciAddress

_MACHINE: Final = ("x86_64", "q35")
_IDS: Final = re.compile(r"\+(\d+):\+(\d+)")


@dataclass(frozen=True, slots=True)
class NetworkFound:
    """A virtual network that libvirt has.

    Attributes:
        subnet: None where it has no IPv4 addresses of its own.
        bridge: The host's device for it; empty where it has none.
    """

    active: bool
    subnet: IPv4Network | None
    bridge: str = ""


@dataclass(frozen=True, slots=True)
class Survey:
    """What libvirt says.

    Attributes:
        versions: Of libvirt and of the hypervisor under it, in words.
        major: libvirt's own version, its first number.
        best_type: What gpud would make its domains.
        qemu_ids: User and group that QEMU runs as; None where libvirt does not tell.
        firmwares: Kinds of firmware that it can give a guest by itself: ``efi``, ``bios``; None where it
            does not tell.
        networks: By name.
        passed: The PCI functions of the host that active domains have, each with its domain's name.
    """

    versions: str
    major: int
    best_type: Literal["kvm", "qemu"]
    qemu_ids: tuple[int, int] | None = None
    firmwares: frozenset[str] | None = None
    networks: Mapping[str, NetworkFound] = field(default_factory=dict)
    passed: Mapping[PciAddress, str] = field(default_factory=dict)


async def survey(uri: str, cpuinfo: str, limit_s: float) -> Survey:
    """Ask libvirt.

    Args:
        uri: Where it is.
        cpuinfo: Content of ``/proc/cpuinfo``.
        limit_s: How long it may take.

    Raises:
        GpudError: HYPERVISOR_UNAVAILABLE: it cannot be reached or asked, or does not answer in time.
    """
    try:
        return await Calls(1).run("survey", lambda: _ask(uri, cpuinfo), limit_s)
    except TimeoutError:
        raise unavailable(
            f"libvirt does not answer at {uri} within {limit_s:g} s", "restart libvirtd"
        ) from None


def _ask(uri: str, cpuinfo: str) -> Survey:
    start_event_loop()  # it also keeps libvirt from printing its errors
    try:
        connection = libvirt.open(uri)
        try:
            return _read(connection, cpuinfo)
        finally:
            connection.close()
    except libvirt.libvirtError as error:
        raise _told(error, uri) from error


def _told(error: libvirt.libvirtError, uri: str) -> GpudError:
    return translate(error, f"look at {uri}", Code.HYPERVISOR_UNAVAILABLE)


def _read(connection: libvirt.virConnect, cpuinfo: str) -> Survey:
    best_type = domains.best_type(connection, cpuinfo)
    return Survey(
        versions=domains.version(connection),
        major=connection.getLibVersion() // 1_000_000,
        best_type=best_type,
        qemu_ids=_qemu_ids(connection.getCapabilities(), best_type),
        firmwares=_firmwares(connection, best_type),
        networks={one.name(): _network(one) for one in connection.listAllNetworks()},
        passed=domains.passed(connection),
    )


def _qemu_ids(capabilities: str, domain_type: str) -> tuple[int, int] | None:
    """As the driver for file permissions says (https://libvirt.org/formatcaps.html, ``secmodel``)."""
    tree = ET.fromstring(capabilities)  # noqa: S314 - libvirt wrote it
    for model in tree.iterfind("host/secmodel"):
        label = model.findtext(f"baselabel[@type='{domain_type}']", "")
        if model.findtext("model") == "dac" and (found := _IDS.fullmatch(label)):
            return int(found[1]), int(found[2])
    return None


def _firmwares(connection: libvirt.virConnect, domain_type: str) -> frozenset[str] | None:
    """What libvirt finds descriptors of (https://libvirt.org/formatdomaincaps.html, ``firmware``)."""
    try:
        text = connection.getDomainCapabilities(None, *_MACHINE, domain_type)
    except libvirt.libvirtError:  # a driver without, or no QEMU for this kind of machine
        return None
    tree = ET.fromstring(text)  # noqa: S314 - likewise
    values = tree.iterfind("os/enum[@name='firmware']/value")
    return frozenset(value.text or "" for value in values)


def _network(network: libvirt.virNetwork) -> NetworkFound:
    xml = network.XMLDesc(0)
    bridge = ET.fromstring(xml).find("bridge")  # noqa: S314 - likewise
    name = "" if bridge is None else bridge.get("name", "")
    return NetworkFound(bool(network.isActive()), subnet_of(xml), name)
