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
    PassedCard,
    UserNetwork,
    identify,
    render,
)
from gpud.model import PciAddress

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
KVM_UEFI = replace(
    EMULATED_UEFI,
    domain_type="kvm",
    memory_mib=1_048_576,
    cpu_cores=96,
    network=LibvirtNetwork("gpud"),
)


def card(*functions: str) -> PassedCard:
    return PassedCard(tuple(PciAddress.parse(function) for function in functions))


NVSWITCHES = [f"0000:{bus}:00.0" for bus in ("05", "06", "07", "08")]
CASES = {
    "emulated-uefi": EMULATED_UEFI,
    "emulated-bios-two-stand-ins": replace(EMULATED_UEFI, firmware="bios", stand_ins=2),
    "emulated-bios-card-with-rom": replace(
        EMULATED_UEFI, firmware="bios", cards=(card("0000:41:00.0"),), rombar=True
    ),
    "kvm-uefi-network": KVM_UEFI,
    "kvm-4090-with-its-audio": replace(KVM_UEFI, cards=(card("0000:41:00.0", "0000:41:00.1"),)),
    "kvm-two-l40s-on-one-node": replace(
        KVM_UEFI,
        cards=(card("0000:81:00.0"), card("0000:c1:00.0")),
        mmio_window_mib=262_144,
        cpuset="32-63,96-127",
        nodeset="1",
        hugepage_kib=1_048_576,
    ),
    "kvm-h100-board-with-nvswitches": replace(
        KVM_UEFI,
        # The switches go with every GPU of the board: they are in its bundle.
        cards=tuple(
            card(f"0000:{bus}:00.0", *NVSWITCHES)
            for bus in ("1b", "43", "52", "61", "9d", "c3", "d1", "df")
        ),
        mmio_window_mib=2_097_152,
        cpuset="0-191",
        nodeset="0-1",
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


def test_libvirt_would_notice_what_its_schema_does_not_know(
    plain_connection: libvirt.virConnect,
) -> None:
    rendered = render(CASES["kvm-4090-with-its-audio"])
    misspelt = rendered.replace("<rom bar=", "<rom bra=")
    with pytest.raises(libvirt.libvirtError, match="XML document failed to validate"):
        plain_connection.createXML(misspelt, libvirt.VIR_DOMAIN_START_VALIDATE)


def test_window_is_for_ovmf_only() -> None:
    spec = replace(EMULATED_UEFI, mmio_window_mib=65_536)
    assert "name=opt/ovmf/X-PciMmio64Mb,string=65536" in render(spec)
    assert "X-PciMmio64Mb" not in render(replace(spec, firmware="bios"))


@pytest.mark.parametrize(
    ("nodeset", "mode"), [("0", "strict"), ("11", "strict"), ("0-1", "interleave")]
)
def test_memory_of_one_node_is_strict_and_of_several_spread(nodeset: str, mode: str) -> None:
    rendered = render(replace(EMULATED_UEFI, nodeset=nodeset))
    assert f'<memory mode="{mode}" nodeset="{nodeset}" />' in rendered


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
