"""The guests' network."""

from __future__ import annotations

from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import pytest

from gpud.doctor.check import Level, Verdict
from gpud.doctor.machine import Machine
from gpud.doctor.network import forwarding, guests, programs, routes
from gpud.errors import Code, GpudError
from gpud.hypervisor.survey import NetworkFound, Survey
from tests.unit.doctor.parts import REAL, level, make_config, named, only

SUBNET = IPv4Network("10.77.0.0/24")
ROUTES = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0
{}\t{}\t00000000\t0001\t0\t0\t0\t{}\t0\t0\t0
"""
NETWORK: dict[str, Any] = {**REAL, "network": {"mode": "network"}}
AWAY = GpudError(Code.HYPERVISOR_UNAVAILABLE, "away")


def survey(**networks: NetworkFound) -> Survey:
    return Survey("", 9, "kvm", networks=networks)


def machine(proc: Path, forwards: str = "1") -> Machine:
    for name, text in {
        "net/route": ROUTES.format("virbr7", "00004D0A", "00FFFFFF"),
        "sys/net/ipv4/ip_forward": forwards + "\n",
    }.items():
        (proc / name).parent.mkdir(parents=True)
        (proc / name).write_text(text)
    return Machine(proc=proc)


def look(proc: Path, found: Survey | GpudError, forwards: str = "1") -> list[Verdict]:
    return list(guests(make_config(**NETWORK), found, machine(proc, forwards)))


def test_a_running_network_with_its_own_route_is_well(tmp_path: Path) -> None:
    found = look(tmp_path, survey(gpud=NetworkFound(True, SUBNET, "virbr7")))
    told = {one.name: one.level for one in found if one.name != "programs"}
    assert set(told.values()) == {Level.OK}
    assert named(found, "guests' network")[1] == "gpud, 10.77.0.0/24, 253 guest addresses"


def test_a_network_that_is_not_there_yet_is_gpuds_to_make(tmp_path: Path) -> None:
    found = look(tmp_path, survey())
    assert level(found, "guests' network") is Level.NOTE


def test_a_network_that_is_off_is_gpuds_to_start(tmp_path: Path) -> None:
    found = look(tmp_path, survey(gpud=NetworkFound(False, SUBNET, "virbr7")), "0")
    assert level(found, "guests' network") is Level.NOTE
    assert level(found, "forwarding") is Level.NOTE


@pytest.mark.parametrize("subnet", [IPv4Network("10.1.0.0/24"), None])
def test_a_network_with_another_subnet_is_a_fault(
    tmp_path: Path, subnet: IPv4Network | None
) -> None:
    found = look(tmp_path, survey(gpud=NetworkFound(True, subnet)))
    assert level(found, "guests' network") is Level.FAULT
    assert "virsh net-undefine gpud" in named(found, "guests' network")[2]


def test_without_libvirt_the_rest_is_looked_at(tmp_path: Path) -> None:
    found = look(tmp_path, AWAY)
    assert [one.name for one in found] == ["subnet", "forwarding", "programs"]


@pytest.mark.parametrize(("changes", "worst"), [({}, Level.NOTE), (REAL, Level.WARNING)])
def test_qemus_own_nat_is_for_development(changes: dict[str, Any], worst: Level) -> None:
    assert only(guests(make_config(**changes), AWAY, Machine()))[0] is worst


@pytest.mark.parametrize(
    ("device", "destination", "mask", "worst"),
    [
        ("gpud", "00004D0A", "00FFFFFF", Level.OK),  # the guests' own
        ("eth1", "00004D0A", "00FFFFFF", Level.FAULT),  # the very same
        ("eth1", "0000000A", "000000FF", Level.FAULT),  # 10.0.0.0/8
        ("eth1", "0000A8C0", "0000FFFF", Level.OK),  # 192.168.0.0/16
    ],
)
def test_a_route_to_somebody_else_under_the_guests_addresses_is_a_fault(
    device: str, destination: str, mask: str, worst: Level
) -> None:
    found = routes(SUBNET, "gpud", ROUTES.format(device, destination, mask))
    assert found.level is worst


def test_a_server_without_routes_has_no_clash() -> None:
    assert routes(SUBNET, "gpud", "").level is Level.OK


@pytest.mark.parametrize(
    ("state", "active", "worst"),
    [("1", False, Level.OK), ("0", False, Level.NOTE), ("0", True, Level.FAULT)],
)
def test_forwarding_that_was_turned_off_again_is_a_fault(
    state: str, worst: Level, *, active: bool
) -> None:
    assert forwarding(state, active=active).level is worst


@pytest.mark.parametrize(
    ("installed", "worst", "mend"),
    [
        ((), Level.FAULT, "apt install dnsmasq-base"),
        (("dnsmasq",), Level.FAULT, "apt install iptables nftables"),
        (("dnsmasq", "nft"), Level.OK, ""),
    ],
)
def test_programs_that_libvirt_needs_for_a_network(
    tmp_path: Path, installed: tuple[str, ...], worst: Level, mend: str
) -> None:
    for name in installed:
        (tmp_path / name).touch(mode=0o755)
    found = programs(str(tmp_path))
    assert (found.level, found.mend) == (worst, mend)
