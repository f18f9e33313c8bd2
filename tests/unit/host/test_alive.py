from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gpud.host import alive, pci
from gpud.host.pci import PciFunction
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import quick_directory

GPU = PciAddress.parse("0000:41:00.0")


class Patient:
    """A GPU, as it was found and as it is now."""

    def __init__(self, root: Path, numbers: tuple[int, ...] = (16 << 20, 80 << 30)) -> None:
        self.kernel = FakeKernel(root)
        self.kernel.add_function(GPU, group=12, bars=numbers)
        found = pci.read(self.kernel.sysfs.root).get(GPU)
        assert found is not None
        self.before: PciFunction = found
        self.header = bytearray((self.kernel.home(GPU) / "config").read_bytes())

    def poke(self, offset: int, *values: int) -> None:
        self.header[offset : offset + len(values)] = bytes(values)

    def say(self, name: str, content: str) -> None:
        (self.kernel.home(GPU) / name).write_text(content)

    def faults(self) -> list[str]:
        return list(alive.faults(self.kernel.sysfs, bytes(self.header), self.before))


@pytest.fixture
def patient() -> Iterator[Patient]:
    with quick_directory() as root:
        yield Patient(root)


def test_a_function_that_is_as_it_was_has_no_fault(patient: Patient) -> None:
    assert patient.faults() == []


@pytest.mark.parametrize(
    "header",
    [
        pytest.param(b"\xff" * 64, id="off the bus"),
        pytest.param(b"", id="unreadable"),
        pytest.param(b"\xde\x10" + b"\x00" * 40, id="cut short"),
        pytest.param(b"\x01\x00" + b"\xff" * 62, id="not ready yet"),
    ],
)
def test_one_that_does_not_answer_has_that_fault_alone(patient: Patient, header: bytes) -> None:
    patient.header = bytearray(header)

    assert not alive.answers(header)
    assert patient.faults() == ["it does not answer"]


@pytest.mark.parametrize(
    ("offset", "values", "fault"),
    [
        (0x02, (0x31, 0x23), "its ids is 10de:2331, and was 10de:2330"),
        (0x08, (0xA2,), "its revision is a2, and was a1"),
        (0x0A, (0x00,), "its class is 030000, and was 030200"),
        (0x2E, (0xFF, 0x16), "its subsystem is 10de:16ff, and was 10de:16c1"),
        (0x04, (0x06, 0xF8), "its command register is nonsense (0xf806)"),
        (0x10, (0x0C, 0, 0, 0, 0, 0, 0, 0), "its BAR 0 points to 0x0, and belongs at 0x"),
    ],
)
def test_what_the_device_says_of_itself_is_held_against_what_it_was(
    patient: Patient, offset: int, values: tuple[int, ...], fault: str
) -> None:
    patient.poke(offset, *values)

    (found,) = patient.faults()
    assert found.startswith(fault)


def test_what_it_said_after_its_guest_is_no_measure(patient: Patient) -> None:
    patient.poke(0x08, 0xA2)
    patient.before = replace(patient.before, config_header=bytes(patient.header))

    assert patient.faults() == ["its revision is a2, and was a1"]


@pytest.mark.parametrize("state", ["D3hot", "D3cold", "error"])
def test_a_power_state_below_d0_is_a_fault(patient: Patient, state: str) -> None:
    patient.say("power_state", f"{state}\n")

    (fault,) = patient.faults()
    assert fault.startswith(f"it is in power state {state}: ")


def test_a_power_state_that_is_not_told_is_none(patient: Patient) -> None:
    patient.say("power_state", "unknown\n")
    unknown = patient.faults()
    (patient.kernel.home(GPU) / "power_state").unlink()

    assert unknown == patient.faults() == []


def test_another_group_is_a_fault(patient: Patient) -> None:
    patient.before = replace(patient.before, iommu_group=13)
    moved = patient.faults()
    (patient.kernel.home(GPU) / "iommu_group").unlink()

    assert moved == ["it is in IOMMU group 12, not in 13"]
    assert patient.faults() == ["it is in IOMMU group none, not in 13"]


def test_bars_of_another_size_are_a_fault(patient: Patient) -> None:
    patient.before = replace(patient.before, bars=patient.before.bars[:1])

    assert patient.faults() == ["its BARs have 16777216, 85899345920 bytes, and had 16777216"]


def test_bars_that_are_gone_are_a_fault(patient: Patient) -> None:
    (patient.kernel.home(GPU) / "resource").unlink()

    assert patient.faults() == ["its BARs have no bytes, and had 16777216, 85899345920"]


def test_a_32_bit_bar_ends_before_the_next(tmp_path: Path) -> None:
    patient = Patient(tmp_path, ())
    bar = 0xF600_0000
    patient.poke(0x10, *bar.to_bytes(4, "little"), 0x01, 0x30, 0, 0)
    lines = [f"{bar:#x} {bar + 0xFFF:#x} 0x40200", "0x3000 0x307f 0x40101"]
    patient.say("resource", "\n".join(lines))
    patient.before = replace(patient.before, bars=(pci.Bar(4096, False, False),))

    assert patient.faults() == []
