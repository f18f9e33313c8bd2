"""The qcow2 format as gpud uses it, through ``qemu-img``.

An image comes from outside, and a qcow2 header can name further files that QEMU opens on its own: a
backing file (``/etc/shadow``, say), an external data file. So the header is judged here first, before
any QEMU program opens the image, and every call states the format: nothing is ever probed.
Source of the offsets: QEMU's ``docs/interop/qcow2.txt``.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from gpud import command
from gpud.errors import Code, GpudError

_HEADER: Final = struct.Struct(">4sIQIIQI")
"""magic, version, backing file offset, its length, cluster bits, virtual size, encryption."""
_MAGIC: Final = b"QFI\xfb"
_INCOMPATIBLE_FEATURES_AT: Final = 72
_CORRUPT: Final = 1 << 1
_EXTERNAL_DATA_FILE: Final = 1 << 2

_SECTOR_BYTES: Final = 512
_BOOT_SIGNATURE: Final = b"\x55\xaa"
_BOOT_SIGNATURE_AT: Final = 510

_CHECK_CORRUPT: Final = 2
_CHECK_LEAKS: Final = 3

_QUICK_S: Final = 30.0
_CHECK_S: Final = 900.0
_CONVERT_S: Final = 3600.0

_OVERLAY_OPTIONS: Final = "compat=1.1,extended_l2=on,cluster_size=128k"
"""Subclusters of 128k/32 = 4 KiB: a guest's page-sized write copies nothing from the base, while L2
tables stay as large as with the default (16 bytes per 128k against 8 per 64k), so QEMU's default
cache still covers 256 GiB. No lazy_refcounts: after a crash they cost a scan of the whole image."""


class Format(Enum):
    """What a disk image is, judged by its first sector."""

    QCOW2 = "qcow2"
    RAW = "raw"


@dataclass(frozen=True, slots=True)
class Info:
    """What QEMU says of an image.

    Attributes:
        virtual_size_bytes: Size of the disk that a guest sees.
        backing_file: Name of the backing file as written in the header; None without one.
    """

    virtual_size_bytes: int
    backing_file: str | None


def judge(path: Path) -> Format:
    """Tell the format of an image from outside, and refuse all that could reach beyond the file.

    Raw disks have no magic number; they are known by the boot signature (55 AA) that both an MBR and
    a GPT disk carry at the end of their first sector.

    Raises:
        GpudError: ``image_invalid``, and why.
    """
    with path.open("rb") as stream:
        sector = stream.read(_SECTOR_BYTES)
    if sector.startswith(_MAGIC) and len(sector) == _SECTOR_BYTES:
        _refuse_references(sector)
        return Format.QCOW2
    if sector[_BOOT_SIGNATURE_AT:] == _BOOT_SIGNATURE:
        return Format.RAW
    raise _invalid(
        "it is neither a qcow2 image nor a raw bootable disk",
        hint="convert it with qemu-img convert -O qcow2; unpack it first if it is compressed",
    )


def _refuse_references(sector: bytes) -> None:
    _, version, backing_offset, _, _, _, encryption = _HEADER.unpack_from(sector)
    if version not in {2, 3}:
        raise _invalid(f"its qcow2 version is {version}, and QEMU knows 2 and 3")
    if backing_offset:
        raise _invalid("it has a backing file", hint="flatten it with qemu-img convert -O qcow2")
    if encryption:
        raise _invalid("it is encrypted", hint="decrypt it with qemu-img convert -O qcow2")
    # Version 2 has no feature bits: other fields, or data, may stand there.
    features = struct.unpack_from(">Q", sector, _INCOMPATIBLE_FEATURES_AT)[0] if version == 3 else 0  # noqa: PLR2004
    if features & _EXTERNAL_DATA_FILE:
        raise _invalid("its data is in another file", hint="qemu-img convert -O qcow2 joins both")
    if features & _CORRUPT:
        raise _invalid("it is marked corrupt", hint="fetch or build it again")


async def info(path: Path) -> Info:
    """Ask QEMU what a qcow2 image is, even while a guest has it open.

    Raises:
        GpudError: ``image_invalid`` when QEMU cannot open it as qcow2.
    """
    done = await command.run(
        "qemu-img",
        "info",
        "-U",
        "--output=json",
        "-f",
        "qcow2",
        path,
        timeout_s=_QUICK_S,
        ok=(0, 1),
    )
    if done.exit_code:
        raise _invalid(f"QEMU cannot open it: {done.stderr}")
    facts = json.loads(done.stdout)
    return Info(facts["virtual-size"], facts.get("backing-filename"))


async def check(path: Path) -> None:
    """Check an image's tables; this also finds one that was cut short.

    Leaked clusters only waste space, and are let pass.

    Raises:
        GpudError: ``image_invalid`` when the image is damaged.
    """
    done = await command.run(
        "qemu-img", "check", "-q", "-f", "qcow2", path,
        timeout_s=_CHECK_S, ok=(0, 1, _CHECK_CORRUPT, _CHECK_LEAKS),
    )  # fmt: skip
    if done.exit_code in {1, _CHECK_CORRUPT}:
        last_words = done.stderr.splitlines()[-1:] or ["no reason given"]
        raise _invalid(f"it is damaged or cut short: {last_words[0]}", hint="fetch it again")


async def convert_raw(source: Path, target: Path) -> None:
    """Turn a raw disk into a qcow2 image; the same disk always gives the same bytes."""
    await command.run(
        "qemu-img", "convert", "-f", "raw", "-O", "qcow2", source, target, timeout_s=_CONVERT_S
    )


async def create_overlay(path: Path, *, backing_file: str, size_bytes: int) -> None:
    """Create an empty overlay, in a few milliseconds whatever the sizes.

    Args:
        path: The new overlay.
        backing_file: Name of the qcow2 base, relative to the overlay's directory.
        size_bytes: Virtual size; past the base's end it reads as zeros.
    """
    await command.run(
        "qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", backing_file,
        "-o", _OVERLAY_OPTIONS, path, str(size_bytes), timeout_s=_QUICK_S,
    )  # fmt: skip


def _invalid(detail: str, hint: str = "") -> GpudError:
    return GpudError(Code.IMAGE_INVALID, detail, hint=hint)
