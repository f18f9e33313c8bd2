from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from gpud.errors import GpudError
from gpud.host import pci
from gpud.host.pci import Bar, PciFunction, PciTree
from gpud.model import PciAddress
from tests.unit.fakes import recorded_host
from tests.unit.fakes.recorded_host import RecordedHost

GPU = "0000:01:00.0"
AUDIO = "0000:01:00.1"


@pytest.fixture
def desktop(tmp_path: Path) -> RecordedHost:
    return recorded_host.unfold("rtx3090", tmp_path)


def at(tree: PciTree, address: str) -> PciFunction:
    found = tree.get(PciAddress.parse(address))
    assert found is not None
    return found


def addresses(functions: tuple[PciFunction, ...]) -> list[str]:
    return [str(one.address) for one in functions]


def test_tells_all_of_a_function(desktop: RecordedHost) -> None:
    gpu = at(pci.read(desktop.sysfs), GPU)

    assert gpu == PciFunction(
        address=PciAddress(0, 1, 0, 0),
        vendor=0x10DE,
        device=0x2204,
        subsystem_vendor=0x1458,
        subsystem_device=0x4043,
        class_code=0x030000,
        revision=0xA1,
        driver="nvidia",
        iommu_group=18,
        numa_node=None,
        bars=(
            Bar(16 * 2**20, is_64bit=False, prefetchable=False),
            Bar(256 * 2**20, is_64bit=True, prefetchable=True),
            Bar(32 * 2**20, is_64bit=True, prefetchable=True),
        ),
        reset_methods=("flr",),
        power_state="D0",
        d3cold_allowed=True,
        upstream=(PciAddress(0, 0, 1, 0),),
    )


def test_tells_the_kinds_of_functions_apart(desktop: RecordedHost) -> None:
    tree = pci.read(desktop.sysfs)
    gpu, audio, port = at(tree, GPU), at(tree, AUDIO), at(tree, "0000:00:01.0")

    assert (gpu.ids, gpu.is_nvidia, gpu.is_display) == ("10de:2204", True, True)
    assert (audio.ids, audio.is_nvidia, audio.is_display) == ("10de:1aef", True, False)
    assert (port.is_bridge, gpu.is_bridge, audio.is_bridge) == (True, False, False)
    assert not any(one.is_nvswitch for one in (gpu, audio, port))
    assert at(tree, "0000:00:02.0").is_display  # Intel's, so not NVIDIA's
    assert not at(tree, "0000:00:02.0").is_nvidia


def test_a_card_is_what_sits_in_one_slot(desktop: RecordedHost) -> None:
    tree = pci.read(desktop.sysfs)

    assert addresses(tree.card(PciAddress.parse(AUDIO))) == [GPU, AUDIO]
    assert addresses(tree.card(PciAddress.parse("0000:02:00.0"))) == ["0000:02:00.0"]
    assert tree.card(PciAddress.parse("0000:03:00.0")) == ()


def test_functions_come_in_the_order_of_their_addresses(desktop: RecordedHost) -> None:
    for name in ("10000:e1:00.0", "0000:00:1f.6"):
        link = desktop.device(name)
        link.symlink_to(f"../../../devices/pci0000:00/{name}")
        link.resolve().mkdir(parents=True)

    found = list(pci.read(desktop.sysfs).functions)

    assert found == sorted(found)
    assert str(found[-1]) == "10000:e1:00.0"


def test_a_device_below_another_root_is_below_all_devices_on_the_way(tmp_path: Path) -> None:
    link = tmp_path / "bus/pci/devices/10000:e1:00.0"  # Intel VMD: a PCI domain behind a PCI device
    link.parent.mkdir(parents=True)
    link.symlink_to(
        "../../../devices/pci0000:00/0000:00:0e.0/pci10000:e0/10000:e0:06.0/10000:e1:00.0"
    )
    link.resolve().mkdir(parents=True)

    assert at(pci.read(tmp_path), "10000:e1:00.0").upstream == (
        PciAddress.parse("0000:00:0e.0"),
        PciAddress.parse("10000:e0:06.0"),
    )


@pytest.mark.parametrize("what_is_gone", ["link", "device"])
def test_a_function_that_vanishes_is_left_out(desktop: RecordedHost, what_is_gone: str) -> None:
    before = pci.read(desktop.sysfs)
    if what_is_gone == "link":
        desktop.vanish(AUDIO)
    else:
        shutil.rmtree(desktop.device(AUDIO).resolve())

    after = pci.read(desktop.sysfs)

    assert set(before.functions) - set(after.functions) == {PciAddress.parse(AUDIO)}
    assert addresses(after.group(18)) == [GPU]


