"""What the fake kernel keeps of a function, and the files with which a real one would show it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gpud.model import PciAddress

GPU_BARS = (16 * 2**20, 80 * 2**30, 32 * 2**20)
SUBSYSTEM_DEVICE = 0x16C1
INTERRUPTS = """\
           CPU0       CPU1
  0:          9          0  IR-IO-APIC   2-edge      timer
 24:          0        731  IR-PCI-MSI 0-edge      nvme0q0
"""
_PREFETCHABLE_64_BIT_MEMORY = 0x14220C


@dataclass
class Function:
    """What the kernel knows about a function besides what the tree shows."""

    address: PciAddress
    vendor: int
    device: int
    home: Path
    methods: tuple[str, ...]
    header: bytes
    override: str = ""
    driver: str | None = None
    stuck: bool = False
    refused: set[str] = field(default_factory=set)
    unconfirmed: set[str] = field(default_factory=set)
    slow_reset_s: float = 0.0

    @property
    def ids(self) -> str:
        return f"{self.vendor:04x}:{self.device:04x}"


@dataclass
class Fault:
    path: str
    of: PciAddress | None
    errno: int | None  # None: it hangs
    late: tuple[Function | None, str] | None = None  # the write that hangs

    def hits(self, path: str, address: PciAddress | None) -> bool:
        return path == self.path and self.of in {None, address}


def header_of(
    vendor: int, device: int, class_code: int, revision: int, header_type: int
) -> bytearray:
    """The standard header of a function's config space, its BARs not yet in it."""
    header = bytearray(64)
    header[0x00:0x04] = vendor.to_bytes(2, "little") + device.to_bytes(2, "little")
    header[0x04:0x06] = (0x0002).to_bytes(2, "little")  # answers memory accesses
    header[0x08] = revision
    header[0x09:0x0C] = class_code.to_bytes(3, "little")
    header[0x0E] = header_type
    header[0x2C:0x30] = vendor.to_bytes(2, "little") + SUBSYSTEM_DEVICE.to_bytes(2, "little")
    return header


def place_bars(header: bytearray, address: PciAddress, sizes: Sequence[int]) -> str:
    """Give a function its BARs, in its header and in what ``resource`` says."""
    lines = [f"{0:#018x} {0:#018x} {0:#018x}"] * 13
    for index, size in enumerate(sizes):
        first = (address.bus << 44) + (address.function << 42) + (index << 40)
        header[0x10 + 8 * index : 0x18 + 8 * index] = (first | 0xC).to_bytes(8, "little")
        last = first + size - 1
        lines[2 * index] = f"{first:#018x} {last:#018x} {_PREFETCHABLE_64_BIT_MEMORY:#018x}"
    return "\n".join(lines)


def write_files(
    home: Path, attributes: Mapping[str, str], header: bytes, reset_methods: Sequence[str]
) -> None:
    (home / "power").mkdir(parents=True)
    files = {name: f"{content}\n".encode() for name, content in attributes.items()}
    if reset_methods:
        files |= {"reset": b"", "reset_method": f"{' '.join(reset_methods)}\n".encode()}
    files["config"] = header
    for name, content in files.items():
        create(f"{home}/{name}", content)


def create(path: str | Path, content: bytes) -> None:
    """``Path.write_bytes`` in a third of the time: hosts are made by the hundred, of many files each."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.write(file, content)
    finally:
        os.close(file)


def link(link: Path, target: Path) -> None:
    """Make a relative link, as sysfs has them."""
    link.symlink_to(os.path.relpath(target, link.parent))
