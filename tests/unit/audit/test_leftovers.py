"""What is left of instances that have ended or never were; and what is somebody else's."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path

import pytest

from gpud.audit.facts import Kind
from gpud.hypervisor.domainxml import METADATA_NAMESPACE
from gpud.lifecycle.steps import lease_name
from gpud.model import DOMAIN_PREFIX
from tests.unit.audit.odds import ORPHAN, found, the_finding
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon, error
from tests.unit.lifecycle.gpud_under_test import Gpud

pytestmark = pytest.mark.leaves_a_mess


def begin(libvirtd: LibvirtDaemon, owner: str, upstream_id: str = ORPHAN) -> None:
    mark = (
        f"<metadata><g:instance xmlns:g='{METADATA_NAMESPACE}' owner='{owner}'"
        f" upstream_id='{upstream_id}'/></metadata>"
    )
    libvirtd.begin(f"<domain><name>{DOMAIN_PREFIX}{ORPHAN}</name>{mark}</domain>")


def directory(gpud: Gpud, upstream_id: str = ORPHAN) -> Path:
    path = gpud.config.state_dir / "instances" / upstream_id
    path.mkdir(parents=True, exist_ok=True)
    return path


async def test_every_orphan_is_found_and_gone_after_a_repair(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    await gpud.reconciler.once()
    begin(libvirtd, gpud.store.owner)
    (directory(gpud) / "disk.qcow2.new").touch()
    gpud.consoles.append(ORPHAN, b"login:")
    name = lease_name(ORPHAN, gpud.store.owner)
    await gpud.hypervisor.add_lease("gpud", "52:00:00:00:00:01", IPv4Address("10.77.0.9"), name)
    findings = await gpud.findings()
    assert {finding.kind for finding in findings} == {Kind.LEAK}
    things = ("domain", "directory", "console", "lease")
    assert [finding.subject for finding in findings] == [f"{one} of {ORPHAN}" for one in things]
    assert all(finding.repairable for finding in findings)
    await gpud.reconciler.once()
    assert await gpud.findings() == []


async def test_what_is_somebody_elses_is_not_mentioned(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    await gpud.reconciler.once()
    begin(libvirtd, "another-gpud")
    libvirtd.begin("<domain><name>gpud-i-00000000000000bb</name></domain>")
    directory(gpud, "lost+found")
    (gpud.config.state_dir / "console").mkdir()
    (gpud.config.state_dir / "console" / "README").touch()
    for number, name in enumerate(["printer", ORPHAN, lease_name(ORPHAN, "0123456789abcdef")]):
        address = IPv4Address("10.77.0.100") + number
        await gpud.hypervisor.add_lease("gpud", f"52:00:00:00:00:0{number}", address, name)
    assert await gpud.findings() == []


async def test_a_second_domain_for_an_instance_is_a_double_claim(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    instance = await gpud.running()
    begin(libvirtd, gpud.store.owner, instance.upstream_id)
    assert await found(gpud) == [(Kind.DOUBLE_CLAIM, f"domain of {instance.upstream_id}")]


async def test_what_gpud_did_not_make_in_a_directory_is_shown_and_nothing_for_gpud(
    gpud: Gpud,
) -> None:
    instance = await gpud.running()
    for upstream_id in (instance.upstream_id, ORPHAN):
        (directory(gpud, upstream_id) / "thesis.tex").touch()
    findings = await gpud.findings()
    assert {(finding.kind, finding.repairable) for finding in findings} == {(Kind.UNKNOWN, False)}
    assert all("thesis.tex" in finding.what for finding in findings)
    assert len(findings) == 2


async def test_a_file_with_the_name_of_an_instance_is_a_leak(gpud: Gpud) -> None:
    directory(gpud).rmdir()
    (gpud.config.state_dir / "instances" / ORPHAN).touch()
    assert await found(gpud) == [(Kind.LEAK, f"directory of {ORPHAN}")]


async def test_what_is_left_over_from_the_making_of_a_guest_is_a_leak(gpud: Gpud) -> None:
    instance = await gpud.running()
    left = directory(gpud, instance.upstream_id) / "disk.qcow2.new"
    left.touch()
    finding = await the_finding(gpud)
    assert (finding.kind, finding.mend) == (Kind.LEAK, f"rm {left}")


async def test_the_console_of_a_failed_instance_is_no_leak(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    libvirtd.fault("createXML", error("no such machine type"))
    instance = await gpud.order()
    gpud.consoles.append(instance.upstream_id, b"kernel panic\n")
    await gpud.ended(instance)
    assert gpud.consoles.kept() == {instance.upstream_id}
    assert await gpud.findings() == []


async def test_a_directory_that_vanishes_meanwhile_is_no_leak(gpud: Gpud) -> None:
    directory(gpud).rmdir()
    (gpud.config.state_dir / "instances" / ORPHAN).symlink_to("nowhere")
    assert await gpud.findings() == []
