"""PCI as sysfs tells it: every function of the host, what drives it, and which group it is in.

The attributes are those of the kernel's ``Documentation/ABI/testing/sysfs-bus-pci``. Only those
are read that the kernel answers from memory, so nothing here can hang: not ``config``, whose reader can
not be killed while the function is being reset (``pci_wait_cfg``), and not ``driver_override``, whose
reader waits while a driver does not let go of it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError
from gpud.model import PciAddress

NVIDIA: Final = 0x10DE
"""NVIDIA's PCI vendor id."""

NVIDIA_DRIVER: Final = "nvidia"
"""The driver through which NVML sees a card."""

VFIO_PCI: Final = "vfio-pci"
"""The driver that gives a function to a guest."""

_HOST_BRIDGE: Final = 0x0600
_BRIDGE: Final = 0x0604
_DISPLAYS: Final = frozenset({0x0300, 0x0302})  # VGA compatible controller, 3D controller
_OTHER_BRIDGE: Final = 0x0680
_BASE_CLASS_SHIFT: Final = 8  # drops the programming interface

_HEADER_BYTES: Final = 64
"""What anybody may read of a function's config space, and all that is safe to read of any."""
_HEADER_TYPE_OFFSET: Final = 0x0E
_HEADER_TYPE_MASK: Final = 0x7F  # the top bit says that the slot has more functions
_BRIDGE_HEADER: Final = 1

_PAGE_BYTES: Final = 4096
OUR_OWN_WANT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Errors that tell of this process and its host's load, and nothing of the file that was to be read."""

_BAR_COUNT: Final = 6
"""Lines of ``resource`` that are BARs; the ROM, virtual functions and bridge windows follow."""
# Flags of a line in ``resource`` (include/linux/ioport.h).
_MEMORY: Final = 0x0000_0200
_PREFETCHABLE: Final = 0x0000_2000
_64_BIT: Final = 0x0010_0000


@dataclass(frozen=True, slots=True)
class Bar:
    """A memory BAR: a window through which the CPU reaches into a function."""

    size_bytes: int
    is_64bit: bool
    prefetchable: bool


@dataclass(frozen=True, slots=True)
class PciFunction:
    """One PCI function.

    A function that is there but whose ids cannot be made out has zeros for them: it stays in its
    group, where it counts as a device that nobody knows.

    Attributes:
        vendor: PCI vendor id as the kernel saw it when it found the function; likewise the other ids.
        class_code: Base class, subclass and programming interface: ``0x030200``.
        driver: The driver it is bound to; None where there is none.
        iommu_group: None where there is no IOMMU in use for it.
        numa_node: None where the firmware does not tell.
        bars: Its memory BARs in order, those of other kinds left out.
        reset_methods: Ways in which the kernel can reset it, in the order in which it tries them.
        power_state: ``D0`` (fully on) to ``D3cold`` (no power), or ``unknown``.
        d3cold_allowed: Whether the kernel may cut its power; None where it does not tell.
        upstream: The bridges above it, from the root down.
        config_header: The first 64 bytes of config space, from the device itself; empty if it was not
            asked (see :mod:`gpud.host.livebus`), or did not answer.
    """

    address: PciAddress
    vendor: int
    device: int
    subsystem_vendor: int
    subsystem_device: int
    class_code: int
    revision: int = 0
    driver: str | None = None
    iommu_group: int | None = None
    numa_node: int | None = None
    bars: tuple[Bar, ...] = ()
    reset_methods: tuple[str, ...] = ()
    power_state: str = "unknown"
    d3cold_allowed: bool | None = None
    upstream: tuple[PciAddress, ...] = ()
    config_header: bytes = b""

    @property
    def ids(self) -> str:
        """Vendor and device, as ``lspci -n`` writes them: ``10de:2330``."""
        return f"{self.vendor:04x}:{self.device:04x}"

    @property
    def is_nvidia(self) -> bool:
        """Whether NVIDIA made it."""
        return self.vendor == NVIDIA

    @property
    def is_display(self) -> bool:
        """Whether it is a GPU by its class, with outputs (0300) or without (0302)."""
        return self.class_code >> _BASE_CLASS_SHIFT in _DISPLAYS

    @property
    def is_nvswitch(self) -> bool:
        """Whether it is an NVSwitch: an NVIDIA "other bridge", which is an endpoint to PCI."""
        return self.is_nvidia and self.class_code >> _BASE_CLASS_SHIFT == _OTHER_BRIDGE

    @property
    def is_bridge(self) -> bool:
        """Whether it is a PCI-to-PCI bridge; those stay with the host in whatever group they are."""
        return self.class_code >> _BASE_CLASS_SHIFT == _BRIDGE or (
            self.answers
            and self.config_header[_HEADER_TYPE_OFFSET] & _HEADER_TYPE_MASK == _BRIDGE_HEADER
        )

    @property
    def is_inert(self) -> bool:
        """Whether it may stay behind in a group that a guest gets.

        PCI bridges belong to the kernel whoever has the devices below. A host bridge without a driver
        is a placeholder of the chipset's that does nothing.
        """
        placeholder = self.class_code >> _BASE_CLASS_SHIFT == _HOST_BRIDGE and self.driver is None
        return self.is_bridge or placeholder

    @property
    def answers(self) -> bool:
        """Whether the device itself still says who it is; one off the bus reads as all ones."""
        header = self.config_header
        return (
            len(header) == _HEADER_BYTES
            and self.vendor not in {0, 0xFFFF}
            and int.from_bytes(header[:2], "little") == self.vendor
        )


