"""Looking into an image: where its file systems are, and what they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from gpud.errors import Code, GpudError
from gpud.golden import disk as sectors
from gpud.golden import traces
from gpud.golden.disk import Partition
from gpud.golden.ext4 import Ext4
from gpud.golden.facts import VIRTIO, Facts, Kernel

_KERNEL: Final = "vmlinuz-"
_MODULE: Final = re.compile(r"(?m)^(?:[^\s:]*/)?([A-Za-z0-9_-]+)\.ko[a-z.0-9]*(?::|$)")
"""A line of ``modules.dep`` or ``modules.builtin``."""
_PROGRAMS: Final = {
    "systemd": ("/usr/lib/systemd/systemd", "/lib/systemd/systemd"),
    "cloud-init": ("/usr/bin/cloud-init",),
    "sshd": ("/usr/sbin/sshd",),
    "growpart": ("/usr/bin/growpart",),
    "resize2fs": ("/usr/sbin/resize2fs", "/sbin/resize2fs"),
    "docker": ("/usr/bin/dockerd", "/usr/sbin/dockerd"),
    "nvidia-ctk": ("/usr/bin/nvidia-ctk",),
}
_ENABLES_SSH: Final = tuple(
    f"/etc/systemd/system/{target}.wants/{unit}"
    for target in ("multi-user.target", "sockets.target", "ssh.service")
    for unit in ("ssh.service", "sshd.service", "ssh.socket")
)
_BOOT_LOADER: Final = "EFI/BOOT/BOOTX64.EFI"
_BOOT_LOADER_SETTINGS: Final = ("EFI/BOOT/grub.cfg", "EFI/debian/grub.cfg", "EFI/ubuntu/grub.cfg")
_CLOUD_CONFIG: Final = "/etc/cloud/cloud.cfg"
_ASKED_FOR: Final = (
    *(path for paths in _PROGRAMS.values() for path in paths), *_ENABLES_SSH, _CLOUD_CONFIG,
    "/etc/cloud/cloud.cfg.d/", "/etc/systemd/system/", "/var/lib/dpkg/", "/boot/grub/", "/boot/grub2/",
    "/boot/loader/entries/",
)  # fmt: skip
"""Whose directories are listed at once, to save time; what is not here is listed when asked for."""
_LOCKED: Final = ("!", "*")


@dataclass(frozen=True, slots=True)
class Layout:
    """The file systems of an image.

    Attributes:
        root: The one with ``/etc``.
        boot: The one with the kernels; often the root.
        uefi: The part where UEFI firmware looks, if there is one.
        root_is_last: Whether nothing lies behind the root.
        unread: Parts that nothing is known of.
    """

    root: Ext4
    boot: Ext4
    uefi: Partition | None
    root_is_last: bool
    unread: tuple[str, ...]

    @property
    def all(self) -> tuple[Ext4, ...]:
        """Each file system once."""
        return (self.root,) if self.boot is self.root else (self.root, self.boot)

    @property
    def kernels_at(self) -> str:
        """The directory in ``boot`` with the kernels."""
        return "/boot" if self.boot is self.root else ""


async def lay_out(disk: Path) -> Layout:
    """Find the file systems on a disk, and bring them into the state a mount would.

    Raises:
        GpudError: ``image_invalid``: it has no system that can be looked into.
    """
    found = await sectors.partitions(disk)
    held = {one: Ext4(disk, one.start_bytes) for one in found if sectors.holds_ext4(disk, one)}
    for files in held.values():
        await files.mend()
    root = await _first_with(held, "/etc/passwd")
    if root is None:
        raise GpudError(
            Code.IMAGE_INVALID,
            "it has no system on an ext4 partition, and gpud can look into no other",
        )
    boot = await _first_with({one: held[one] for one in held if one != root}, f"/{_KERNEL}*")
    uefi = next((one for one in found if one.is_boot), None)
    unread = (
        f"partition {one.number}"
        for one in found
        if one not in {root, boot, uefi} and not (one.is_bare or sectors.is_empty(disk, one))
    )
    return Layout(
        held[root], held[boot or root], uefi, root_is_last=root == found[-1], unread=tuple(unread)
    )


async def _first_with(held: Mapping[Partition, Ext4], pattern: str) -> Partition | None:
    for one, files in held.items():
        if await files.match(pattern):
            return one
    return None


async def collect(disk: Path, layout: Layout) -> Facts:
    """Look into a disk."""
    root = layout.root
    people = await people_of(root)
    await root.learn([*traces.places(people), *(path.rpartition("/")[0] for path in _ASKED_FOR)])
    machine_id = await root.read("/etc/machine-id")
    text = await _text(root, "/etc/shadow")
    return Facts(
        machine_id=None if machine_id is None else machine_id.decode(errors="replace").strip(),
        traces={
            trace.name: tuple(one.path for one in await traces.find(root, trace, people))
            for trace in traces.TRACES
        },
        open_accounts=_open_accounts(text),
        unread=layout.unread,
        kernels=await _kernels(layout),
        programs=await _programs(root),
        versions=_versions(await _text(root, "/var/lib/dpkg/status")),
        cloud_init_off=await _cloud_init_is_off(root),
        datasources=await _datasources(root),
        ssh_enabled=any([await root.find(path) for path in _ENABLES_SSH]),
        uefi_loader=bool(await _boot_file(disk, layout, _BOOT_LOADER)),
        bios_loader=sectors.has_boot_code(disk),
        serial_console=await _has_serial_console(disk, layout),
        root_is_last=layout.root_is_last,
    )


async def people_of(root: Ext4) -> tuple[str, ...]:
    """The home directories of a system."""
    return traces.homes(await _text(root, "/etc/passwd"))


async def _text(files: Ext4, path: str) -> str:
    return ((await files.read(path)) or b"").decode(errors="replace")


def _open_accounts(shadow: str) -> tuple[str, ...]:
    fields = (line.split(":") for line in shadow.splitlines())
    return tuple(one[0] for one in fields if len(one) > 1 and not one[1].startswith(_LOCKED))


async def _kernels(layout: Layout) -> tuple[Kernel, ...]:
    at = layout.kernels_at
    found = []
    for entry in await layout.boot.match(f"{at}/{_KERNEL}*"):
        release = entry.name.removeprefix(_KERNEL)
        modules = "".join(
            [
                await _text(layout.root, f"/lib/modules/{release}/modules.{kind}") + "\n"
                for kind in ("builtin", "dep")
            ]
        )
        known = {name.replace("-", "_") for name in _MODULE.findall(modules)}
        initramfs = [f"{at}/initrd.img-{release}", f"{at}/initramfs-{release}.img"]
        found.append(
            Kernel(
                release=release,
                has_initramfs=any([await layout.boot.find(path) for path in initramfs]),
                missing=tuple(name for name in VIRTIO if name not in known),
                has_nvidia="nvidia" in known,
            )
        )
    return tuple(sorted(found, key=lambda one: _in_parts(one.release)))


def _in_parts(release: str) -> list[tuple[int, str]]:
    """So that 6.1.0-9 comes before 6.1.0-10."""
    return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", release)]


async def _programs(root: Ext4) -> frozenset[str]:
    return frozenset(
        [
            name
            for name, paths in _PROGRAMS.items()
            if any([await root.find(path) for path in paths])
        ]
    )


def _versions(status: str) -> dict[str, str]:
    """Of cloud-init, and of NVIDIA's packages that carry the driver's own (``dpkg(1)``, status file)."""
    found = {}
    for paragraph in status.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        name = fields.get("Package", "")
        if fields.get("Status", "").endswith(" installed") and (
            name == "cloud-init" or name.startswith(("libnvidia-compute", "libnvidia-ml"))
        ):
            found[name] = fields.get("Version", "")
    return found


async def _cloud_init_is_off(root: Ext4) -> bool:
    if await root.find("/etc/cloud/cloud-init.disabled"):
        return True
    masked = await root.match("/etc/systemd/system/cloud-*")
    return any(one.kind == "link" and one.size_bytes == len("/dev/null") for one in masked)


async def _datasources(root: Ext4) -> tuple[str, ...] | None:
    """What the last file that says so says, as cloud-init merges them: the main one, then by name."""
    parts = await root.match("/etc/cloud/cloud.cfg.d/*.cfg")
    said = None
    for path in (_CLOUD_CONFIG, *sorted(one.path for one in parts)):
        try:
            # All of it as text: an image may hold a date that is none, which no other loader takes.
            text = await _text(root, path)
            section: Any = yaml.load(text, yaml.CBaseLoader)  # noqa: S506 - makes nothing but text
        except yaml.YAMLError:  # cloud-init warns, and goes on without the file
            continue
        if isinstance(section, dict) and isinstance(section.get("datasource_list"), list):
            said = tuple(str(one) for one in section["datasource_list"])
    return said


async def _boot_file(disk: Path, layout: Layout, name: str) -> bytes:
    if layout.uefi is None:
        return b""
    return await sectors.read_boot_file(disk, layout.uefi, name) or b""


async def _has_serial_console(disk: Path, layout: Layout) -> bool:
    """Whether some boot loader's settings name it; those of a GRUB in one piece are in its program."""
    at = layout.kernels_at
    entries = await layout.boot.match(f"{at}/loader/entries/*.conf")
    said = [
        await layout.boot.read(path)
        for path in (f"{at}/grub/grub.cfg", f"{at}/grub2/grub.cfg", *(one.path for one in entries))
    ]
    said += [
        await _boot_file(disk, layout, name) for name in (_BOOT_LOADER, *_BOOT_LOADER_SETTINGS)
    ]
    return any(b"console=ttyS0" in one for one in said if one)
