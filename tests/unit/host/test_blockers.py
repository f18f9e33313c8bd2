from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from gpud.host import blockers, iommu, pci
from gpud.host.holders import Holder, Holders, Process
from gpud.host.pci import PciTree
from gpud.model import PciAddress
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.orders import quick_directory

GPU = PciAddress.parse("0000:41:00.0")
AUDIO = PciAddress.parse("0000:41:00.1")
USB = PciAddress.parse("0000:41:00.2")
NIC = PciAddress.parse("0000:42:00.0")
CARD = [GPU, AUDIO]


@pytest.fixture
def kernel() -> Iterator[FakeKernel]:
    with quick_directory() as root:
        kernel = FakeKernel(root)
        kernel.add_function(GPU, driver="nvidia", group=12)
        kernel.add_function(AUDIO, device=0x22BA, class_code=0x040300, group=12, reset_methods=())
        yield kernel


def read(kernel: FakeKernel) -> PciTree:
    tree = pci.read(kernel.sysfs.root)
    configs = {one: (kernel.home(one) / "config").read_bytes() for one in tree.functions}
    return tree.with_headers(configs)


def blocked(kernel: FakeKernel, functions: Sequence[PciAddress] = CARD) -> list[str]:
    facts = iommu.facts(kernel.sysfs.root, kernel.proc)
    return list(map(str, blockers.blockers(kernel.sysfs, functions, read(kernel), facts)))


def used(
    kernel: FakeKernel,
    used_by: Mapping[PciAddress, Sequence[Process]] | None = None,
    *,
    persistence_off: Collection[PciAddress] = (),
) -> list[str]:
    holders = Holders(kernel.proc, used_by or {}, persistence_off)
    return list(map(str, blockers.in_use(kernel.sysfs, CARD, read(kernel), holders)))


def says(process: str) -> list[str]:
    return [f"{GPU} (10de:2330) is in use by {process}: stop that first"]


def test_a_card_with_nothing_in_the_way_is_not_blocked(kernel: FakeKernel) -> None:
    assert blocked(kernel) == []
    assert used(kernel) == []


# -- the host --------------------------------------------------------------------------------------


