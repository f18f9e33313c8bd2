from __future__ import annotations

from pathlib import Path

import pytest

from gpud.host import iommu
from gpud.host.iommu import IommuFacts
from tests.unit.fakes import recorded_host
from tests.unit.fakes.recorded_host import RecordedHost

SAFE = IommuFacts(
    present=True,
    interrupt_remapping=True,
    unsafe_interrupts_allowed=False,
    acs_override=False,
)


@pytest.fixture
def host(tmp_path: Path) -> RecordedHost:
    return recorded_host.unfold("a100-pcie-x4", tmp_path)


def facts(host: RecordedHost) -> IommuFacts:
    return iommu.facts(host.sysfs, host.proc)


def parameter(host: RecordedHost, module: str, value: str) -> None:
    file = host.sysfs / "module" / module / "parameters/allow_unsafe_interrupts"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(value)


def test_a_host_as_it_should_be(host: RecordedHost) -> None:
    assert facts(host) == SAFE


def test_a_host_that_tells_nothing_has_nothing(tmp_path: Path) -> None:
    assert iommu.facts(tmp_path, tmp_path) == IommuFacts(
        present=False,
        interrupt_remapping=False,
        unsafe_interrupts_allowed=False,
        acs_override=False,
    )


def test_groups_that_vfio_made_up_are_no_iommu(tmp_path: Path) -> None:
    group = tmp_path / "kernel/iommu_groups/0"
    group.mkdir(parents=True)
    assert iommu.facts(tmp_path, tmp_path).present

    (group / "name").write_text("vfio-noiommu\n")
    assert not iommu.facts(tmp_path, tmp_path).present

    (tmp_path / "kernel/iommu_groups/1").mkdir()
    assert iommu.facts(tmp_path, tmp_path).present


@pytest.mark.parametrize(
    ("line", "remapped"),
    [
        ("  25:          0          0  IR-PCI-MSI 1048576-edge      nvidia", True),
        (" 131:          0          0  IR-PCI-MSIX-0000:18:00.0    0-edge      nvidia", True),
        ("   9:          0          0  IR-IO-APIC    9-fasteoi   acpi", True),
        ("1025:          0          0  IR-PCI-MSI 1048576-edge      nvidia", True),
        ("  25:          0          0  PCI-MSI 1048576-edge      IR-nvidia", False),
        ("  24:          0          0  DMAR-MSI    0-edge      dmar0", False),
        (" IWI:          0          0  IR-work interrupts", False),
        ("", False),
    ],
)
def test_remapping_shows_in_the_names_of_interrupt_chips(
    host: RecordedHost, line: str, remapped: bool
) -> None:
    (host.proc / "interrupts").write_text(f"           CPU0       CPU1\n{line}\n")

    assert facts(host).interrupt_remapping is remapped


@pytest.mark.parametrize("module", ["vfio_iommu_type1", "iommufd"])
@pytest.mark.parametrize(("value", "unsafe"), [("Y\n", True), ("N\n", False), ("\xff", False)])
def test_unsafe_interrupts_are_what_the_module_says(
    host: RecordedHost, module: str, value: str, unsafe: bool
) -> None:
    parameter(host, module, value)

    assert facts(host).unsafe_interrupts_allowed is unsafe


@pytest.mark.parametrize(
    ("argument", "unsafe"),
    [
        ("vfio_iommu_type1.allow_unsafe_interrupts=1", True),
        ("iommufd.allow_unsafe_interrupts=y", True),
        (
            "vfio_iommu_type1.allow_unsafe_interrupts=1 vfio_iommu_type1.allow_unsafe_interrupts=0",
            False,
        ),
        ("vfio_iommu_type1.allow_unsafe_interrupts=N", False),
        ("other.allow_unsafe_interrupts=1", False),
    ],
)
def test_before_the_module_is_loaded_the_kernels_arguments_tell(
    host: RecordedHost, argument: str, unsafe: bool
) -> None:
    (host.proc / "cmdline").write_text(f"quiet {argument}\n")
    assert facts(host).unsafe_interrupts_allowed is unsafe


def test_a_loaded_module_has_the_last_word(host: RecordedHost) -> None:
    (host.proc / "cmdline").write_text("vfio_iommu_type1.allow_unsafe_interrupts=1\n")
    parameter(host, "vfio_iommu_type1", "N\n")

    assert not facts(host).unsafe_interrupts_allowed


@pytest.mark.parametrize(
    ("arguments", "overridden"),
    [
        ("quiet pcie_acs_override=downstream,multifunction", True),
        ("pcie_acs_override", True),
        ("no_pcie_acs_override=1", False),
    ],
)
def test_a_kernel_told_to_split_groups_is_told_on(
    host: RecordedHost, arguments: str, overridden: bool
) -> None:
    (host.proc / "cmdline").write_text(arguments)

    assert facts(host).acs_override is overridden
