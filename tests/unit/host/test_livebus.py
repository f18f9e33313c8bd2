"""What devices say of themselves, or do not say, while some of them are stuck."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpud import command
from gpud.errors import GpudError
from gpud.host import livebus, pci
from gpud.host.pci import PciFunction, PciTree
from gpud.host.sysfs import Sysfs
from gpud.model import PciAddress
from tests.unit.conftest import Recorded
from tests.unit.fakes import recorded_host
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.recorded_host import RecordedHost

GPU, AUDIO, PORT, NVME = "0000:01:00.0", "0000:01:00.1", "0000:00:01.0", "0000:06:00.0"

children = pytest.mark.real_command("head", "od")


@pytest.fixture
def desktop(tmp_path: Path) -> RecordedHost:
    return recorded_host.unfold("rtx3090", tmp_path)


async def read(host: RecordedHost) -> PciTree:
    return await livebus.read(Sysfs(host.sysfs), 10)


def at(tree: PciTree, address: str) -> PciFunction:
    return tree.functions[PciAddress.parse(address)]


def silent(tree: PciTree) -> list[str]:
    return [
        str(one.address) for one in tree.functions.values() if not (one.answers or one.is_bridge)
    ]


@children
@pytest.mark.parametrize("name", recorded_host.names())
async def test_every_function_of_a_healthy_host_answers(name: str, recorded: Recorded) -> None:
    host = recorded(name)

    tree = await read(host)

    assert silent(tree) == []
    assert list(tree.functions) == list(pci.read(host.sysfs).functions)
    assert tree.with_headers({}) == pci.read(host.sysfs)


@children
async def test_the_header_is_the_devices_own(desktop: RecordedHost) -> None:
    (desktop.device(GPU) / "config").write_bytes(
        (desktop.device(GPU) / "config").read_bytes() + b"secret" * 700
    )

    header = at(await read(desktop), GPU).config_header

    assert header[:16] == bytes.fromhex("de100422 06041000 a1000003 00008000")
    assert len(header) == 64


@children
async def test_a_bridge_is_known_by_its_header_whatever_its_class(desktop: RecordedHost) -> None:
    port = desktop.device(PORT)
    (port / "class").write_text("0x060900\n")  # semi-transparent PCI-to-PCI bridge
    header = bytearray((port / "config").read_bytes())
    header[0x0E] |= 0x80  # one of several functions
    (port / "config").write_bytes(header)

    tree = await read(desktop)

    assert at(tree, PORT).is_bridge
    assert not at(tree, GPU).is_bridge


@children
async def test_the_header_of_one_off_the_bus_makes_it_no_bridge(desktop: RecordedHost) -> None:
    (desktop.device(NVME) / "config").write_bytes(b"\xff\xff\xff\xff" + b"\x01" * 60)

    assert not at(await read(desktop), NVME).is_bridge


@children
async def test_a_device_off_the_bus_does_not_answer(desktop: RecordedHost) -> None:
    for header in (b"\xff" * 64, b"\xde\x10" + b"\0" * 30, b"\x86\x80" + b"\0" * 62, b"\0" * 64):
        (desktop.device(GPU) / "config").write_bytes(header)

        tree = await read(desktop)

        assert silent(tree) == [GPU], header
        assert at(tree, GPU).ids == "10de:2204"  # the kernel remembers


@children
@pytest.mark.parametrize(("vendor", "header"), [("0xffff", b"\xff" * 64), ("junk", b"\0" * 64)])
async def test_a_device_that_was_never_known_does_not_answer(
    desktop: RecordedHost, vendor: str, header: bytes
) -> None:
    (desktop.device(GPU) / "vendor").write_text(vendor)
    (desktop.device(GPU) / "config").write_bytes(header)

    assert silent(await read(desktop)) == [GPU]


@children
async def test_a_function_in_a_reset_without_end_is_silent_and_the_others_answer(
    desktop: RecordedHost,
) -> None:
    config = desktop.device(GPU) / "config"
    config.unlink()
    os.mkfifo(config)
    sysfs = Sysfs(desktop.sysfs)

    for _ in range(2):
        assert silent(await livebus.read(sysfs, 1)) == [GPU]


async def test_a_bridge_is_never_asked(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function("0000:40:01.0", class_code=0x060400, header_type=1)
    kernel.add_function("0000:41:00.0")
    kernel.hang("devices/0000:40:01.0/config")

    tree = await livebus.read(kernel.sysfs)

    assert [one.config_header != b"" for one in tree.functions.values()] == [False, True]


async def test_a_host_without_pci_is_no_fault(tmp_path: Path) -> None:
    assert await livebus.read(Sysfs(tmp_path)) == PciTree({})


@children
async def test_a_look_that_fails_is_no_silence(
    desktop: RecordedHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(command._ENVIRONMENT, "PATH", "/nonexistent")

    with pytest.raises(GpudError, match="not one of"):
        await read(desktop)
