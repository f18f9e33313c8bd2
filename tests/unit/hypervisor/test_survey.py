"""What libvirt says of itself, from its own test driver, and from what QEMU's driver said elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import libvirt
import pytest

from gpud.errors import Code, GpudError
from gpud.hypervisor.survey import NetworkFound, survey

CAPABILITIES = """<capabilities><host>
<secmodel><model>apparmor</model><baselabel type='kvm'>+1:+1</baselabel></secmodel>
<secmodel><model>dac</model><baselabel type='qemu'>{}</baselabel></secmodel>
</host></capabilities>"""
DOMAIN_CAPABILITIES = """<domainCapabilities><os supported='yes'>
<enum name='firmware'><value>efi</value></enum></os></domainCapabilities>"""
NETWORK = "<network><name>{}</name><bridge name='virbr9'/>{}</network>"
ADDRESSES = "<ip address='10.77.0.1' netmask='255.255.255.0'/>"


async def test_the_test_driver_tells_what_it_knows(test_uri: str) -> None:
    found = await survey(test_uri, "flags : vmx\n", 5)
    assert found.versions.startswith("libvirt ")
    assert found.major >= 9
    assert (found.best_type, found.qemu_ids) == ("qemu", None)
    assert (found.networks, found.passed) == ({}, {})


async def test_networks_with_and_without_addresses(tmp_path: Path) -> None:
    node = tmp_path / "node.xml"
    networks = NETWORK.format("gpud", ADDRESSES) + "<network><name>bare</name></network>"
    node.write_text(f"<node>{networks}</node>")
    found = (await survey(f"test://{node}", "", 5)).networks
    assert found["gpud"] == NetworkFound(True, IPv4Network("10.77.0.0/24"), "virbr9")
    assert found["bare"].subnet is None


@pytest.fixture
def answers(
    monkeypatch: pytest.MonkeyPatch, test_uri: str, faulty: Callable[..., Any]
) -> Callable[..., str]:
    """Let a test driver give other answers to single questions."""

    def answering(**replaced: Any) -> str:
        real = faulty(libvirt.open(test_uri), **replaced)
        monkeypatch.setattr(libvirt, "open", lambda _: real)
        return test_uri

    return answering


@pytest.mark.parametrize(("label", "ids"), [("+64055:+107", (64055, 107)), ("somebody:else", None)])
async def test_who_qemu_runs_as(
    answers: Callable[..., str], label: str, ids: tuple[int, int] | None
) -> None:
    uri = answers(getCapabilities=lambda: CAPABILITIES.format(label))
    assert (await survey(uri, "", 5)).qemu_ids == ids


async def test_firmware_that_libvirt_finds(answers: Callable[..., str]) -> None:
    uri = answers(getDomainCapabilities=lambda *_: DOMAIN_CAPABILITIES)
    assert (await survey(uri, "", 5)).firmwares == frozenset({"efi"})


async def test_a_driver_without_such_capabilities_tells_no_firmware(
    answers: Callable[..., str], libvirt_error: Callable[..., libvirt.libvirtError]
) -> None:
    def refuse(*_: object) -> str:
        raise libvirt_error("not supported", libvirt.VIR_ERR_NO_SUPPORT)

    uri = answers(getDomainCapabilities=refuse)
    assert (await survey(uri, "", 5)).firmwares is None


async def test_a_libvirt_that_cannot_be_reached_is_told() -> None:
    with pytest.raises(GpudError, match="nonexistent") as caught:
        await survey("test:///nonexistent/node.xml", "", 5)
    assert caught.value.code is Code.HYPERVISOR_UNAVAILABLE


async def test_a_libvirt_that_hangs_is_not_waited_for(answers: Callable[..., str]) -> None:
    go_on = threading.Event()
    uri = answers(getLibVersion=lambda: go_on.wait(5) and 9_000_000)
    with pytest.raises(GpudError, match=r"does not answer .* within 0.01 s"):
        await survey(uri, "", 0.01)
    go_on.set()
