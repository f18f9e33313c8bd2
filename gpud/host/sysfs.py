"""The door to the kernel's files about devices: plain reads here, everything that may hang in a child.

A write to sysfs runs a driver's code before it returns: an unbind waits until the last user of a GPU
is gone, a reset waits for a device that may never come back, and neither wait ends with a signal. Such
a write is made by a process of its own. One that is out of time is killed; one that even then stays
inside the kernel is left behind, and nobody waits for it: not the caller, not the daemon's shutdown.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from gpud.errors import Code, GpudError
from gpud.host.kernelfiles import InChildren, KernelFiles
from gpud.host.pci import OUR_OWN_WANT
from gpud.model import PciAddress

DEVICES: Final = Path("bus/pci/devices")
"""Where sysfs lists the PCI functions."""

DRIVERS: Final = Path("bus/pci/drivers")
"""Where sysfs lists the PCI drivers that are loaded."""

DRIVERS_PROBE: Final = Path("bus/pci/drivers_probe")
"""Takes a function's address, and lets the drivers that match have it."""

CONFIG_HEADER_BYTES: Final = 64
"""What an ordinary user may read of a function's config space: its standard header."""

_LINE_BYTES: Final = 128
"""More than the name of any driver."""


class SysfsError(GpudError):
    """The kernel refused to write or read a file of sysfs, or did not come back from it.

    Attributes:
        errno: Why the kernel refused (``errno.EBUSY``); None when the time ran out.
    """

    def __init__(self, act: str, why: str, number: int | None, *, transient: bool = False) -> None:
        super().__init__(Code.GPU_UNUSABLE, f"{act}: {why}", transient=transient)
        self.errno = number


class Sysfs:
    """A sysfs tree. Paths are relative to its root.

    Args:
        root: Where it is mounted.
        files: How files are written and read that may hang.
    """

    def __init__(self, root: Path = Path("/sys"), files: KernelFiles | None = None) -> None:
        self.root = root
        self._files = InChildren() if files is None else files

    def text(self, path: Path) -> str | None:
        """A file's content, less surrounding white space; None when it is not there or not readable.

        For attributes the kernel answers from memory. Not so ``config``, which waits while a function
        is being reset, and ``driver_override``, which waits while a driver is being unbound.

        Raises:
            SysfsError: This process has no file descriptor or no memory left to look. Transient.
        """
        try:
            return (self.root / path).read_text(encoding="ascii", errors="replace").strip()
        except OSError as error:
            if error.errno in OUR_OWN_WANT:
                why = os.strerror(error.errno)
                raise SysfsError(f"{path} cannot be read", why, None, transient=True) from error
            return None

    def exists(self, path: Path) -> bool:
        """Whether there is such a file or directory."""
        return (self.root / path).exists()

    def writable(self, path: Path) -> bool:
        """Whether this process may write the file."""
        return os.access(self.root / path, os.W_OK)

    def driver(self, address: PciAddress) -> str | None:
        """The driver that a function is bound to; None where there is none."""
        return self._linked(attribute(address, "driver"))

    def iommu_group(self, address: PciAddress) -> int | None:
        """The IOMMU group that a function is in; None where there is none."""
        name = self._linked(attribute(address, "iommu_group"))
        return None if name is None else int(name)

    async def config_header(self, address: PciAddress, timeout_s: float) -> bytes:
        """The first 64 bytes of a function's config space, from the device itself.

        Raises:
            SysfsError: They cannot be read, or not in time.
        """
        path = attribute(address, "config")
        try:
            return await self._files.read(self.root / path, CONFIG_HEADER_BYTES, timeout_s)
        except (OSError, GpudError) as error:
            raise _told(f"{self.root / path} could not be read", error) from error

    async def config_headers(
        self, addresses: Iterable[PciAddress], timeout_s: float
    ) -> dict[PciAddress, bytes]:
        """The same of many functions, in about the time that one takes.

        Args:
            addresses: The functions.
            timeout_s: Seconds for all at once and, if one of them hangs, for each by itself.

        Returns:
            Each function's header; empty where it cannot be read, or not in time.

        Raises:
            GpudError: Not one could be read in time. Transient.
        """
        files = {one: self.root / attribute(one, "config") for one in addresses}
        read = await self._files.read_many([*files.values()], CONFIG_HEADER_BYTES, timeout_s)
        return dict(zip(files, read, strict=True))

    async def overrides(
        self, addresses: Collection[PciAddress], timeout_s: float
    ) -> dict[PciAddress, str]:
        """The driver that alone may have each function, as ``driver_override`` says.

        Returns:
            Empty for a function without one, and where it cannot be read in time.

        Raises:
            GpudError: Not one could be read in time. Transient.
        """
        files = [self.root / attribute(one, "driver_override") for one in addresses]
        if not files:
            return {}
        read = await self._files.read_many(files, _LINE_BYTES, timeout_s)
        texts = (content.decode("ascii", "replace").strip() for content in read)
        named = ("" if text == "(null)" else text for text in texts)
        return dict(zip(addresses, named, strict=True))

    async def write(self, path: Path, text: str, timeout_s: float) -> None:
        """Give ``text`` to a file in one write.

        Args:
            path: The file, which must exist.
            text: What to write. Never empty, which would be no write at all: a newline clears.
            timeout_s: Seconds until the write is given up and its process killed.

        Raises:
            SysfsError: The kernel refused, or the time ran out.
        """
        if not text:
            raise ValueError(f"nothing to write to {path}")
        try:
            await self._files.write(self.root / path, text, timeout_s)
        except (OSError, GpudError) as error:
            act = f"{text.strip()!r} could not be written to {self.root / path}"
            raise _told(act, error) from error

    def _linked(self, path: Path) -> str | None:
        """The name of what a link points to."""
        try:
            return (self.root / path).readlink().name
        except OSError:
            return None


def attribute(address: PciAddress, name: str) -> Path:
    """The path of one of a function's files, relative to sysfs."""
    return DEVICES / str(address) / name


def _told(act: str, error: OSError | GpudError) -> SysfsError:
    if isinstance(error, GpudError):
        return SysfsError(act, error.detail, None, transient=error.transient)
    number = error.errno or errno.EIO
    name = errno.errorcode.get(number, str(number))
    return SysfsError(act, f"{error.strerror or 'no reason given'} ({name})", number)
