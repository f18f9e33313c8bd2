"""Whether an image may be cloned, and whether gpud can sell what comes of it; pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, Literal

from gpud.doctor.check import Check, Group, Level, Verdict
from gpud.golden.facts import Facts
from gpud.golden.traces import TRACES

Firmware = Literal["uefi", "bios"]

_SHOWN: Final = 3
_SEAL: Final = "gpud image seal FILE --in-place"
_OLDEST_CLOUD_INIT: Final = (22, 4)
_NO_MACHINE_ID: Final = {None, "", "uninitialized"}
"""``machine-id(5)``, "First Boot Semantics"."""


def judge(facts: Facts, firmware: Firmware) -> list[Verdict]:
    """Everything there is to say of an image.

    Args:
        facts: What is inside.
        firmware: What guests start with.
    """
    return [*_sealed(facts), *_system(facts), *_boot(facts, firmware), *_cards(facts)]


def faults(verdicts: list[Verdict]) -> list[Verdict]:
    """Those for which the image must not be cloned."""
    return [one for one in verdicts if one.level is Level.FAULT]


def _check(name: str) -> Check:
    return Check(Group.IMAGES, name)


def _sealed(facts: Facts) -> Iterator[Verdict]:
    check = _check("machine-id")
    if facts.machine_id in _NO_MACHINE_ID:
        yield check.ok("each guest makes its own")
    else:
        yield check.fault("it is set, and every guest would have it", _SEAL)
    for trace in TRACES:
        check, paths = _check(trace.name), facts.traces.get(trace.name, ())
        if paths:
            yield check.at(trace.level, f"{_some(paths)}: {trace.why}", _SEAL)
        else:
            yield check.ok("none")
    check = _check("passwords")
    if facts.open_accounts:
        users = ", ".join(facts.open_accounts)
        yield check.fault(
            f"{users} can log in with one, in every guest", "in the image: passwd --lock USER"
        )
    else:
        yield check.ok("no account has one")
    if facts.unread:
        yield _check("other file systems").fault(
            f"{', '.join(facts.unread)}: not looked into, there may be anything",
            "build it with one ext4 file system for all but /boot",
        )


def _system(facts: Facts) -> Iterator[Verdict]:
    yield from _needed(facts, "systemd", "it starts the order's script")
    yield _cloud_init(facts)
    check = _check("sshd")
    if "sshd" not in facts.programs:
        yield check.fault("it is missing: nobody could log in", "apt install openssh-server")
    elif not facts.ssh_enabled:
        yield check.fault("it does not start at boot", "in the image: systemctl enable ssh")
    else:
        yield check.ok("it starts at boot")
    yield _growth(facts)


def _needed(facts: Facts, name: str, why: str) -> Iterator[Verdict]:
    if name in facts.programs:
        yield _check(name).ok("it is there")
    else:
        yield _check(name).fault(f"it is missing: {why}", f"apt install {name}")


def _cloud_init(facts: Facts) -> Verdict:
    check = _check("cloud-init")
    version = facts.versions.get("cloud-init", "")
    if "cloud-init" not in facts.programs:
        return check.fault(
            "it is missing: a guest is told everything by it", "apt install cloud-init"
        )
    if facts.cloud_init_off:
        return check.fault(
            "it is switched off",
            "in the image: rm /etc/cloud/cloud-init.disabled; systemctl unmask cloud-init.service",
        )
    if facts.datasources is not None and "NoCloud" not in facts.datasources:
        return check.fault(
            f"it looks for its seed at {', '.join(facts.datasources) or 'nothing'} alone",
            "datasource_list: [NoCloud, None] in /etc/cloud/cloud.cfg.d/",
        )
    if version and _numbers(version) < _OLDEST_CLOUD_INIT:
        return check.fault(f"version {version} is too old", "22.4 or newer")
    return check.ok(f"{version or 'some version'}, reads gpud's seed")


def _growth(facts: Facts) -> Verdict:
    check = _check("disk growth")
    missing = [name for name in ("growpart", "resize2fs") if name not in facts.programs]
    if missing:
        return check.warning(
            f"{' and '.join(missing)} missing: a guest's disk stays as small as the image",
            "apt install cloud-guest-utils e2fsprogs",
        )
    if not facts.root_is_last:
        return check.warning(
            "a partition lies behind the root's: a guest's disk stays as small as the image",
            "build it with the root partition as the last one",
        )
    return check.ok("the root file system grows with the disk")


def _boot(facts: Facts, firmware: Firmware) -> Iterator[Verdict]:
    check = _check("kernel")
    if not facts.kernels:
        yield check.fault("there is none in /boot", "apt install linux-image-amd64")
    for kernel in facts.kernels:
        if kernel.missing:
            yield check.fault(
                f"{kernel.release} has no {', '.join(kernel.missing)}",
                "a kernel with the virtio drivers",
            )
        elif not kernel.has_initramfs:
            yield check.fault(f"{kernel.release} has no initramfs", "update-initramfs -c -k all")
        else:
            yield check.ok(f"{kernel.release}, with virtio")
    check = _check("boot loader")
    if facts.uefi_loader if firmware == "uefi" else facts.bios_loader:
        yield check.ok(f"found by {firmware.upper()} firmware")
    elif firmware == "uefi":
        yield check.fault(
            "there is no EFI/BOOT/BOOTX64.EFI, the one that UEFI looks for unasked",
            "grub-install --target=x86_64-efi --removable; or guest.firmware: bios",
        )
    else:
        yield check.fault(
            "the first sector holds no code",
            "grub-install --target=i386-pc; or guest.firmware: uefi",
        )
    check = _check("serial console")
    if facts.serial_console:
        yield check.ok("on ttyS0")
    else:
        yield check.warning(
            "the kernel does not talk on ttyS0: gpud console shows nothing of it",
            "console=ttyS0 in GRUB_CMDLINE_LINUX of /etc/default/grub, then update-grub",
        )


def _cards(facts: Facts) -> Iterator[Verdict]:
    check = _check("NVIDIA driver")
    without = [one.release for one in facts.kernels if not one.has_nvidia]
    versions = {version for name, version in facts.versions.items() if "nvidia" in name}
    if facts.kernels and not without:
        yield check.ok(", ".join(sorted(versions)) or "its modules are there")
    else:
        yield check.note(
            f"none for {_some(without)}: customers must bring their own"
            if facts.kernels
            else "none: customers must bring their own",
            "cloud-init/golden/build.sh builds an image with it",
        )
    check = _check("containers")
    missing = [name for name in ("docker", "nvidia-ctk") if name not in facts.programs]
    if missing:
        yield check.note(
            f"no {' and no '.join(missing)}: an ordered docker_image does not start",
            "apt install docker.io nvidia-container-toolkit",
        )
    else:
        yield check.ok("Docker, with NVIDIA's toolkit")


def _some(paths: tuple[str, ...] | list[str]) -> str:
    shown = ", ".join(paths[:_SHOWN])
    return f"{shown} and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else shown


def _numbers(version: str) -> tuple[int, ...]:
    """``25.1.4-0ubuntu0~24.04.1`` begins with 25, 1."""
    upstream = re.split(r"[-~+]", version.partition(":")[2] or version)[0]
    return tuple(int(part) for part in upstream.split(".") if part.isdecimal())
