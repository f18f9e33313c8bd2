"""What is said of an image, from facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpud.doctor.check import Level, Verdict
from gpud.golden.facts import Facts, Kernel
from gpud.golden.judge import faults, judge
from gpud.golden.traces import TRACES

FIT = Facts(
    kernels=(Kernel("6.1.0-9", has_nvidia=True),),
    programs=frozenset(
        {"systemd", "cloud-init", "sshd", "growpart", "resize2fs", "docker", "nvidia-ctk"}
    ),
    versions={"cloud-init": "25.1.4-0ubuntu0", "libnvidia-ml1": "580.95.05-1"},
)


def said(**changes: Any) -> list[Verdict]:
    """What is not well in an image that differs so from one that is fit."""
    return [one for one in judge(replace(FIT, **changes), "uefi") if one.level is not Level.OK]


def test_an_image_that_is_sealed_and_complete_is_well() -> None:
    verdicts = judge(FIT, "uefi")

    assert {one.level for one in verdicts} == {Level.OK}
    by_name = {one.name: one.what for one in verdicts}
    assert by_name["NVIDIA driver"] == "580.95.05-1"
    assert by_name["cloud-init"] == "25.1.4-0ubuntu0, reads gpud's seed"
    assert not faults(verdicts)


@pytest.mark.parametrize("machine_id", [None, "", "uninitialized"])
def test_a_machine_id_that_is_made_at_boot_is_well(machine_id: str | None) -> None:
    assert not said(machine_id=machine_id)


@pytest.mark.parametrize(
    ("changes", "name", "level"),
    [
        ({"machine_id": "0123456789abcdef0123456789abcdef"}, "machine-id", Level.FAULT),
        ({"open_accounts": ("build",)}, "passwords", Level.FAULT),
        ({"unread": ("partition 3",)}, "other file systems", Level.FAULT),
        ({"programs": FIT.programs - {"systemd"}}, "systemd", Level.FAULT),
        ({"programs": FIT.programs - {"cloud-init"}}, "cloud-init", Level.FAULT),
        ({"cloud_init_off": True}, "cloud-init", Level.FAULT),
        ({"datasources": ("Ec2", "None")}, "cloud-init", Level.FAULT),
        ({"datasources": ()}, "cloud-init", Level.FAULT),
        ({"versions": {"cloud-init": "22.3.4-1"}}, "cloud-init", Level.FAULT),
        ({"versions": {"cloud-init": "1:20.4.1-2"}}, "cloud-init", Level.FAULT),
        ({"programs": FIT.programs - {"sshd"}}, "sshd", Level.FAULT),
        ({"ssh_enabled": False}, "sshd", Level.FAULT),
        ({"programs": FIT.programs - {"growpart"}}, "disk growth", Level.WARNING),
        ({"root_is_last": False}, "disk growth", Level.WARNING),
        ({"kernels": (Kernel("6.1.0-9", missing=("virtio_net",), has_nvidia=True),)},
         "kernel", Level.FAULT),
        ({"kernels": (Kernel("6.1.0-9", has_initramfs=False, has_nvidia=True),)},
         "kernel", Level.FAULT),
        ({"uefi_loader": False}, "boot loader", Level.FAULT),
        ({"serial_console": False}, "serial console", Level.WARNING),
        ({"kernels": (*FIT.kernels, Kernel("6.8.0-1"))}, "NVIDIA driver", Level.NOTE),
        ({"programs": FIT.programs - {"nvidia-ctk"}}, "containers", Level.NOTE),
    ],
)  # fmt: skip
def test_each_thing_that_is_wrong_is_told_once_with_its_mend(
    changes: dict[str, Any], name: str, level: Level
) -> None:
    (verdict,) = said(**changes)

    assert (verdict.name, verdict.level) == (name, level)
    assert verdict.mend


def test_an_image_without_a_kernel_has_no_driver_either() -> None:
    assert [one.name for one in said(kernels=())] == ["kernel", "NVIDIA driver"]


def test_a_cloud_init_of_another_packager_is_taken_at_its_word() -> None:
    assert not said(versions={"libnvidia-ml1": "580.95.05-1"}, datasources=("NoCloud",))


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace.name)
def test_each_trace_is_told_at_its_level_and_with_some_of_its_paths(trace: Any) -> None:
    (verdict,) = said(traces={trace.name: ("/a", "/b", "/c", "/d", "/e")})

    assert (verdict.name, verdict.level) == (trace.name, trace.level)
    assert verdict.what.startswith("/a, /b, /c and 2 more: ")
    assert verdict.mend == "gpud image seal FILE --in-place"


def test_the_boot_loader_is_that_of_the_guests_firmware() -> None:
    bios_only = replace(FIT, uefi_loader=False)
    uefi_only = replace(FIT, bios_loader=False)

    assert not faults(judge(bios_only, "bios"))
    assert not faults(judge(uefi_only, "uefi"))
    (missing,) = faults(judge(uefi_only, "bios"))
    assert "the first sector holds no code" in missing.what