@dataclass(frozen=True, slots=True)
class PciTree:
    """All PCI functions of a host at one moment, by address and in its order."""

    functions: Mapping[PciAddress, PciFunction]

    def get(self, address: PciAddress) -> PciFunction | None:
        """The function at ``address``, if there is one."""
        return self.functions.get(address)

    def group(self, number: int) -> tuple[PciFunction, ...]:
        """Everything in an IOMMU group, bridges included."""
        return tuple(one for one in self.functions.values() if one.iommu_group == number)

    def card(self, address: PciAddress) -> tuple[PciFunction, ...]:
        """The functions that sit in the slot of ``address``: a GPU with its audio, USB and UCSI."""
        return tuple(one for one in self.functions.values() if one.address.slot == address.slot)

    def with_headers(self, headers: Mapping[PciAddress, bytes]) -> PciTree:
        """The same functions with what each said of itself."""
        functions = self.functions.items()
        return PciTree(
            {
                address: replace(one, config_header=headers.get(address, b""))
                for address, one in functions
            }
        )


def read(sysfs: Path = Path("/sys")) -> PciTree:
    """Read what the kernel knows of all PCI functions of the host; none is asked itself.

    A function that vanishes meanwhile is left out, and what one does not tell is unknown; neither
    is an error.

    Args:
        sysfs: Where sysfs is.

    Raises:
        GpudError: This process has no file descriptor or no memory left to look, so what is there is not
            known. Transient.
    """
    try:
        found = [_function(link) for link in _entries(sysfs / "bus/pci/devices")]
    except OSError as error:
        raise GpudError(
            Code.GPU_UNUSABLE,
            f"the PCI bus cannot be read: {error.strerror}",
            hint="`ls -l /proc/$(pidof -s gpud)/fd` tells what takes the daemon's file descriptors",
            transient=True,
        ) from error
    functions = {one.address: one for one in found if one is not None}
    return PciTree({address: functions[address] for address in sorted(functions)})


def _entries(directory: Path) -> list[Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # a host, or a container, without PCI
        return []


def _function(link: Path) -> PciFunction | None:
    try:
        address = PciAddress.parse(link.name)
    except ValueError:
        return None
    at = f"{link}/"
    d3cold_allowed = _number(at + "d3cold_allowed")
    numa_node = _number(at + "numa_node")
    function = PciFunction(
        address=address,
        vendor=_number(at + "vendor") or 0,
        device=_number(at + "device") or 0,
        subsystem_vendor=_number(at + "subsystem_vendor") or 0,
        subsystem_device=_number(at + "subsystem_device") or 0,
        class_code=_number(at + "class") or 0,
        revision=_number(at + "revision") or 0,
        driver=_target_name(at + "driver"),
        iommu_group=_iommu_group(at + "iommu_group"),
        numa_node=None if numa_node is None or numa_node < 0 else numa_node,
        bars=_bars(at + "resource"),
        reset_methods=tuple(_text(at + "reset_method").split()),
        power_state=_text(at + "power_state") or "unknown",
        d3cold_allowed=None if d3cold_allowed is None else d3cold_allowed != 0,
        upstream=_upstream(str(link)),
    )
    # Asked last: whatever was read of a function that is gone by now is not to be trusted.
    return function if link.exists() else None


def _text(file: str) -> str:
    """What a file says. A host has thousands of them, and pathlib would cost more than the kernel."""
    try:
        opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(opened, _PAGE_BYTES).decode("ascii", "replace").strip()
        finally:
            os.close(opened)
    except OSError as error:
        return _nothing(error)


def _nothing(error: OSError) -> str:
    """What is read of a file that is not there, or does not tell; our own want says nothing of it."""
    if error.errno in OUR_OWN_WANT:
        raise error
    return ""


def _number(file: str) -> int | None:
    try:
        return int(_text(file), 0)
    except ValueError:
        return None


def _target(link: str) -> str:
    try:
        return os.readlink(link)  # noqa: PTH115 - see _text
    except OSError as error:
        return _nothing(error)


def _target_name(link: str) -> str | None:
    return _target(link).rpartition("/")[2] or None


def _iommu_group(link: str) -> int | None:
    name = _target_name(link)
    return int(name) if name is not None and name.isdecimal() else None


def _upstream(link: str) -> tuple[PciAddress, ...]:
    """The devices on the way to a function, which sysfs spells out in the path behind its link."""
    above = []
    for part in _target(link).split("/")[:-1]:
        try:
            above.append(PciAddress.parse(part))
        except ValueError:  # "..", "devices", "pci0000:00"
            continue
    return tuple(above)


def _bars(file: str) -> tuple[Bar, ...]:
    return tuple(bar for _, _, bar in memory_bars(_text(file)))


def memory_bars(resource: str) -> Iterator[tuple[int, int, Bar]]:
    """The memory BARs that the text of a function's ``resource`` tells of.

    Yields:
        Each one's index, the first address that the kernel gave it, and what it is.
    """
    for index, line in enumerate(resource.splitlines()[:_BAR_COUNT]):
        try:
            first, last, flags = (int(field, 16) for field in line.split())
        except ValueError:
            continue
        if flags & _MEMORY and last > first:  # zeros where there is no BAR
            kind = bool(flags & _64_BIT), bool(flags & _PREFETCHABLE)
            yield index, first, Bar(last - first + 1, *kind)
