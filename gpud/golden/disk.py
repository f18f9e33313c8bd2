"""A disk image as a file of sectors, and the parts that it is divided into.

Nothing is mounted and no machine is booted, so neither root nor KVM nor a kernel is needed, and nothing
in an image is ever run: ``sfdisk`` reads the partition table, mtools the boot partition, and ``debugfs``
(``gpud.golden.ext4``) the rest. An appliance of libguestfs sees more kinds of file systems, at the price
of a kernel that its user may read, and of half a minute or more where there is no KVM.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud import command
from gpud.errors import Code, GpudError
from gpud.guest import qcow2

_QUICK_S: Final = 60.0
_CONVERT_S: Final = 3600.0
_BOOT_CODE_BYTES: Final = 440
_SUPERBLOCK_MAGIC_AT: Final = 1024 + 0x38
_EXT_MAGIC: Final = b"\x53\xef"
_BARE_TYPES: Final = {
    "21686148-6449-6E6F-744E-656564454649",  # GRUB's own on GPT, "BIOS boot"
}
_BOOT_TYPES: Final = {"C12A7328-F81F-11D2-BA4B-00A0C93EC93B", "ef"}
"""EFI system partition: on GPT (UEFI specification, 5.3.3) and on MBR (5.2.2)."""


@dataclass(frozen=True, slots=True)
class Partition:
    """A part of a disk.

    Attributes:
        number: As the kernel counts it.
        start_bytes: Where it begins.
        size_bytes: How long it is.
        kind: Its type in the partition table.
    """

    number: int
    start_bytes: int
    size_bytes: int
    kind: str

    @property
    def is_boot(self) -> bool:
        """Whether UEFI firmware looks for a boot loader here."""
        return self.kind in _BOOT_TYPES

    @property
    def is_bare(self) -> bool:
        """Whether it holds code rather than a file system."""
        return self.kind in _BARE_TYPES


async def copy_raw(image: Path, target: Path) -> qcow2.Format:
    """Copy the disk in an image to a new raw file; what was empty stays a hole.

    Raises:
        GpudError: ``image_invalid``: it is no image that may be opened.
    """
    found = qcow2.judge(image)
    await command.run(
        "qemu-img", "convert", "-f", found.value, "-O", "raw", image, target, timeout_s=_CONVERT_S
    )
    return found


async def write_image(disk: Path, target: Path, form: qcow2.Format) -> None:
    """Turn a raw file into an image of that format, a new file ``target``."""
    await command.run(
        "qemu-img", "convert", "-f", "raw", "-O", form.value, disk, target, timeout_s=_CONVERT_S
    )


async def partitions(disk: Path) -> tuple[Partition, ...]:
    """The parts of a disk, in the order in which they lie.

    Raises:
        GpudError: ``image_invalid``: it has no partition table.
    """
    done = await command.run("sfdisk", "--json", disk, timeout_s=_QUICK_S, ok=(0, 1))
    if done.exit_code:
        raise GpudError(Code.IMAGE_INVALID, "it has no partition table")
    table = json.loads(done.stdout)["partitiontable"]
    sector = table.get("sectorsize", 512)
    found = [
        Partition(
            # sfdisk names a partition after the disk, with a p between where that ends in a digit.
            number=int(one["node"].removeprefix(table["device"]).removeprefix("p")),
            start_bytes=one["start"] * sector,
            size_bytes=one["size"] * sector,
            kind=one["type"],
        )
        for one in table.get("partitions", [])
    ]
    return tuple(sorted(found, key=lambda one: one.start_bytes))


def has_boot_code(disk: Path) -> bool:
    """Whether BIOS firmware finds anything to run in the disk's first sector."""
    with disk.open("rb") as stream:
        return any(stream.read(_BOOT_CODE_BYTES))


def holds_ext4(disk: Path, partition: Partition) -> bool:
    """Whether a part holds an ext2, ext3 or ext4 file system, by its superblock."""
    with disk.open("rb") as stream:
        stream.seek(partition.start_bytes + _SUPERBLOCK_MAGIC_AT)
        return stream.read(len(_EXT_MAGIC)) == _EXT_MAGIC


def is_empty(disk: Path, partition: Partition) -> bool:
    """Whether a part begins with nothing, as one that was never formatted does."""
    with disk.open("rb") as stream:
        stream.seek(partition.start_bytes)
        return not any(stream.read(min(partition.size_bytes, 2**17)))


async def read_boot_file(disk: Path, partition: Partition, name: str) -> bytes | None:
    """A file of a FAT partition; None where it has none of that name.

    Args:
        disk: A raw file.
        partition: Where in it.
        name: From the partition's top: ``EFI/BOOT/BOOTX64.EFI``; in upper or lower case.
    """
    done = await command.run(
        "mcopy", "-n", "-i", f"{disk}@@{partition.start_bytes}", f"::/{name}", "-",
        timeout_s=_QUICK_S, ok=(0, 1), env={"MTOOLS_SKIP_CHECK": "1"},
    )  # fmt: skip
    return None if done.exit_code else done.raw
