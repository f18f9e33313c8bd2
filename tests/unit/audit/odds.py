"""Ways to set a record and its host at odds."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from xml.etree import ElementTree as ET

from gpud.audit.facts import Finding, Kind
from gpud.model import Instance, PciAddress
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon
from tests.unit.lifecycle.gpud_under_test import Gpud

ORPHAN = "i-00000000000000aa"


def rewrite(gpud: Gpud, statement: str, *values: object) -> None:
    """Change the state file behind the daemon's back."""
    path = gpud.config.state_dir / "state.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        assert connection.execute(statement, values).rowcount


async def found(gpud: Gpud) -> list[tuple[Kind, str]]:
    """Kind and subject of each finding, all of which say what is wrong and what to do."""
    findings = await gpud.findings()
    assert all(finding.what and finding.mend for finding in findings)
    return [(finding.kind, finding.subject) for finding in findings]


async def the_finding(gpud: Gpud) -> Finding:
    (finding,) = await gpud.findings()
    return finding


def guest_of(libvirtd: LibvirtDaemon, instance: Instance) -> Guest:
    return libvirtd.guests[instance.domain_uuid]


def hostdev(function: PciAddress) -> ET.Element:
    """A function of the host's as a device of a domain."""
    made = ET.Element("hostdev", mode="subsystem", type="pci", managed="no")
    at = {
        "domain": hex(function.domain),
        "bus": hex(function.bus),
        "slot": hex(function.device),
        "function": hex(function.function),
    }
    ET.SubElement(ET.SubElement(made, "source"), "address", at)
    return made
