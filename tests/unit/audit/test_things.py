"""Guests that lack something of their own, or have it no more as it was made."""

from __future__ import annotations

from collections.abc import Callable
from xml.etree import ElementTree as ET

import libvirt
import pytest

from gpud.audit.facts import Kind
from gpud.host.vfio import Handover
from gpud.model import PciAddress, Step
from tests.unit.audit.odds import guest_of, hostdev, the_finding
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, Hold

pytestmark = pytest.mark.leaves_a_mess

AUDIO = PciAddress.parse("0000:01:00.1")
OTHER_CARD = PciAddress.parse("0000:02:00.0")


async def contradiction(gpud: Gpud) -> str:
    (instance,) = gpud.store.live
    finding = await the_finding(gpud)
    assert (finding.kind, finding.subject) == (Kind.CONTRADICTION, instance)
    assert not finding.repairable
    return f"{finding.what}: {finding.mend}"


def pause(guest: Guest) -> None:
    guest.state = libvirt.VIR_DOMAIN_PAUSED


def crash(guest: Guest) -> None:
    guest.state = libvirt.VIR_DOMAIN_CRASHED


def block(guest: Guest) -> None:
    guest.state = libvirt.VIR_DOMAIN_BLOCKED


def take_audio(guest: Guest) -> None:
    devices = guest.xml.find("devices")
    assert devices is not None
    devices.remove(devices.findall("hostdev")[1])


def give_another(guest: Guest) -> None:
    devices = guest.xml.find("devices")
    assert devices is not None
    devices.append(hostdev(OTHER_CARD))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (pause, "is running, and its domain {} is paused: virsh domstate --reason {}"),
        (crash, "is running, and its domain {} is crashed: virsh domstate"),
        (take_audio, "has not 0000:01:00.1 in its domain {}: virsh destroy {}"),
        (give_another, "was not sold, but has, 0000:02:00.0 in its domain {}"),
    ],
)
async def test_a_domain_that_is_not_as_it_was_started(
    gpud: Gpud, libvirtd: LibvirtDaemon, change: Callable[[Guest], None], told: str
) -> None:
    instance = await gpud.running()
    guest = guest_of(libvirtd, instance)
    block(guest)  # as a guest that waits for its disk is
    assert await gpud.findings() == []
    await gpud.worker.close()  # which ends a guest that lost a card
    change(guest)
    assert told.replace("{}", instance.domain_name) in await contradiction(gpud)


async def test_a_guest_that_is_gone_without_a_word(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    instance = await gpud.running()
    await gpud.worker.close()  # which would start it again
    libvirtd.guests.clear()
    whats = [finding.what for finding in await gpud.findings()]
    assert f"is running, and its domain {instance.domain_name} does not run" in whats
    assert len(whats) == 3  # and it has not its two functions


@pytest.mark.parametrize("name", ["base.qcow2", "disk.qcow2", "seed.iso", "nvram.fd"])
async def test_a_guest_whose_file_is_gone(gpud: Gpud, name: str) -> None:
    instance = await gpud.running()
    (gpud.config.state_dir / "instances" / instance.upstream_id / name).unlink()
    assert f"{name} is gone" in await contradiction(gpud)


async def test_a_guest_with_bios_has_no_variables_of_its_firmware(start_gpud: StartGpud) -> None:
    gpud = await start_gpud(firmware="bios")
    instance = await gpud.running()
    names = {one.name for one in (gpud.config.state_dir / "instances").glob("*/*")}
    assert instance.live
    assert "nvram.fd" not in names
    assert await gpud.findings() == []


async def test_a_guest_whose_address_is_not_given_out(gpud: Gpud) -> None:
    instance = await gpud.running()
    await gpud.hypervisor.remove_lease("gpud", instance.mac)
    told = await contradiction(gpud)
    assert "has the address 10.77.0.10, which network gpud does not give" in told
    name = f"gpud-{instance.upstream_id}-{gpud.store.owner}"
    assert f'\'<host mac="{instance.mac}" name="{name}" ip="10.77.0.10">' in told


async def test_a_guest_whose_network_is_gone(gpud: Gpud, libvirtd: LibvirtDaemon) -> None:
    await gpud.running()
    libvirtd.networks.clear()
    assert "network gpud does not give" in await contradiction(gpud)


async def test_a_guest_without_an_address_of_its_own_lacks_none(start_gpud: StartGpud) -> None:
    gpud = await start_gpud(mode="user")
    await gpud.running()
    assert await gpud.findings() == []


async def test_a_function_that_its_driver_has_back(gpud: Gpud, kernel: FakeKernel) -> None:
    await gpud.running()
    handover = Handover(kernel.sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock)
    await handover.give_back({AUDIO: "snd_hda_intel"})
    told = await contradiction(gpud)
    assert "has 0000:01:00.1, which is bound to snd_hda_intel instead of vfio-pci" in told


async def test_a_stopped_guest_that_runs(start_gpud: StartGpud, libvirtd: LibvirtDaemon) -> None:
    hold = Hold(Step.REMOVE_FILES, after=True)
    gpud = await start_gpud(hold)
    instance = await gpud.running()
    xml = ET.tostring(guest_of(libvirtd, instance).xml, encoding="unicode")
    await gpud.store.request_delete(instance.upstream_id)
    await hold.reached.wait()
    libvirtd.begin(xml)
    finding = await the_finding(gpud)
    assert (finding.kind, finding.subject) == (Kind.LEAK, instance.upstream_id)
    assert finding.mend == f"virsh destroy {instance.domain_name}"
    hold.open.set()
