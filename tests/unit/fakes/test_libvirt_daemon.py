"""The in-memory libvirtd answers as libvirt's own test driver does, where both can be asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import libvirt
import pytest

from gpud.hypervisor.domainxml import METADATA_NAMESPACE
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon

KNOWN = "0d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f"
XML = f"""<domain type='test'><name>x</name><uuid>{KNOWN}</uuid><memory>8192</memory>
<metadata><m:instance xmlns:m='{METADATA_NAMESPACE}' owner='o'/></metadata>
<os><type>hvm</type></os></domain>"""
PLAIN = XML.replace("m:instance", "m:other").replace(METADATA_NAMESPACE, "urn:else")
NETWORK = """<network><name>n</name><forward mode='nat'/><bridge name='b'/>
<ip address='10.9.0.1' netmask='255.255.255.0'/></network>"""


def _silent(_context: None, _error: object) -> None:
    """Keep libvirt from printing what it raises."""


@pytest.fixture(params=["in memory", "libvirt's test driver"])
def connection(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    if request.param == "in memory":
        daemon = LibvirtDaemon()
        daemon.on_start = lambda _guest: None
        yield daemon.open("fake:///")
        return
    libvirt.registerErrorHandler(_silent, None)
    (tmp_path / "node.xml").write_text("<node/>")
    real = libvirt.open(f"test://{tmp_path}/node.xml")
    yield real
    real.close()


def code(act: Callable[[], object]) -> int:
    with pytest.raises(libvirt.libvirtError) as caught:
        act()
    found: int = caught.value.get_error_code()
    return found


def test_a_domain_lives_from_create_to_destroy(connection: Any) -> None:
    assert code(lambda: connection.lookupByUUIDString(KNOWN)) == libvirt.VIR_ERR_NO_DOMAIN
    created = connection.createXML(XML, 0)
    [listed] = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    for domain in (created, listed, connection.lookupByUUIDString(KNOWN)):
        assert (domain.name(), UUID(bytes=domain.UUID())) == ("x", UUID(KNOWN))
        assert domain.isActive() == 1
        assert domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING
    assert created.destroy() == 0
    assert connection.listAllDomains(0) == []
    assert code(lambda: connection.lookupByUUIDString(KNOWN)) == libvirt.VIR_ERR_NO_DOMAIN


def test_a_second_domain_of_that_uuid_or_name_is_refused(connection: Any) -> None:
    connection.createXML(XML, 0)
    assert code(lambda: connection.createXML(XML, 0)) == libvirt.VIR_ERR_OPERATION_INVALID
    same_name = XML.replace(KNOWN, KNOWN.replace("0d6a", "1d6a"))
    assert code(lambda: connection.createXML(same_name, 0)) == libvirt.VIR_ERR_OPERATION_FAILED


def test_an_ended_domain_cannot_be_destroyed_again(connection: Any) -> None:
    domain = connection.createXML(XML, 0)
    domain.destroy()
    gone = {libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_ERR_NO_DOMAIN}
    assert code(domain.destroy) in gone


def test_metadata_is_given_back_or_said_to_be_missing(connection: Any) -> None:
    kind = libvirt.VIR_DOMAIN_METADATA_ELEMENT
    domain = connection.createXML(XML, 0)
    assert "owner=" in domain.metadata(kind, METADATA_NAMESPACE)
    domain.destroy()
    domain = connection.createXML(PLAIN, 0)
    missing = code(lambda: domain.metadata(kind, METADATA_NAMESPACE))
    assert missing == libvirt.VIR_ERR_NO_DOMAIN_METADATA


def test_a_network_is_defined_and_then_started(connection: Any) -> None:
    assert code(lambda: connection.networkLookupByName("n")) == libvirt.VIR_ERR_NO_NETWORK
    network = connection.networkDefineXML(NETWORK)
    assert not network.isActive()
    network.create()
    found = connection.networkLookupByName("n")
    assert found.isActive()
    assert "10.9.0.1" in found.XMLDesc(0)


HOST = "<host mac='52:54:00:00:00:01' name='a' ip='10.9.0.2'/>"
SAME_ADDRESS = "<host mac='52:54:00:00:00:02' name='b' ip='10.9.0.2'/>"


@pytest.mark.parametrize("second", [HOST, SAME_ADDRESS])
def test_a_lease_is_given_once(connection: Any, second: str) -> None:
    network = connection.networkDefineXML(NETWORK)
    network.create()
    add = libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST
    delete = libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE
    hosts, live = libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST, libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
    network.update(add, hosts, -1, HOST, live)
    assert "52:54:00:00:00:01" in network.XMLDesc(0)
    again = code(lambda: network.update(add, hosts, -1, second, live))
    assert again == libvirt.VIR_ERR_OPERATION_INVALID
    network.update(delete, hosts, -1, HOST, live)
    assert "52:54:00:00:00:01" not in network.XMLDesc(0)
    missing = code(lambda: network.update(delete, hosts, -1, HOST, live))
    assert missing == libvirt.VIR_ERR_OPERATION_INVALID
