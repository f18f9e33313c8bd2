"""Whether a PCI function is alive, and still what it was: asked after a reset, before it is sold again.

The kernel answers most questions about a device from its own memory, also for one that is long dead.
So the device itself is asked, through the header of its config space (PCI Local Bus 3.0, 6.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gpud.host.pci import PciFunction, memory_bars
from gpud.host.sysfs import CONFIG_HEADER_BYTES, Sysfs, attribute

_ABSENT: Final = {0xFFFF, 0x0001}
"""Vendor ids of no vendor: nothing answers, or it asks to be asked again (PCIe 6.0, 2.3.2)."""

_AWAKE: Final = {None, "D0", "unknown"}

_COMMAND: Final = 0x04
_COMMAND_RESERVED: Final = 0xF800
_FIRST_BAR: Final = 0x10
_BAR_FLAGS: Final = 0xF  # bits of a BAR that are no part of the address


def answers(header: bytes) -> bool:
    """Whether the device gave its config header, rather than nothing at all."""
    return len(header) == CONFIG_HEADER_BYTES and _word(header, 0) not in _ABSENT


def faults(sysfs: Sysfs, header: bytes, expected: PciFunction) -> Iterator[str]:
    """What is wrong with a function; nothing where all is well.

    Args:
        sysfs: The tree.
        header: The function's config header, read just now.
        expected: What was there before.
    """
    if not answers(header):
        yield "it does not answer"
        return
    yield from _identity(header, expected)
    if _word(header, _COMMAND) & _COMMAND_RESERVED:
        yield f"its command register is nonsense ({_word(header, _COMMAND):#06x})"
    state = sysfs.text(attribute(expected.address, "power_state"))
    if state not in _AWAKE:
        yield (
            f"it is in power state {state}: set disable_idle_d3=1 for the module vfio-pci, and see"
            " what writes to its power/control"
        )
    group = sysfs.iommu_group(expected.address)
    if group != expected.iommu_group:
        yield f"it is in IOMMU group {_named(group)}, not in {_named(expected.iommu_group)}"
    yield from _bars(sysfs, header, expected)


def _identity(header: bytes, expected: PciFunction) -> Iterator[str]:
    """The device says of itself what the kernel found when the server started, before any guest."""
    subsystem = f"{expected.subsystem_vendor:04x}:{expected.subsystem_device:04x}"
    for name, now, before in (
        ("ids", f"{_word(header, 0x00):04x}:{_word(header, 0x02):04x}", expected.ids),
        ("revision", header[0x08:0x09].hex(), f"{expected.revision:02x}"),
        ("class", header[0x09:0x0C][::-1].hex(), f"{expected.class_code:06x}"),
        ("subsystem", f"{_word(header, 0x2C):04x}:{_word(header, 0x2E):04x}", subsystem),
    ):
        if now != before:
            yield f"its {name} is {now}, and was {before}"


def _bars(sysfs: Sysfs, header: bytes, expected: PciFunction) -> Iterator[str]:
    """The BARs are as large as before, and the device still knows where they are."""
    sizes = []
    resource = sysfs.text(attribute(expected.address, "resource")) or ""
    for index, first, bar in memory_bars(resource):
        sizes.append(bar.size_bytes)
        offset = _FIRST_BAR + 4 * index
        width = 8 if bar.is_64bit else 4
        programmed = int.from_bytes(header[offset : offset + width], "little") & ~_BAR_FLAGS
        if programmed != first:
            yield f"its BAR {index} points to {programmed:#x}, and belongs at {first:#x}"
    before = [bar.size_bytes for bar in expected.bars]
    if sizes != before:
        yield f"its BARs have {_listed(sizes)} bytes, and had {_listed(before)}"


def _listed(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes)) or "no"


def _named(group: int | None) -> str:
    return "none" if group is None else str(group)


def _word(header: bytes, offset: int) -> int:
    return int.from_bytes(header[offset : offset + 2], "little")
