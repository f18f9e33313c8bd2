"""Checks of the guests' network."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from gpud.config import Config, Network
from gpud.doctor.check import Check, Group, Verdict
from gpud.doctor.machine import Machine
from gpud.errors import GpudError
from gpud.hypervisor.survey import Survey

_NETWORK: Final = Check(Group.NETWORK, "guests' network")
_ROUTES: Final = Check(Group.NETWORK, "subnet")
_FORWARDING: Final = Check(Group.NETWORK, "forwarding")
_PROGRAMS: Final = Check(Group.NETWORK, "programs")
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ADDRESS_HEX: Final = 16


def guests(config: Config, found: Survey | GpudError, machine: Machine) -> Iterator[Verdict]:
    """Whether guests will reach the network, and nothing else has their addresses."""
    network = config.network
    if network.mode == "user":
        yield _user_mode(config)
        return
    bridge = network.name
    active = False
    if isinstance(found, Survey):
        yield network_found(network, found)
        there = found.networks.get(network.name)
        if there is not None:
            bridge, active = there.bridge or bridge, there.active
    yield routes(network.subnet, bridge, machine.text("net/route"))
    yield forwarding(machine.text("sys/net/ipv4/ip_forward").strip(), active=active)
    yield programs()


def _user_mode(config: Config) -> Verdict:
    what = "QEMU's own NAT (user): guests reach what listens on this server's loopback"
    if config.gpus.stand_ins:
        return _NETWORK.note(f"{what}; for development only")
    return _NETWORK.warning(what, "network.mode: network")


def network_found(network: Network, found: Survey) -> Verdict:
    """Whether libvirt's network is the one that is configured; gpud makes and starts it itself."""
    there = found.networks.get(network.name)
    told = f"{network.name}, {network.subnet}, {len(network.guest_addresses)} guest addresses"
    if there is None:
        return _NETWORK.note(f"{told}: not there yet, gpud makes it")
    if there.subnet != network.subnet:
        return _NETWORK.fault(
            f"libvirt's network {network.name} has {there.subnet or 'no addresses'},"
            f" and network.subnet is {network.subnet}",
            f"network.subnet: {there.subnet}, or virsh net-destroy {network.name} &&"
            f" virsh net-undefine {network.name}",
        )
    if not there.active:
        return _NETWORK.note(f"{told}: is off, gpud starts it")
    return _NETWORK.ok(told)


def routes(subnet: IPv4Network, bridge: str, table: str) -> Verdict:
    """Whether the host reaches somebody else under the guests' addresses.

    Args:
        subnet: The guests'.
        bridge: The host's device for their network.
        table: Content of ``/proc/net/route``.
    """
    for line in table.splitlines()[1:]:
        device, destination, _, _, _, _, _, mask, *_ = line.split()
        there = IPv4Network((_address(destination), str(_address(mask))))
        if device != bridge and there.prefixlen and there.overlaps(subnet):
            return _ROUTES.fault(
                f"{subnet} is the guests', and this server reaches {there} over {device}",
                "network.subnet: one that nobody here uses, such as 10.213.0.0/24",
            )
    return _ROUTES.ok(f"{subnet} is nobody else's")


def _address(text: str) -> IPv4Address:
    """An address of ``/proc/net/route``: its four bytes as one number in the CPU's order."""
    return IPv4Address(int(text, _ADDRESS_HEX).to_bytes(4, "little"))


def forwarding(state: str, *, active: bool) -> Verdict:
    """Whether the kernel forwards what guests send; libvirt turns that on with the network."""
    if state == "1":
        return _FORWARDING.ok("on")
    if active:
        return _FORWARDING.fault(
            "off, although the guests' network runs: somebody turned it off again",
            "sysctl -w net.ipv4.ip_forward=1; see /etc/sysctl.d",
        )
    return _FORWARDING.note("off; libvirt turns it on with the guests' network")


def programs(path: str = _PATH) -> Verdict:
    """Whether what libvirt makes a network with is there."""
    if shutil.which("dnsmasq", path=path) is None:
        return _PROGRAMS.fault("dnsmasq, which gives guests their addresses, is missing",
                               "apt install dnsmasq-base")  # fmt: skip
    filters = [name for name in ("nft", "iptables") if shutil.which(name, path=path)]
    if not filters:
        return _PROGRAMS.fault("neither nft nor iptables, with which libvirt makes NAT",
                               "apt install iptables nftables")  # fmt: skip
    return _PROGRAMS.ok(f"dnsmasq, {', '.join(filters)}")
