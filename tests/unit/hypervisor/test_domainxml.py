from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import UUID
from xml.etree import ElementTree as ET

import libvirt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.hypervisor.domainxml import (
    DomainSpec,
    Identity,
    LibvirtNetwork,
    UserNetwork,
    identify,
    render,
)

GOLDEN = Path(__file__).parents[2] / "data" / "domainxml"
STATE = Path("/var/lib/gpud/instances/i-0123456789abcdef")

EMULATED_UEFI = DomainSpec(
    name="gpud-i-0123456789abcdef",
    uuid=UUID("0d6a7c4e-58f0-5d1c-9a51-3c1f3c1f3c1f"),
    owner="6f9f2a37",
    upstream_id="i-0123456789abcdef",
    mac="52:0a:1b:2c:3d:4e",
    memory_mib=2048,
    cpu_cores=2,
    domain_type="qemu",
    firmware="uefi",
    base=STATE / "base.qcow2",
    disk=STATE / "disk.qcow2",
    seed=STATE / "seed.iso",
    nvram=STATE / "nvram.fd",
    network=UserNetwork(),
)
CASES = {
    "emulated-uefi": EMULATED_UEFI,
    "emulated-bios-two-stand-ins": replace(EMULATED_UEFI, firmware="bios", stand_ins=2),
    "kvm-uefi-network": replace(
        EMULATED_UEFI,
        domain_type="kvm",
        memory_mib=1_048_576,
        cpu_cores=96,
        network=LibvirtNetwork("gpud"),
    ),
}
PRINTABLE = st.text(st.characters(codec="utf-8", exclude_categories=["C"]))


@pytest.mark.parametrize("case", CASES)
def test_domain_is_rendered_as_its_golden_file(case: str) -> None:
    golden = GOLDEN / f"{case}.xml"
    rendered = render(CASES[case])
    if os.environ.get("GPUD_REGENERATE"):
        golden.write_text(rendered)
    assert rendered == golden.read_text()


def test_every_golden_file_has_its_case() -> None:
    assert {golden.stem for golden in GOLDEN.glob("*.xml")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_libvirt_finds_the_domain_valid_and_starts_it(
    case: str, plain_connection: libvirt.virConnect
) -> None:
    spec = CASES[case]
    domain = plain_connection.createXML(render(spec), libvirt.VIR_DOMAIN_START_VALIDATE)
    assert (domain.name(), domain.UUIDString()) == (spec.name, str(spec.uuid))
    assert not domain.isPersistent()
    assert domain.maxMemory() == spec.memory_mib * 1024
    assert identify(domain.XMLDesc(0)) == Identity(spec.owner, spec.upstream_id)


@given(owner=PRINTABLE, disk=PRINTABLE, network=PRINTABLE)
def test_any_text_survives_the_way_through_xml(owner: str, disk: str, network: str) -> None:
    spec = replace(
        EMULATED_UEFI, owner=owner, disk=STATE / f"x{disk}", network=LibvirtNetwork(network)
    )
    rendered = ET.fromstring(render(spec))  # noqa: S314
    assert identify(render(spec)) == Identity(owner, spec.upstream_id)
    source = rendered.find("devices/disk/source")
    interface = rendered.find("devices/interface/source")
    assert source is not None
    assert interface is not None
    assert (source.get("file"), interface.get("network")) == (str(spec.disk), network)


def test_stand_ins_get_slots_of_their_own() -> None:
    rendered = render(replace(EMULATED_UEFI, stand_ins=16))
    slots = [line.partition("addr=")[2] for line in rendered.splitlines() if "addr=" in line]
    assert len(set(slots)) == 16
    assert "0x1f" not in {slot.partition('"')[0] for slot in slots}


def test_identity_is_read_from_our_metadata_element_alone() -> None:
    element = '<instance owner="a" upstream_id="i-1"/>'
    assert identify(element) == Identity("a", "i-1")


def test_domain_of_somebody_else_has_no_identity() -> None:
    other = "<metadata><x:instance xmlns:x='urn:other' owner='a' upstream_id='b'/></metadata>"
    assert identify(f"<domain><name>x</name>{other}</domain>") is None
    assert identify("<domain><name>x</name></domain>") is None
