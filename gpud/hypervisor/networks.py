"""What is done to the guests' network, as blocking functions of one libvirt connection.

Each can be repeated: what is already as asked for is left alone.
"""

from __future__ import annotations

import libvirt

from gpud.errors import Code, GpudError
from gpud.hypervisor.faults import code_of
from gpud.hypervisor.networkxml import (
    Lease,
    NetworkSpec,
    leases_of,
    render,
    render_lease,
    subnet_of,
)


def ensure(connection: libvirt.virConnect, spec: NetworkSpec) -> None:
    """Make the network if it does not exist, and start it if it does not run.

    Raises:
        GpudError: A network of that name has another subnet.
        libvirt.libvirtError: libvirt cannot make or start it.
    """
    network = _find(connection, spec.name)
    if network is None:
        _make(connection, spec)
        return
    _require_subnet(network, spec)
    if not network.isActive():
        network.create()


def set_lease(connection: libvirt.virConnect, name: str, lease: Lease) -> None:
    """Give ``lease.address`` to ``lease.mac``, in the running network and for its next start.

    An entry that has either of the two but not both is a left-over, and gives way.
    """
    network = connection.networkLookupByName(name)
    for place, leases in _places(network):
        for other in leases:
            if other != lease and (other.mac == lease.mac or other.address == lease.address):
                _update(network, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, other, place)
        if lease not in leases:
            _update(network, libvirt.VIR_NETWORK_UPDATE_COMMAND_ADD_LAST, lease, place)


def remove_lease(connection: libvirt.virConnect, name: str, mac: str) -> None:
    """Take the address of ``mac`` back, from the running network and from its next start.

    A network that does not exist gives out no address: there is nothing to take back.
    """
    network = _find(connection, name)
    if network is None:
        return
    for place, leases in _places(network):
        for lease in leases:
            if lease.mac == mac:
                _update(network, libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE, lease, place)


def leases(connection: libvirt.virConnect, name: str) -> list[Lease]:
    """List the fixed addresses that the network gives out now; one that does not exist gives none."""
    network = _find(connection, name)
    return [] if network is None else leases_of(network.XMLDesc(0))


def _find(connection: libvirt.virConnect, name: str) -> libvirt.virNetwork | None:
    try:
        return connection.networkLookupByName(name)
    except libvirt.libvirtError as error:
        if code_of(error) != libvirt.VIR_ERR_NO_NETWORK:
            raise
        return None


def _make(connection: libvirt.virConnect, spec: NetworkSpec) -> None:
    network = connection.networkDefineXML(render(spec))
    try:
        network.create()
        network.setAutostart(True)
    except libvirt.libvirtError:
        # Left behind, it would be in the way of the operator's next try with another subnet.
        if not network.isActive():
            network.undefine()
        raise


def _require_subnet(network: libvirt.virNetwork, spec: NetworkSpec) -> None:
    found = subnet_of(network.XMLDesc(0))
    if found != spec.subnet:
        raise GpudError(
            Code.CONFIG_INVALID,
            f"libvirt's network {spec.name} has subnet {found}, but network.subnet is {spec.subnet}",
            hint=f"change network.subnet or network.name, or remove it: virsh net-undefine {spec.name}",
        )


def _places(network: libvirt.virNetwork) -> list[tuple[int, list[Lease]]]:
    """List where leases are kept: the definition, and the running network; they can differ."""
    definition = leases_of(network.XMLDesc(libvirt.VIR_NETWORK_XML_INACTIVE))
    places = [(libvirt.VIR_NETWORK_UPDATE_AFFECT_CONFIG, definition)]
    if network.isActive():
        running = leases_of(network.XMLDesc(0))
        places.append((libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE, running))
    return places


def _update(network: libvirt.virNetwork, command: int, lease: Lease, place: int) -> None:
    first_subnet = -1
    network.update(
        command,
        libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST,
        first_subnet,
        render_lease(lease),
        place,
    )
