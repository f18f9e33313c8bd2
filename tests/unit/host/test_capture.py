from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from gpud.host import iommu, pci
from gpud.host.capture import HOST_FILE, NVML_FILE, capture
from gpud.host.nvml import HolderProcess, Nvml, NvmlGpu, NvmlReport
from gpud.model import PciAddress
from tests.fake_nvml.library import build
from tests.unit.conftest import Recorded
from tests.unit.fakes import recorded_host

H100 = PciAddress.parse("0000:18:00.0")
A100, PEER = PciAddress.parse("0000:17:00.0"), PciAddress.parse("0000:31:00.0")


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def replay(files: dict[str, str], directory: Path) -> recorded_host.RecordedHost:
    recorded = directory / "recorded"
    recorded.mkdir(parents=True)
    for name, text in files.items():
        (recorded / name).write_text(text)
    return recorded_host.unfold_directory(recorded, directory / "root")


@pytest.mark.parametrize("name", recorded_host.names())
def test_a_replayed_capture_is_the_same_host(name: str, tmp_path: Path, recorded: Recorded) -> None:
    host = recorded(name)

    files = capture(host.sysfs, host.proc, NvmlReport())
    again = replay(files, tmp_path / "second")

    assert told(files[HOST_FILE]) == told((recorded_host.HOSTS / name / HOST_FILE).read_text())
    assert pci.read(again.sysfs) == pci.read(host.sysfs)
    assert iommu.facts(again.sysfs, again.proc) == iommu.facts(host.sysfs, host.proc)
    for file in ("stat", "meminfo", "interrupts"):
        assert (again.proc / file).read_text() == (host.proc / file).read_text()
    nodes = "devices/system/node/node0"
    for file in ("cpulist", "cpumap", "meminfo", "hugepages/hugepages-2048kB/nr_hugepages"):
        text = (again.sysfs / nodes / file).read_text()
        assert text == (host.sysfs / nodes / file).read_text()


def test_a_sick_host_is_captured_as_it_is(tmp_path: Path) -> None:
    host = recorded_host.unfold("rtx4090-x8", tmp_path / "first")
    gpu = host.device("0000:16:00.0")
    (gpu / "config").write_bytes(b"\xff" * 64)
    (gpu / "power_state").write_text("D3cold\n")
    (host.device("0000:36:00.0") / "d3cold_allowed").unlink()
    (host.device("0000:46:00.0") / "power_state").unlink()
    (host.device("0000:56:00.1") / "iommu_group").unlink()
    host.vanish("0000:a8:00.0")
    parameter = host.sysfs / "module/vfio_iommu_type1/parameters/allow_unsafe_interrupts"
    parameter.parent.mkdir(parents=True)
    parameter.write_text("Y\n")

    again = replay(capture(host.sysfs, host.proc, NvmlReport()), tmp_path / "second")

    assert pci.read(again.sysfs) == pci.read(host.sysfs)
    assert (again.device("0000:16:00.0") / "config").read_bytes() == b"\xff" * 64
    assert iommu.facts(again.sysfs, again.proc).unsafe_interrupts_allowed


def test_a_function_that_cannot_be_asked_does_not_answer(tmp_path: Path) -> None:
    host = recorded_host.unfold("rtx3090", tmp_path)
    (host.device("0000:01:00.0") / "config").unlink()

    text = capture(host.sysfs, host.proc, NvmlReport())[HOST_FILE]

    assert [line for line in text.splitlines() if "answers: false" in line] == [
        line for line in text.splitlines() if "10de:2204" in line
    ]


def test_newer_kernels_name_a_device_with_each_interrupt_chip(tmp_path: Path) -> None:
    host = recorded_host.unfold("l40s-x2-mixed", tmp_path)
    (host.proc / "interrupts").write_text(
        "            CPU0       CPU1       CPU2       CPU3\n"
        "   9:          0          7          0          0  IR-IO-APIC    9-fasteoi   acpi\n"
        "  28:          0          0          1          0  IR-PCI-MSI-0000:60:00.2    0-edge  AMD-Vi\n"
        " 131:          0          0          0          0  IR-PCI-MSIX-0000:e1:00.0    0-edge  nvidia\n"
        " 132:          0          0          0          0  IR-PCI-MSIX-0000:e1:00.0    1-edge  nvidia\n"
        " NMI:          1          1          1          1   Non-maskable interrupts\n"
    )

    lines = capture(host.sysfs, host.proc, NvmlReport())[HOST_FILE].splitlines()

    assert 'interrupts: ["IR-IO-APIC", "IR-PCI-MSI", "IR-PCI-MSIX"]' in lines


def test_a_host_that_tells_nothing_is_captured_as_nothing(tmp_path: Path) -> None:
    assert told(capture(tmp_path, tmp_path, NvmlReport())[HOST_FILE]) == [
        'cmdline: ""',
        "interrupts: []",
        "modules: []",
        "nodes:",
        "functions:",
    ]


