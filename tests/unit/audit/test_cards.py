"""Cards in the wrong hands, in nobody's, and told of as what they are not."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest

from gpud.audit.facts import Facts, Kind, ToldCard
from gpud.audit.judge import judge
from gpud.errors import GpudError
from gpud.host.vfio import Handover
from gpud.model import PciAddress
from tests.unit.audit.odds import found, hostdev, rewrite, the_finding
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.lifecycle.conftest import StartGpud
from tests.unit.lifecycle.gpud_under_test import Gpud, make_server

pytestmark = pytest.mark.leaves_a_mess

GPU = PciAddress.parse("0000:01:00.0")
CARD = [GPU, PciAddress.parse("0000:01:00.1")]


def begin_with(libvirtd: LibvirtDaemon, *functions: PciAddress) -> None:
    """Let somebody start a domain of his own with functions of this host."""
    domain = ET.Element("domain")
    ET.SubElement(domain, "name").text = "mine"
    ET.SubElement(domain, "devices").extend(map(hostdev, functions))
    libvirtd.begin(ET.tostring(domain, encoding="unicode"))


async def bind(kernel: FakeKernel) -> None:
    handover = Handover(kernel.sysfs, kernel.proc, sleep=kernel.sleep, clock=kernel.clock)
    await handover.bind(CARD)


async def test_a_card_that_another_domain_has_is_a_double_claim(
    gpud: Gpud, libvirtd: LibvirtDaemon
) -> None:
    instance = await gpud.running()
    del libvirtd.guests[instance.domain_uuid]
    begin_with(libvirtd, GPU)
    assert (Kind.DOUBLE_CLAIM, instance.upstream_id) in await found(gpud)


# -- cards that are bound for a guest and have none ------------------------------------------------


async def test_a_card_that_was_not_brought_back_is_a_leak_and_mended_as_shown(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.deleted(await gpud.running())
    await bind(kernel)
    findings = await gpud.findings()
    assert [(one.kind, one.subject) for one in findings] == [
        (Kind.LEAK, f"PCI function {function}") for function in CARD
    ]
    assert "is bound to vfio-pci by nobody; it had driver nvidia before" in findings[0].what
    assert not findings[0].repairable
    bus = kernel.sysfs.root / "bus/pci"
    for finding in findings:
        for command in finding.mend.split(": ", 1)[1].split("; "):
            text, _, file = command.removeprefix("echo ").partition("> /sys/bus/pci/")
            path = (bus / file.strip()).parent.resolve() / file.rpartition("/")[2].strip()
            if path.parent.parent.name == "drivers":
                path = bus / "drivers" / path.parent.name / path.name
            elif "devices" in path.parts and path.name == "driver_override":
                path = bus / file.strip()
            await kernel.write(path, text.strip(" '") + "\n", 1)
    assert await gpud.findings() == []
    assert kernel.driver(GPU) == "nvidia"


async def test_an_override_alone_is_a_leak_too(gpud: Gpud, kernel: FakeKernel) -> None:
    await gpud.deleted(await gpud.running())
    await kernel.write(kernel.sysfs.root / f"bus/pci/devices/{GPU}/driver_override", "vfio-pci", 1)
    assert (await the_finding(gpud)).subject == f"PCI function {GPU}"


async def test_a_card_that_had_no_driver_is_told_so(gpud: Gpud, kernel: FakeKernel) -> None:
    await gpud.deleted(await gpud.running())
    rewrite(gpud, "UPDATE instance SET former_drivers = ?", f'{{"{GPU}": ""}}')
    await bind(kernel)
    assert "it had no driver before" in (await the_finding(gpud)).what


async def test_a_card_that_gpud_did_not_take_is_as_the_operator_wants_it(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await bind(kernel)
    assert await gpud.findings() == []


async def test_a_card_that_came_with_vfio_pci_stays_with_it(gpud: Gpud, kernel: FakeKernel) -> None:
    await bind(kernel)
    await gpud.deleted(await gpud.running())
    assert kernel.override(GPU) == "vfio-pci"
    assert await gpud.findings() == []


async def test_what_was_noted_in_another_boot_says_nothing(
    start_gpud: StartGpud, gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.deleted(await gpud.running())
    await gpud.stop()
    booted = make_server(kernel.root.parent / "booted")
    await bind(booted)
    assert await (await start_gpud(server=booted)).findings() == []


async def test_a_card_in_quarantine_or_with_a_domain_of_the_operators_stays_as_it_is(
    gpud: Gpud, kernel: FakeKernel, libvirtd: LibvirtDaemon
) -> None:
    await gpud.deleted(await gpud.running())
    await bind(kernel)
    await gpud.store.quarantine(GPU, "its fan rattles")
    assert await gpud.findings() == []
    await gpud.store.release(GPU)
    begin_with(libvirtd, *CARD)
    assert await gpud.findings() == []


async def test_overrides_that_cannot_be_read_are_not_guessed(
    gpud: Gpud, kernel: FakeKernel
) -> None:
    await gpud.deleted(await gpud.running())
    for function in CARD:
        kernel.hang(f"devices/{function}/driver_override")
        with pytest.raises(GpudError):
            await kernel.sysfs.write(
                kernel.sysfs.root.relative_to(kernel.sysfs.root)
                / f"bus/pci/devices/{function}/driver_override", "x", 1,
            )  # fmt: skip
    with pytest.raises(GpudError, match="not one file could be read"):
        await gpud.findings()


# -- cards as the daemon tells of them -------------------------------------------------------------


def with_card(facts: Facts, state: str, *why_not: str) -> Facts:
    """The facts, had the daemon said this of its first card."""
    assert facts.told is not None
    cards = (ToldCard(str(GPU), state, why_not), *facts.told.cards[1:])
    return replace(facts, told=replace(facts.told, cards=cards))


async def test_a_card_that_the_daemon_tells_of_otherwise_than_its_record_is_a_contradiction(
    gpud: Gpud,
) -> None:
    instance = await gpud.running()
    rewrite(gpud, "UPDATE gpu_claim SET gpu = '0000:02:00.0'")
    findings = [one for one in await gpud.findings() if one.kind is Kind.CONTRADICTION]
    assert [f"{one.subject} {one.what}" for one in findings] == [
        f"GPU {GPU} is in_use for the daemon, and nobody has it",
        f"GPU 0000:02:00.0 is available for the daemon, and {instance.upstream_id} has it",
    ]


async def test_a_claimed_card_that_the_daemon_does_not_list_is_a_contradiction(
    gpud: Gpud,
) -> None:
    await gpud.running()
    rewrite(gpud, "UPDATE gpu_claim SET gpu = '0000:99:00.0'")
    assert (Kind.CONTRADICTION, "GPU 0000:99:00.0") in await found(gpud)


async def test_a_card_in_quarantine_that_is_offered_is_a_contradiction(gpud: Gpud) -> None:
    row = "INSERT INTO quarantine VALUES (?, 0, 'its fan rattles', 1, '{}')"
    rewrite(gpud, row, str(GPU))
    finding = await the_finding(gpud)
    assert finding.what == "is offered by the daemon, and must not be sold"
    (finding,) = judge(with_card(await gpud.facts(), "available", "no driver"))
    assert finding.what == "is offered by the daemon, and must not be sold"


@pytest.mark.parametrize("what", [str(GPU), ""], ids=["the card", "the server"])
async def test_a_drained_card_that_is_offered_is_a_contradiction(gpud: Gpud, what: str) -> None:
    rewrite(gpud, "INSERT INTO drain VALUES (?, 0, '')", what)
    findings = await gpud.findings()
    assert findings[0].subject == f"GPU {GPU}"
    assert len(findings) == (1 if what else 2)
    assert {one.what for one in findings} == {"is offered by the daemon, and must not be sold"}


async def test_a_card_that_is_drained_is_in_order_with_an_instance_and_without(gpud: Gpud) -> None:
    instance = await gpud.running()
    await gpud.store.drain(None)
    assert await gpud.findings() == []
    await gpud.deleted(instance)
    assert await gpud.findings() == []
    findings = judge(with_card(await gpud.facts(), "drained"))
    assert [one.what for one in findings] == ["is drained without a reason"]


async def test_a_card_that_is_not_sold_for_no_reason_is_not_understood(gpud: Gpud) -> None:
    await gpud.store.quarantine(GPU, "its fan rattles")
    assert await gpud.findings() == []
    rewrite(gpud, "UPDATE quarantine SET reason = ' '")
    assert (await the_finding(gpud)).what == "is quarantined, and nobody knows why"
    findings = judge(with_card(await gpud.facts(), "unavailable"))
    assert "is unavailable without a reason" in {one.what for one in findings}
