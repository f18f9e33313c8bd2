"""PCI class codes in words (PCI Code and ID Assignment Specification)."""

from __future__ import annotations

from typing import Final

_SUBCLASSES: Final = {
    0x0101: "IDE controller",
    0x0104: "RAID controller",
    0x0106: "SATA controller",
    0x0107: "SAS controller",
    0x0108: "NVMe drive",
    0x0200: "Ethernet controller",
    0x0207: "InfiniBand controller",
    0x0300: "VGA controller",
    0x0302: "3D controller",
    0x0403: "audio device",
    0x0600: "host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0C03: "USB controller",
    0x0C05: "SMBus",
}
_BASE_CLASSES: Final = {
    0x01: "storage controller",
    0x02: "network controller",
    0x03: "display controller",
    0x04: "multimedia device",
    0x05: "memory controller",
    0x06: "bridge",
    0x07: "communication controller",
    0x08: "system peripheral",
    0x0C: "serial bus controller",
    0x10: "encryption controller",
    0x11: "signal processor",
    0x12: "processing accelerator",
}


def in_words(class_code: int) -> str:
    """What a 24-bit class code stands for: ``audio device``."""
    subclass = class_code >> 8
    fallback = f"device of class {subclass:04x}"
    return _SUBCLASSES.get(subclass) or _BASE_CLASSES.get(subclass >> 8, fallback)