@pytest.mark.parametrize(
    "broken", [b"", b"\x00\xff\xfe garbage", b"0x", b"18446744073709551616x", b"-"]
)
def test_a_function_that_tells_garbage_stays_in_its_group(
    desktop: RecordedHost, broken: bytes
) -> None:
    for attribute in desktop.device(AUDIO).iterdir():
        if attribute.is_file():
            attribute.write_bytes(broken)

    tree = pci.read(desktop.sysfs)
    audio = at(tree, AUDIO)

    assert addresses(tree.group(18)) == [GPU, AUDIO]
    assert (audio.ids, audio.class_code, audio.answers) == ("0000:0000", 0, False)
    assert (audio.bars, audio.numa_node, audio.d3cold_allowed) == ((), None, None)
    assert not audio.is_display
    assert not audio.is_bridge
    assert at(tree, GPU).ids == "10de:2204"


def test_what_is_missing_is_unknown(tmp_path: Path) -> None:
    link = tmp_path / "bus/pci/devices" / GPU
    link.mkdir(parents=True)

    gpu = at(pci.read(tmp_path), GPU)

    assert gpu == PciFunction(PciAddress.parse(GPU), 0, 0, 0, 0, 0)
    assert (gpu.power_state, gpu.driver) == ("unknown", None)
    assert (gpu.iommu_group, gpu.reset_methods, gpu.upstream) == (None, (), ())


def test_a_link_to_a_group_that_is_no_number_is_no_group(desktop: RecordedHost) -> None:
    link = desktop.device(GPU) / "iommu_group"
    link.unlink()
    link.symlink_to("../../../../kernel/iommu_groups/\N{SUPERSCRIPT TWO}")

    assert at(pci.read(desktop.sysfs), GPU).iommu_group is None


def test_no_function_is_asked_itself(desktop: RecordedHost) -> None:
    for device in (desktop.sysfs / "bus/pci/devices").iterdir():
        for name in ("config", "driver_override"):  # whoever opened them would wait
            (device / name).unlink()
            os.mkfifo(device / name)

    tree = pci.read(desktop.sysfs)

    assert at(tree, GPU).config_header == b""
    assert not at(tree, GPU).answers
    assert at(tree, "0000:00:01.0").is_bridge  # by the class it had


def test_only_memory_bars_count(desktop: RecordedHost) -> None:
    (desktop.device(GPU) / "resource").write_text(
        "0x00000000a0000000 0x00000000a0ffffff 0x0000000000040200\n"
        "0x0000000000000000 0x0000000000000000 0x0000000000000000\n"
        "0x0000000000000000 0x00000000000000ff 0x0000000000140204\n"  # not assigned
        "0x00000000a1000000 0x00000000a0ffffff 0x0000000000040200\n"  # empty
        "not a resource\n"
        "0x000000000000e000 0x000000000000e07f 0x0000000000040101\n"  # I/O ports
        "0x00000000a2000000 0x00000000a207ffff 0x0000000000046200\n"  # ROM
        "0x00000000b0000000 0x00000000b0ffffff 0x0000000000140204\n"  # of virtual functions
    )

    assert at(pci.read(desktop.sysfs), GPU).bars == (
        Bar(16 * 2**20, is_64bit=False, prefetchable=False),
        Bar(256, is_64bit=True, prefetchable=False),
    )


def test_d3cold_may_be_forbidden(desktop: RecordedHost) -> None:
    (desktop.device(GPU) / "d3cold_allowed").write_text("0\n")

    assert at(pci.read(desktop.sysfs), GPU).d3cold_allowed is False


def test_what_is_no_function_is_passed_over(desktop: RecordedHost) -> None:
    before = pci.read(desktop.sysfs)
    (desktop.sysfs / "bus/pci/devices/readme").mkdir()

    assert pci.read(desktop.sysfs) == before


def test_a_host_without_pci_has_no_functions(tmp_path: Path) -> None:
    assert pci.read(tmp_path).functions == {}


@pytest.mark.parametrize("call", ["listdir", "open", "readlink"])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_who_cannot_look_does_not_say_that_nothing_is_there(
    desktop: RecordedHost, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def exhausted(*_arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, exhausted)
        with pytest.raises(GpudError, match="the PCI bus cannot be read") as told:
            pci.read(desktop.sysfs)
    assert told.value.transient
    assert len(pci.read(desktop.sysfs).functions) > 2
