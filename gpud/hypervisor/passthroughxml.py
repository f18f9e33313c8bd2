"""A host's PCI functions in a guest: their slots, the address space they need, the time they cost.

Pure. Vocabulary: https://libvirt.org/formatdomain.html, "Host device assignment". Left out on purpose:

* A limit for locked memory, which VFIO needs, as it pins all of the guest. libvirt raises QEMU's
  RLIMIT_MEMLOCK by itself to the guest's memory plus 1 GiB or more (``pc-hostdev`` in its
  ``qemumemlocktest.c``; NEWS of 8.7.0). ``<memtune><hard_limit>`` would replace that number, and be
  the cgroup's OOM limit as well.
* An IOMMU in the guest: with one, every device needs mappings of its own.
* ``<kvm><hidden>``: NVIDIA's driver works in virtual machines, on GeForce cards too since 465.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Final
from xml.etree import ElementTree as ET

from gpud.model import PciAddress

_MIB: Final = 2**20
_DEFAULT_WINDOW_MIB: Final = 32 * 1024
_PARTS: Final = ("domain", "bus", "slot", "function")
_PIN_S_PER_GIB: Final = 4.0
_RESET_S_PER_GPU: Final = 15.0


def add_functions(devices: ET.Element, functions: Iterable[PciAddress], *, rombar: bool) -> None:
    """Add PCI functions of the host to a guest's ``<devices>``, in the order of their addresses.

    Functions of one slot of the host share one of the guest, so that a driver finds a GPU's audio or
    USB function where it expects it; each slot gets a PCIe root port of its own. Functions keep their
    numbers, unless the first of a slot stays behind: a guest only looks at slots with a function 0.

    libvirt neither binds nor unbinds them (``managed="no"``): they must be vfio-pci's already.

    Args:
        devices: The element to add to.
        functions: What to pass; naming one twice changes nothing.
        rombar: Whether the guest sees the cards' option ROMs.
    """
    for bus, slot in enumerate(_by_slot(functions), start=1):
        ET.SubElement(devices, "controller", type="pci", index=str(bus), model="pcie-root-port")
        keeps_numbers = slot[0].function == 0
        for position, function in enumerate(slot):
            number = function.function if keeps_numbers else position
            hostdev = _add_hostdev(devices, function, rombar=rombar)
            guest = _address(PciAddress(0, bus, 0, number))
            if number == 0 and len(slot) > 1:
                guest["multifunction"] = "on"
            ET.SubElement(hostdev, "address", {"type": "pci", **guest})


def passed_functions(xml: str) -> list[PciAddress]:
    """Read from a domain's XML which PCI functions of the host it has."""
    domain = ET.fromstring(xml)  # noqa: S314 - libvirt wrote it
    addresses = domain.findall("devices/hostdev[@type='pci']/source/address")
    return [PciAddress(*(int(at.get(key, "0"), 16) for key in _PARTS)) for at in addresses]


def mmio_window_mib(bars: Mapping[PciAddress, Iterable[int]]) -> int | None:
    """Size the guest's 64-bit MMIO window for OVMF, in MiB; None where OVMF's own choice suffices.

    What OVMF does (edk2: ``PlatformInitLib/MemDetect.c``, ``PciBusDxe/PciResourceSupport.c``; seen so
    with Debian 12's build and emulated BARs of 128 GiB):

    * Its window is 32 GiB; since 2022.11 an eighth of the address space, where it trusts what the
      CPU says of that: 8 TiB on a server. A size asked for can only make it larger, up to 16 TiB.
      It lies above the guest's memory, aligned to the largest power of two that fits into it.
    * A root port's share starts at a multiple of the largest BAR behind it and is as long as all
      BARs there. Shares are placed by falling alignment.
    * Every other port takes 1/256 of the window, kept for hot-plugging. A guest has five such, for
      its virtio devices; eight are allowed for.

    A BAR that finds no place is left out without a word, and the card does not work. SeaBIOS makes its
    window as large as it has to be. Root ports need no ``pref64-reserve``: it is for hot-plugging.

    Args:
        bars: For every function that is passed, the sizes of its 64-bit prefetchable BARs, in bytes.
    """
    end = 0
    for alignment, length in sorted((_share(slot, bars) for slot in _by_slot(bars)), reverse=True):
        end = _round_up(end, alignment) + length
    needed_mib = _round_up(end * 256 // (256 - 8), _MIB) // _MIB
    if needed_mib <= _DEFAULT_WINDOW_MIB:
        return None
    return 1 << (needed_mib - 1).bit_length()


def start_timeout_s(base_s: float, memory_mib: int, gpus: int) -> float:
    """How long libvirt may take to start a guest before that counts as hung, in seconds.

    Without GPUs the guest gets memory as it touches it, and ``base_s`` is all. With them, all of it is
    found, zeroed and pinned before QEMU answers. 0.5 to 9 s per GiB were measured on one and the same
    server (kata-containers issue 13084); Proxmox VE allows 4. A limit that is too long tells of
    a hang later; one that is too short fails a good order, hence Proxmox' figure, although several
    threads find and zero the memory here. Then every GPU is reset, and its firmware takes 5 to 10 s
    to come up (NVIDIA's gpu-admin-tools waits that long).
    """
    if not gpus:
        return base_s
    return base_s + memory_mib / 1024 * _PIN_S_PER_GIB + gpus * _RESET_S_PER_GPU


def _by_slot(functions: Iterable[PciAddress]) -> list[list[PciAddress]]:
    by_slot = groupby(sorted(set(functions)), lambda at: at.slot)
    return [list(slot) for _, slot in by_slot]


def _add_hostdev(devices: ET.Element, function: PciAddress, *, rombar: bool) -> ET.Element:
    hostdev = ET.SubElement(devices, "hostdev", mode="subsystem", type="pci", managed="no")
    ET.SubElement(hostdev, "driver", name="vfio")
    ET.SubElement(ET.SubElement(hostdev, "source"), "address", _address(function))
    # A former tenant may have rewritten what is in the ROM, and the guest's firmware would run it.
    ET.SubElement(hostdev, "rom", bar="on" if rombar else "off")
    return hostdev


def _address(at: PciAddress) -> dict[str, str]:
    return {
        "domain": f"{at.domain:#06x}",
        "bus": f"{at.bus:#04x}",
        "slot": f"{at.device:#04x}",
        "function": f"{at.function:#x}",
    }


def _share(slot: Iterable[PciAddress], bars: Mapping[PciAddress, Iterable[int]]) -> tuple[int, int]:
    """Alignment and length of a root port's share; a bridge's granularity is 1 MiB."""
    sizes = [size for function in slot for size in bars[function]]
    return max([_MIB, *sizes]), _round_up(sum(sizes), _MIB)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
