"""The networks of the in-memory libvirtd: a definition and, while it runs, a live copy of it."""
# ruff: noqa: N802 - libvirt's names

from __future__ import annotations

import copy
from typing import Any
from xml.etree import ElementTree as ET

import libvirt


class Network:
    """One network."""

    def __init__(self, xml: str) -> None:
        self.config = ET.fromstring(xml)  # noqa: S314 - gpud wrote it
        self.live: ET.Element | None = None
        self.autostart = False

    @property
    def name(self) -> str:
        return self.config.findtext("name", "")

    def hosts(self) -> dict[str, str]:
        """Name and address of each fixed lease of the running network."""
        assert self.live is not None
        return {
            host.get("name", ""): host.get("ip", "") for host in self.live.iterfind("ip/dhcp/host")
        }


class NetworkHandle:
    """A virNetwork. Only what must be able to fail goes through the daemon's faults."""

    def __init__(self, connection: Any, network: Network) -> None:
        self.connection = connection
        self._network = network

    def isActive(self) -> int:
        return int(self._network.live is not None)

    def setAutostart(self, on: bool) -> int:
        self._network.autostart = on
        return 0

    def XMLDesc(self, flags: int) -> str:
        network = self._network
        inactive = flags & libvirt.VIR_NETWORK_XML_INACTIVE or network.live is None
        shown = network.config if inactive or network.live is None else network.live
        return ET.tostring(shown, encoding="unicode")

    def create(self) -> int:
        def act() -> int:
            self._network.live = copy.deepcopy(self._network.config)
            return 0

        return int(self.connection.daemon.answer("networkCreate", self.connection, act))

    def undefine(self) -> int:
        del self.connection.daemon.networks[self._network.name]
        return 0

    def update(self, command: int, section: int, _parent: int, xml: str, flags: int) -> int:
        assert section == libvirt.VIR_NETWORK_SECTION_IP_DHCP_HOST

        def act() -> int:
            live = flags & libvirt.VIR_NETWORK_UPDATE_AFFECT_LIVE
            tree = self._network.live if live else self._network.config
            assert tree is not None
            _change(tree, command, ET.fromstring(xml))  # noqa: S314 - likewise
            return 0

        return int(self.connection.daemon.answer("networkUpdate", self.connection, act))


def _change(tree: ET.Element, command: int, host: ET.Element) -> None:
    ip = tree.find("ip")
    assert ip is not None
    dhcp = ip.find("dhcp")
    if dhcp is None:
        dhcp = ET.SubElement(ip, "dhcp")
    same = [one for one in dhcp.iterfind("host") if one.get("mac") == host.get("mac")]
    if command == libvirt.VIR_NETWORK_UPDATE_COMMAND_DELETE:
        if not same:
            raise _refused("couldn't locate a matching DHCP host entry")
        dhcp.remove(same[0])
        return
    if same or host.get("ip") in {one.get("ip") for one in dhcp.iterfind("host")}:
        raise _refused("there is an existing dhcp host entry in network that matches")
    dhcp.append(host)


def _refused(message: str) -> libvirt.libvirtError:
    made = libvirt.libvirtError(message)
    code, domain = libvirt.VIR_ERR_OPERATION_INVALID, libvirt.VIR_FROM_NETWORK
    made.err = (code, domain, message, libvirt.VIR_ERR_ERROR, None, None, None, -1, -1)
    return made
