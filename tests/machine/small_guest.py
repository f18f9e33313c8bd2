"""A small guest for tests that need many boots: the test guest's kernel and initramfs, up in seconds.

It does what cloud-init's seed does in a whole system: it runs the order's startup script and reports that
it was started. Boots are counted in a sector of its disk, so a script can tell them apart (``$BOOT``),
and a test can tell that a guest has come back on the same disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import struct
import tempfile
from pathlib import Path
from typing import Final

from tests.machine.processes import output_of
from tests.machine.server import test_image

GRUB: Final = Path("/usr/lib/grub/i386-pc")
MODULES: Final = (
    "drivers/cdrom/cdrom", "fs/isofs/isofs", "drivers/char/virtio_console",
    "drivers/misc/pvpanic/pvpanic", "drivers/misc/pvpanic/pvpanic-mmio",
)  # fmt: skip
"""What the initramfs has not; in the order in which they are loaded."""

_ROOT_AT_BYTES: Final = 65 * 2**20
"""Where tests/guest/build.sh puts the root file system."""
_SECTOR_BYTES: Final = 512
_KERNEL_AT: Final = 2048
_TABLE: Final = slice(446, 510)
"""Where an MBR has its table of partitions; in GRUB's there is code for floppy disks."""
_DISK_BYTES: Final = 8 * 2**20

INIT: Final = """\
#!/bin/sh
# PID 1. The tools are klibc's, from the initramfs.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mkdir -p /dev /proc /sys /seed
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec </dev/console >/dev/console 2>&1
modprobe virtio_pci
modprobe virtio_blk
modprobe ext4
for module in /extra/*.ko; do
  insmod "$module"
done
mount -t iso9660 -o ro /dev/vdb /seed

mkdir /disk
mount -t ext4 /dev/vda1 /disk
BOOT=0
[ ! -e /disk/boots ] || read -r BOOT </disk/boots
BOOT=$((BOOT + 1))
export BOOT
echo "$BOOT" >/disk/boots
sync

for port in /sys/class/virtio-ports/*; do
  read -r name <"$port/name"
  [ "$name" != ai.gpu.gpud.0 ] || export PORT="/dev/${port##*/}"
done
read -r boot_id </proc/sys/kernel/random/boot_id
echo "small guest: boot $BOOT"
while :; do
  echo "gpud1 started $boot_id" >"$PORT"
  sleep 5
done &
[ ! -e /seed/startup-script ] || sh /seed/startup-script
echo "small guest: script ended with $?"
while :; do
  sleep 3600
done
"""


async def small_guest() -> Path:
    """The image; built where this version of it is not there yet."""
    source = test_image()
    version = hashlib.sha256(Path(__file__).read_bytes() + source.name.encode()).hexdigest()
    image = source.with_name(f"small-guest-{version[:12]}.raw")
    if not image.exists():
        with tempfile.TemporaryDirectory(dir="/var/tmp") as work:
            built = await _build(source, Path(work))
            part = image.with_suffix(f".{os.getpid()}")
            await asyncio.to_thread(part.write_bytes, built)
            part.replace(image)
    return image


async def _build(source: Path, work: Path) -> bytes:
    raw = work / "disk.raw"
    await output_of("qemu-img", "convert", "-O", "raw", str(source), str(raw))
    disk = f"{raw}?offset={_ROOT_AT_BYTES}"
    listed = (await output_of("/usr/sbin/debugfs", "-R", "ls -p /lib/modules/", disk)).splitlines()
    release = next(name for line in listed if (name := line.split("/")[5]).strip("."))

    async def fetch(path: str) -> bytes:
        target = work / Path(path).name
        await output_of("/usr/sbin/debugfs", "-R", f"dump {path} {target}", disk)
        return target.read_bytes()

    kernel = _whole_sectors(await fetch(f"/boot/vmlinuz-{release}"))
    files = {"small-guest": INIT.encode()}
    for number, name in enumerate(MODULES):
        module = await fetch(f"/usr/lib/modules/{release}/kernel/{name}.ko")
        files[f"extra/{number}.ko"] = module
    # Archives of an initramfs may follow each other, the compressed one last.
    initrd = _whole_sectors(_cpio(files) + await fetch(f"/boot/initrd.img-{release}"))
    loader = await _boot_loader(work, len(kernel) // _SECTOR_BYTES, len(initrd) // _SECTOR_BYTES)
    disk_at = _KERNEL_AT + (len(kernel) + len(initrd)) // _SECTOR_BYTES
    partition = struct.pack("<B3xB3xII", 0, 0x83, disk_at, _DISK_BYTES // _SECTOR_BYTES)
    loader[_TABLE] = partition.ljust(64, b"\0")
    return (
        bytes(loader.ljust(_KERNEL_AT * _SECTOR_BYTES, b"\0")) + kernel + initrd + await _ext4(work)
    )


async def _ext4(work: Path) -> bytes:
    """An empty file system: it flushes what it was told to keep, which a bare disk's cache does not."""
    file = work / "disk.ext4"
    size = f"{_DISK_BYTES // 1024}k"
    await output_of("/usr/sbin/mke2fs", "-q", "-t", "ext4", str(file), size)
    return file.read_bytes()


async def _boot_loader(work: Path, kernel_sectors: int, initrd_sectors: int) -> bytearray:
    """GRUB for a disk without a file system: it is told the sectors."""
    initrd_at = _KERNEL_AT + kernel_sectors
    config = work / "grub.cfg"
    config.write_text(
        f"linux (hd0){_KERNEL_AT}+{kernel_sectors} console=ttyS0,115200 quiet"
        " rdinit=/small-guest\n"
        f"initrd (hd0){initrd_at}+{initrd_sectors}\nboot\n"
    )
    core = work / "core.img"
    await output_of("grub-mkimage", "-O", "i386-pc", "-d", str(GRUB), "-c", str(config), "-p", "/",
                    "-o", str(core), "biosdisk", "linux", "boot")  # fmt: skip
    return bytearray((GRUB / "boot.img").read_bytes() + core.read_bytes())


def _whole_sectors(data: bytes) -> bytes:
    return data + bytes(-len(data) % _SECTOR_BYTES)


def _cpio(files: dict[str, bytes]) -> bytes:
    """An archive as the kernel reads it (Documentation/driver-api/early-userspace/buffer-format)."""
    archive = io.BytesIO()
    members = [("extra", 0o040755, b""), *((name, 0o100755, data) for name, data in files.items())]
    for number, (name, mode, data) in enumerate([*members, ("TRAILER!!!", 0, b"")], start=1):
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        archive.write(b"070701" + b"".join(b"%08X" % field for field in fields) + encoded)
        archive.write(bytes(-archive.tell() % 4) + data)
        archive.write(bytes(-archive.tell() % 4))
    return archive.getvalue()