def test_a_node_that_tells_no_memory_has_none(tmp_path: Path) -> None:
    node = tmp_path / "devices/system/node/node3"
    node.mkdir(parents=True)
    (node.parent / "possible").write_text("3\n")

    lines = told(capture(tmp_path, tmp_path, NvmlReport())[HOST_FILE])

    assert '- {node: 3, cpus: "", memory_kib: 0, hugepages: {}}' in lines


def test_hugepages_are_captured(tmp_path: Path) -> None:
    host = recorded_host.unfold("a100-pcie-x4", tmp_path)
    pool = host.sysfs / "devices/system/node/node1/hugepages/hugepages-1048576kB"
    (pool / "nr_hugepages").write_text("200\n")

    lines = told(capture(host.sysfs, host.proc, NvmlReport())[HOST_FILE])

    assert (
        '- {node: 1, cpus: "32-63", memory_kib: 263987200, hugepages: {2048: 0, 1048576: 200}}'
        in lines
    )


def test_nothing_that_tells_whose_host_it_is_gets_in(tmp_path: Path) -> None:
    host = recorded_host.unfold("hgx-h100-x8", tmp_path)
    (host.proc / "cmdline").write_text(
        "BOOT_IMAGE=/vmlinuz root=UUID=5ec5e700-0000-4000-8000-00000000beef intel_iommu=on "
        "ip=192.0.2.7::192.0.2.1:255.255.255.0:acme-gpu7:eno1:off BOOTIF=01-0c-42-a1-5e-c5-e7 "
        "vfio-pci.ids=10de:2330 token=secret\n"
    )
    gpu = NvmlGpu(
        address=H100,
        name="NVIDIA H100 80GB HBM3",
        uuid="GPU-5ec5e700-1111-2222-3333-444444444444",
        serial="1324522013377",
        processes=(HolderProcess(4711, "/home/acme/secret-model"),),
    )

    text = "".join(capture(host.sysfs, host.proc, NvmlReport((gpu,), "550.90.07")).values())

    assert 'cmdline: "intel_iommu=on vfio-pci.ids=10de:2330"' in text
    for private in ("5ec5e7", "5e-c5", "acme", "secret", "192.0.2", "13245", "4711"):
        assert private not in text
    assert "uuid GPU-00000000-0000-4000-8000-000000000001" in text
    assert "serial 1650000000001" in text


def test_without_cards_there_is_no_file_for_nvml(tmp_path: Path) -> None:
    host = recorded_host.unfold("hgx-h100-vfio", tmp_path)

    files = capture(host.sysfs, host.proc, NvmlReport(problem="NVML is not installed"))

    assert list(files) == [HOST_FILE]


def test_what_a_card_does_not_tell_is_left_out(tmp_path: Path) -> None:
    report = NvmlReport((NvmlGpu(address=H100),), "550.90.07")

    text = capture(tmp_path, tmp_path, report)[NVML_FILE]

    assert told(text) == ["driver_version 550.90.07", "", "card 0000:18:00.0"]


SICK = NvmlGpu(
    address=A100,
    name="NVIDIA A100 80GB PCIe",
    uuid="GPU-00000000-0000-4000-8000-000000000001",
    serial="1650000000001",
    vram_mib=81920,
    pci_ids="10de:20b5",
    subsystem_ids="10de:1533",
    minor=3,
    mig_enabled=True,
    ecc_pending=True,
    ecc_uncorrected=2,
    ecc_uncorrected_lifetime=5,
    retired_pages=7,
    retirement_pending=True,
    remap_pending=True,
    remap_failed=True,
    memory_used_mib=512,
    nvlink_peers=(PEER,),
    persistence=True,
    temperature_c=81,
    power_w=203,
    vbios="92.00.68.00.01",
    inforom="1001.0230.00.03",
)
LOST = dataclasses.replace(
    SICK,
    address=PEER,
    uuid="GPU-00000000-0000-4000-8000-000000000002",
    serial="1650000000002",
    nvlink_peers=(A100,),
    mig_enabled=False,
    ecc_pending=False,
    remap_pending=False,
    remap_failed=False,
    persistence=False,
    power_w=None,
    fault="fell off the bus",
)
SWITCHED = NvmlGpu(
    address=H100,
    name="NVIDIA H100 80GB HBM3",
    uuid="GPU-00000000-0000-4000-8000-000000000001",
    vram_mib=81559,
    pci_ids="10de:2330",
    subsystem_ids="10de:16c1",
    memory_used_mib=0,
    nvswitch=True,
)


@pytest.mark.real_command("gcc", Path(sys.executable).name)
@pytest.mark.parametrize(
    ("name", "gpus"), [("a100-pcie-x4", (SICK, LOST)), ("hgx-h100-x8", (SWITCHED,))]
)
async def test_replayed_nvml_says_the_same(
    name: str, gpus: tuple[NvmlGpu, ...], tmp_path: Path, recorded: Recorded
) -> None:
    host = recorded(name)
    report = NvmlReport(gpus, "550.90.07")

    again = replay(capture(host.sysfs, host.proc, report), tmp_path / "second")

    environment = {"LD_LIBRARY_PATH": str(build()), "FAKE_NVML": str(again.nvml)}
    assert await Nvml(env=environment).report() == report
