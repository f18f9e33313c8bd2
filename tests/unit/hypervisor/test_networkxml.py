from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from xml.etree import ElementTree as ET

import pytest

from gpud.hypervisor.networkxml import (
    Lease,
    NetworkSpec,
    leases_of,
    render,
    render_lease,
    subnet_of,
)

SPEC = NetworkSpec("gpud", "gpud", IPv4Network("10.77.0.0/24"))


def test_network_is_nat_with_guests_kept_apart() -> None:
    assert render(SPEC).splitlines() == [
        "<network>",
        "  <name>gpud</name>",
        "  <metadata>",
        '    <gpud:network xmlns:gpud="https://gpu.ai/xmlns/gpud/1" />',
        "  </metadata>",
        '  <forward mode="nat" />',
        '  <bridge name="gpud" stp="on" delay="0" />',
        '  <port isolated="yes" />',
        '  <ip address="10.77.0.1" netmask="255.255.255.0" />',
        "</network>",
    ]


@pytest.mark.parametrize(
    ("ip", "subnet"),
    [
        ("<ip address='10.1.2.1' netmask='255.255.255.240'/>", IPv4Network("10.1.2.0/28")),
        ("<ip address='10.1.2.9' prefix='24'/>", IPv4Network("10.1.2.0/24")),
        (
            "<ip family='ipv6' address='fd00::1' prefix='64'/><ip address='10.1.0.1' prefix='16'/>",
            IPv4Network("10.1.0.0/16"),
        ),
        ("", None),
    ],
)
def test_subnet_is_read_in_every_spelling(ip: str, subnet: IPv4Network | None) -> None:
    assert subnet_of(f"<network><name>x</name>{ip}</network>") == subnet


def test_own_network_is_read_back() -> None:
    assert subnet_of(render(SPEC)) == SPEC.subnet
    assert leases_of(render(SPEC)) == []


def test_leases_are_read_and_entries_of_other_kinds_passed_over() -> None:
    lease = Lease("52:00:00:00:00:01", IPv4Address("10.77.0.10"), "i-1")
    xml = (
        "<network><ip address='10.77.0.1' prefix='24'><dhcp>"
        f"{render_lease(lease)}<host mac='52:00:00:00:00:02' name='no-address'/>"
        "<host ip='10.77.0.3' name='no-mac'/><host mac='52:00:00:00:00:04' ip='10.77.0.4'/>"
        "</dhcp></ip><ip family='ipv6' address='fd00::1' prefix='64'><dhcp>"
        "<host id='0:1' ip='fd00::2'/></dhcp></ip></network>"
    )
    assert leases_of(xml) == [lease, Lease("52:00:00:00:00:04", IPv4Address("10.77.0.4"), "")]


def test_lease_names_mac_address_and_host() -> None:
    host = ET.fromstring(render_lease(Lease("52:00:00:00:00:01", IPv4Address("10.0.0.2"), "a&b")))  # noqa: S314
    assert host.attrib == {"mac": "52:00:00:00:00:01", "name": "a&b", "ip": "10.0.0.2"}