def test_an_iommu_that_is_off_is_told_with_how_to_turn_it_on(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function(GPU)

    (only,) = blocked(kernel, [GPU])
    assert only.startswith("the IOMMU is off: ")
    assert "intel_iommu=on" in only


def test_interrupts_that_are_not_remapped_block_whatever_vfio_was_told(kernel: FakeKernel) -> None:
    (kernel.proc / "interrupts").write_text("  0:   9   IO-APIC   2-edge   timer\n")
    (strict,) = blocked(kernel)
    parameters = kernel.sysfs.root / "module/vfio_iommu_type1/parameters"
    parameters.mkdir(parents=True)
    (parameters / "allow_unsafe_interrupts").write_text("Y\n")
    (loose,) = blocked(kernel)

    assert "does not remap interrupts, so a guest could forge the host's: turn on x2APIC" in strict
    assert "allow_unsafe_interrupts=1 must not make up for it: turn on x2APIC" in loose


def test_a_missing_vfio_pci_is_told(kernel: FakeKernel) -> None:
    kernel.remove_driver("vfio-pci")

    (only,) = blocked(kernel)
    assert "gpud setup" in only


# -- the functions ---------------------------------------------------------------------------------


def test_a_function_that_is_gone_or_dead_is_told(kernel: FakeKernel) -> None:
    kernel.fall_off(GPU)
    kernel.pull(AUDIO)

    dead, gone = blocked(kernel)
    assert dead.startswith("0000:41:00.0 (10de:2330) does not answer: it fell off the bus")
    assert gone.startswith("0000:41:00.1 is not there")
    assert used(kernel) == []


def test_a_bridge_is_never_handed_over(kernel: FakeKernel) -> None:
    bridge = kernel.add_function("0000:40:01.0", class_code=0x060400, upstream=(), group=12)

    (only,) = blocked(kernel, [*CARD, bridge])
    assert only == "0000:40:01.0 (10de:2330) is a PCI bridge, which stays with the host"


def test_a_gpu_that_cannot_be_reset_is_told_a_companion_is_not(kernel: FakeKernel) -> None:
    (kernel.home(GPU) / "reset").unlink()

    (only,) = blocked(kernel)
    assert only.startswith("0000:41:00.0 (10de:2330) cannot be reset")


def test_a_function_that_the_iommu_leaves_out_is_told(kernel: FakeKernel) -> None:
    bare = kernel.add_function("0000:43:00.0")

    (only,) = blocked(kernel, [*CARD, bare])
    assert only.startswith("0000:43:00.0 (10de:2330) is in no IOMMU group")


@pytest.mark.parametrize("place", ["graphics/fb0", "simple-framebuffer.0/graphics/fb0"])
def test_a_card_that_shows_the_hosts_console_is_told(kernel: FakeKernel, place: str) -> None:
    kernel.add_node(GPU, place)
    kernel.add_node(GPU, "drm/card0")

    (only,) = blocked(kernel)
    assert only.startswith(f"{GPU} (10de:2330) shows the host's console (fb0): ")


# -- the group -------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["mlx5_core", "vfio-pci", None])
def test_a_foreign_device_in_the_group_blocks_whatever_drives_it(
    kernel: FakeKernel, driver: str | None
) -> None:
    kernel.add_function(NIC, vendor=0x15B3, device=0x101E, driver=driver, group=12)

    (only,) = blocked(kernel)
    assert only.startswith(
        "IOMMU group 12 holds a foreign device, 0000:42:00.0 (15b3:101e,"
        f" {'driver ' + driver if driver else 'no driver'}): "
    )


def test_a_companion_on_a_host_driver_that_is_not_handed_over_blocks(kernel: FakeKernel) -> None:
    kernel.add_function(USB, device=0x1AD8, class_code=0x0C0330, driver="xhci_hcd", group=12)

    (only,) = blocked(kernel)
    assert "group 12 holds 0000:41:00.2 (10de:1ad8, driver xhci_hcd) too" in only


@pytest.mark.parametrize("driver", ["pci-stub", "vfio-pci", None])
def test_a_companion_that_no_host_driver_has_is_viable(
    kernel: FakeKernel, driver: str | None
) -> None:
    kernel.add_function(USB, device=0x1AD8, class_code=0x0C0330, driver=driver, group=12)

    assert blocked(kernel) == []


def test_bridges_in_the_group_do_not_block(kernel: FakeKernel) -> None:
    kernel.add_function(
        "0000:40:01.0", class_code=0x060400, driver="pcieport", upstream=(), group=12
    )

    assert blocked(kernel) == []


# -- permissions -----------------------------------------------------------------------------------


def test_every_file_that_may_not_be_written_is_named_with_the_mend(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    kernel.remove_driver("vfio-pci")
    kernel.add_driver("vfio-pci")

    (only,) = blocked(kernel)

    mend, _, files = only.partition("; the files: ")
    root = f"{kernel.sysfs.root}/bus/pci"
    assert files.split(", ") == [
        f"{root}/devices/{GPU}/power/control",
        f"{root}/devices/{GPU}/d3cold_allowed",
        f"{root}/devices/{GPU}/driver_override",
        f"{root}/devices/{GPU}/reset",
        f"{root}/devices/{GPU}/reset_method",
        f"{root}/drivers/nvidia/unbind",
        f"{root}/devices/{AUDIO}/power/control",
        f"{root}/devices/{AUDIO}/d3cold_allowed",
        f"{root}/devices/{AUDIO}/driver_override",
        f"{root}/drivers_probe",
        f"{root}/drivers/vfio-pci/unbind",
    ]
    assert mend.startswith("gpud may not write 11 of the files that a hand-over writes: install ")
    assert "systemd/71-gpud.rules" in mend


def test_files_that_are_not_there_need_no_permission(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel.home(GPU) / "d3cold_allowed").unlink()
    monkeypatch.setattr(
        os, "access", lambda file, _: not str(file).endswith(f"{GPU}/d3cold_allowed")
    )

    assert blocked(kernel) == []


# -- who uses it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/dev/nvidia3", "/dev/vfio/12", "/dev/dri/card1"])
def test_a_process_with_a_node_of_the_card_open_is_named(kernel: FakeKernel, path: str) -> None:
    told = kernel.proc / f"driver/nvidia/gpus/{GPU}"
    told.mkdir(parents=True)
    (told / "information").write_text("Model: \t\t NVIDIA H100\nDevice Minor: \t 3\n")
    kernel.add_node(GPU, "drm/card1")
    kernel.add_process(77, "python3", "/dev/null", path)

    assert says("python3 (pid 77)")[0] in used(kernel)


def test_other_processes_and_files_are_nothing_to_it(kernel: FakeKernel) -> None:
    kernel.add_node(GPU, "drm/card1")
    kernel.add_process(77, "python3", "/dev/vfio/13", "/home/me/card1", "/dev/nvidia3", "pipe:[1]")
    (kernel.proc / "78").mkdir()  # has ended
    kernel.add_process(79, "ending")
    (kernel.proc / "79/fd").rmdir()
    (kernel.proc / "self").mkdir()

    assert used(kernel) == []


def test_files_closed_while_they_are_looked_at_are_nothing_to_it(kernel: FakeKernel) -> None:
    kernel.add_process(77, "python3")
    (kernel.proc / "77/fd/0").touch()  # no link any more

    assert used(kernel) == []


def test_gpud_itself_and_what_came_of_it_are_not_holders(kernel: FakeKernel) -> None:
    kernel.add_process(99998, "probe) S 1 (", "/dev/vfio/12", parent=os.getpid())
    kernel.add_process(99999, "reader", "/dev/vfio/12", parent=99998)
    assert used(kernel) == []

    kernel.add_process(os.getpid(), "gpud", "/dev/vfio/12")
    assert used(kernel) == []


@pytest.mark.parametrize("name", ["nv-hostengine", "dcgm-exporter"])
def test_daemons_that_keep_nvidia_gpus_open_are_named_though_not_seen_into(
    kernel: FakeKernel, name: str
) -> None:
    kernel.add_process(77, name, readable=False)

    assert used(kernel, persistence_off=[GPU]) == says(f"{name} (pid 77)")


def test_nvidia_persistenced_holds_what_it_keeps_and_is_told_how_to_let_go(
    kernel: FakeKernel,
) -> None:
    kernel.add_process(77, "nvidia-persistenced", readable=False)

    (only,) = used(kernel, persistence_off=[NIC])

    assert only == (
        f"{GPU} (10de:2330) is in use by nvidia-persiste (pid 77):"
        f" nvidia-smi -i {GPU} -pm 0, or stop nvidia-persistenced"
    )


def test_nvidia_persistenced_does_not_hold_a_gpu_whose_persistence_mode_is_off(
    kernel: FakeKernel,
) -> None:
    kernel.add_process(77, "nvidia-persistenced", readable=False)

    assert used(kernel, persistence_off=[GPU]) == []


def test_what_all_holders_need_to_let_go_is_told_once_each(kernel: FakeKernel) -> None:
    kernel.add_process(77, "nvidia-persistenced", readable=False)
    kernel.add_process(78, "python3", "/dev/vfio/12")
    kernel.add_process(79, "python3", "/dev/vfio/12")

    found = used(kernel)

    assert found[0].count("stop that first") == 1
    assert f"nvidia-smi -i {GPU} -pm 0" in found[0]


def test_such_a_daemon_does_not_hold_what_nvidia_does_not_drive(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function(GPU, driver="vfio-pci", group=12)
    kernel.add_process(77, "nvidia-persistenced", readable=False)
    kernel.add_process(78, "bash", readable=False)

    assert used(kernel) == []


def test_such_a_daemon_that_can_be_seen_into_and_has_nothing_open_is_no_holder(
    kernel: FakeKernel,
) -> None:
    kernel.add_process(77, "nvidia-persistenced", "/dev/nvidia7")

    assert used(kernel) == []


def test_what_nvml_found_is_told_once(kernel: FakeKernel) -> None:
    kernel.add_process(77, "python3", "/dev/vfio/12")

    found = used(kernel, {GPU: [Holder(77, "/usr/bin/python3"), Holder(5, "Xorg")]})

    assert found[0] == says("Xorg (pid 5), python3 (pid 77)")[0]


def test_a_function_in_no_group_has_no_group_node(tmp_path: Path) -> None:
    kernel = FakeKernel(tmp_path)
    kernel.add_function(GPU)
    kernel.add_process(77, "python3", "/dev/vfio/None")

    assert used(kernel) == []
