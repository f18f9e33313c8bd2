"""The guests' network as libvirt network XML. Pure.

Vocabulary: https://libvirt.org/formatnetwork.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network
from typing import Final
from xml.etree import ElementTree as ET

from gpud.hypervisor.domainxml import METADATA_NAMESPACE

_LEASE_MINUTES: Final = 2
"""dnsmasq withholds an address while a former guest's lease of it lasts: as short as it allows."""


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """A virtual network behind the host's NAT.

    Attributes:
        name: Its name in libvirt.
        bridge: The host's bridge device for it, at most 15 characters.
        subnet: Its addresses; the first is the host's own: gateway and name server.
    """

    name: str
    bridge: str
    subnet: IPv4Network


@dataclass(frozen=True, slots=True)
class Lease:
    """One guest's fixed address.

    Attributes:
        mac: The guest's MAC address.
        address: The address that belongs to it.
        name: The host name that DHCP and DNS give it.
    """

    mac: str
    address: IPv4Address
    name: str


def render(spec: NetworkSpec) -> str:
    """Give the network XML of ``spec``, indented, ready for ``virNetworkDefineXML``."""
    network = ET.Element("network")
    ET.SubElement(network, "name").text = spec.name
    # By this the package knows what it may take away when it is purged.
    metadata = ET.SubElement(network, "metadata")
    ET.SubElement(metadata, "gpud:network", {"xmlns:gpud": METADATA_NAMESPACE})
    ET.SubElement(network, "forward", mode="nat")
    ET.SubElement(network, "bridge", name=spec.bridge, stp="on", delay="0")
    # Guests do not see each other's frames. This says nothing about guest and host.
    ET.SubElement(network, "port", isolated="yes")
    gateway = str(next(spec.subnet.hosts()))
    ET.SubElement(network, "ip", address=gateway, netmask=str(spec.subnet.netmask))
    ET.indent(network)
    return ET.tostring(network, encoding="unicode") + "\n"


def subnet_of(xml: str) -> IPv4Network | None:
    """Read a network's IPv4 subnet; None when it has none."""
    for ip in _ipv4_parts(xml):
        mask = ip.get("prefix") or ip.get("netmask")
        return IPv4Network(f"{ip.get('address')}/{mask}", strict=False)
    return None


def leases_of(xml: str) -> list[Lease]:
    """Read the fixed addresses of a network."""
    return [
        Lease(host.attrib["mac"], IPv4Address(host.attrib["ip"]), host.get("name", ""))
        for ip in _ipv4_parts(xml)
        for host in ip.iterfind("dhcp/host[@mac][@ip]")
    ]


def render_lease(lease: Lease) -> str:
    """Give the ``<host>`` element with which libvirt adds or removes ``lease``."""
    host = ET.Element("host", mac=lease.mac, name=lease.name, ip=str(lease.address))
    ET.SubElement(host, "lease", expiry=str(_LEASE_MINUTES), unit="minutes")
    return ET.tostring(host, encoding="unicode")


def _ipv4_parts(xml: str) -> list[ET.Element]:
    network = ET.fromstring(xml)  # noqa: S314 - libvirt wrote it
    return [ip for ip in network.iterfind("ip") if ip.get("family", "ipv4") == "ipv4"]
