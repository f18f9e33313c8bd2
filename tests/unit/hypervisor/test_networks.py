from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import libvirt
import pytest

from gpud.errors import Code, GpudError
from gpud.hypervisor import networks
from gpud.hypervisor.networkxml import Lease, NetworkSpec, leases_of

SPEC = NetworkSpec("gpud", "gpud", IPv4Network("10.77.0.0/24"))
ONE = Lease("52:00:00:00:00:01", IPv4Address("10.77.0.10"), "i-1")
TWO = Lease("52:00:00:00:00:02", IPv4Address("10.77.0.11"), "i-2")

Faulty = Callable[..., Any]
MakeError = Callable[..., libvirt.libvirtError]


@pytest.fixture
def connection(plain_connection: libvirt.virConnect) -> libvirt.virConnect:
    networks.ensure(plain_connection, SPEC)
    return plain_connection


class TwoSided:
    """A network whose definition is kept apart from its running state.

    The test driver has one description for both. So a second test network, never started, plays the
    definition of the first, and libvirt judges every change to either.
    """

    def __init__(self, connection: libvirt.virConnect) -> None:
        self.running = connection.networkLookupByName("gpud")
        self.definition = connection.networkDefineXML(
            "<network><name>kept</name><bridge name='kept'/>"
            "<ip address='10.77.0.1' prefix='24'/></network>"
        )
        self.isActive = self.running.isActive

    def XMLDesc(self, flags: int) -> str:  # noqa: N802
        inactive = flags & libvirt.VIR_NETWORK_XML_INACTIVE
        return str((self.definition if inactive else self.running).XMLDesc(0))

    def update(self, command: int, section: int, parent: int, xml: str, flags: int) -> None:
        if flags & libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG:
            self.definition.update(command, section, parent, xml, flags)
        if flags & libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE:
            self.running.update(command, section, parent, xml, flags)

    def leases(self) -> tuple[list[Lease], list[Lease]]:
        return leases_of(self.running.XMLDesc(0)), leases_of(self.definition.XMLDesc(0))


@pytest.fixture
def network(connection: libvirt.virConnect) -> TwoSided:
    return TwoSided(connection)


@pytest.fixture
def leasing(connection: libvirt.virConnect, network: TwoSided, faulty: Faulty) -> Any:
    return faulty(connection, networkLookupByName=lambda _name: network)


def test_network_is_made_started_and_kept_for_the_next_boot(connection: libvirt.virConnect) -> None:
    network = connection.networkLookupByName("gpud")
    assert (network.isActive(), network.isPersistent(), network.autostart()) == (1, 1, 1)
    assert network.bridgeName() == "gpud"


def test_existing_network_is_left_as_it_is(connection: libvirt.virConnect) -> None:
    network = connection.networkLookupByName("gpud")
    network.setAutostart(False)
    before = network.XMLDesc(0)
    networks.ensure(connection, replace(SPEC, bridge="other"))
    assert network.XMLDesc(0) == before
    assert not network.autostart()


def test_stopped_network_is_started_again(connection: libvirt.virConnect) -> None:
    network = connection.networkLookupByName("gpud")
    network.destroy()
    networks.ensure(connection, SPEC)
    assert network.isActive()


def test_network_with_another_subnet_is_refused(connection: libvirt.virConnect) -> None:
    with pytest.raises(
        GpudError, match=r"10\.77\.0\.0/24, but network\.subnet is 10\.9\.0\.0"
    ) as e:
        networks.ensure(connection, replace(SPEC, subnet=IPv4Network("10.9.0.0/24")))
    assert e.value.code is Code.CONFIG_INVALID


def test_network_that_cannot_start_is_not_left_behind(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    def fail() -> None:
        raise libvirt_error("bridge 'gpud' is in use", libvirt.VIR_ERR_INTERNAL_ERROR)

    connection = faulty(
        plain_connection,
        networkDefineXML=lambda xml: faulty(plain_connection.networkDefineXML(xml), create=fail),
    )
    with pytest.raises(libvirt.libvirtError, match="in use"):
        networks.ensure(connection, SPEC)
    assert plain_connection.listAllNetworks() == []


def test_network_that_runs_but_cannot_be_kept_stays(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    def fail(_on: bool) -> None:
        raise libvirt_error("read-only file system", libvirt.VIR_ERR_SYSTEM_ERROR)

    connection = faulty(
        plain_connection,
        networkDefineXML=lambda xml: faulty(
            plain_connection.networkDefineXML(xml), setAutostart=fail
        ),
    )
    with pytest.raises(libvirt.libvirtError, match="read-only"):
        networks.ensure(connection, SPEC)
    assert plain_connection.networkLookupByName("gpud").isActive()


def test_failing_lookup_is_not_taken_for_absence(
    plain_connection: libvirt.virConnect, faulty: Faulty, libvirt_error: MakeError
) -> None:
    def fail(_name: str) -> None:
        raise libvirt_error("client socket is closed", 1, libvirt.VIR_FROM_RPC)

    with pytest.raises(libvirt.libvirtError, match="closed"):
        networks.ensure(faulty(plain_connection, networkLookupByName=fail), SPEC)


def test_lease_is_added_to_the_running_network_and_its_definition(
    leasing: Any, network: TwoSided
) -> None:
    networks.set_lease(leasing, "gpud", ONE)
    networks.set_lease(leasing, "gpud", ONE)
    networks.set_lease(leasing, "gpud", TWO)
    assert network.leases() == ([ONE, TWO], [ONE, TWO])
    assert networks.leases(leasing, "gpud") == [ONE, TWO]


@pytest.mark.parametrize(
    "newer",
    [
        Lease(ONE.mac, IPv4Address("10.77.0.99"), ONE.name),
        Lease("52:00:00:00:00:99", ONE.address, "i-99"),
        Lease(ONE.mac, ONE.address, "renamed"),
    ],
    ids=["same mac", "same address", "same both, other name"],
)
def test_left_over_lease_gives_way(leasing: Any, network: TwoSided, newer: Lease) -> None:
    for lease in (ONE, TWO, newer):
        networks.set_lease(leasing, "gpud", lease)
    assert network.leases() == ([TWO, newer], [TWO, newer])


def test_lease_missing_in_one_place_only_is_added_there(leasing: Any, network: TwoSided) -> None:
    networks.set_lease(leasing, "gpud", ONE)
    network.running.destroy()
    networks.set_lease(leasing, "gpud", TWO)
    network.running.create()
    assert network.leases() == ([ONE], [ONE, TWO])
    networks.set_lease(leasing, "gpud", TWO)
    assert network.leases() == ([ONE, TWO], [ONE, TWO])


def test_lease_is_removed_and_removing_it_again_is_fine(leasing: Any, network: TwoSided) -> None:
    networks.set_lease(leasing, "gpud", ONE)
    networks.set_lease(leasing, "gpud", TWO)
    networks.remove_lease(leasing, "gpud", ONE.mac)
    networks.remove_lease(leasing, "gpud", ONE.mac)
    assert network.leases() == ([TWO], [TWO])
