"""The door to the kernel's files about devices: plain reads here, everything that may hang in a child.

A write to sysfs runs a driver's code before it returns: an unbind waits until the last user of a GPU
is gone, a reset waits for a device that may never come back, and neither wait ends with a signal. Such
a write is made by a process of its own. One that is out of time is killed; one that even then stays
inside the kernel is left behind, and nobody waits for it: not the caller, not the daemon's shutdown.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final, Protocol

from gpud import command
from gpud.errors import Code, GpudError
from gpud.model import PciAddress

DEVICES: Final = Path("bus/pci/devices")
"""Where sysfs lists the PCI functions."""

DRIVERS: Final = Path("bus/pci/drivers")
"""Where sysfs lists the PCI drivers that are loaded."""

DRIVERS_PROBE: Final = Path("bus/pci/drivers_probe")
"""Takes a function's address, and lets the drivers that match have it."""

CONFIG_HEADER_BYTES: Final = 64
"""What an ordinary user may read of a function's config space: its standard header."""

_ERRNO: Final = {os.strerror(number): number for number in errno.errorcode}
_ONE_WRITE_BYTES: Final = 4096
"""The kernel takes each write for a command of its own, so a text must go in one."""


class SysfsError(GpudError):
    """The kernel refused to write or read a file of sysfs, or did not come back from it.

    Attributes:
        errno: Why the kernel refused (``errno.EBUSY``); None when the time ran out.
    """

    def __init__(self, act: str, why: str, number: int | None) -> None:
        super().__init__(Code.GPU_UNUSABLE, f"{act}: {why}")
        self.errno = number


class KernelFiles(Protocol):
    """How files are written and read whose kernel side may take long, or for ever."""

    async def write(self, file: Path, text: str, timeout_s: float) -> None:
        """Give ``text`` to an existing file in one write.

        Raises:
            OSError: The kernel refused it.
            GpudError: It was not done in time.
        """
        ...

    async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
        """Read the first bytes of a file; errors as for ``write``."""
        ...


class InChildren:
    """Each write and read in a short-lived process of coreutils: some 3 ms, and a true errno.

    ``dd`` rather than a shell's ``printf``, which tells "I/O error" whatever the kernel said.
    """

    async def write(self, file: Path, text: str, timeout_s: float) -> None:
        """Write through ``dd``, which neither creates nor truncates the file here."""
        done = await command.run(
            "dd",
            f"of={file}",
            "conv=nocreat,notrunc",
            f"bs={_ONE_WRITE_BYTES}",
            "status=none",
            timeout_s=timeout_s,
            ok=(0, 1),
            input=text.encode(),
        )
        _refuse(done)

    async def read(self, file: Path, size: int, timeout_s: float) -> bytes:
        """Read through ``od``, whose output survives being taken for text."""
        done = await command.run(
            "od", "-An", "-v", "-tx1", f"-N{size}", file, timeout_s=timeout_s, ok=(0, 1)
        )
        _refuse(done)
        return bytes.fromhex(done.stdout)


def _refuse(done: command.Completed) -> None:
    if done.exit_code != 0:
        why = done.stderr.rpartition(": ")[2]
        raise OSError(_ERRNO.get(why, errno.EIO), why)


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
        """
        try:
            return (self.root / path).read_text(encoding="ascii", errors="replace").strip()
        except OSError:
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
        return SysfsError(act, error.detail, None)
    number = error.errno or errno.EIO
    name = errno.errorcode.get(number, str(number))
    return SysfsError(act, f"{error.strerror or 'no reason given'} ({name})", number)
