"""An instance's directory, and the disk in it: a qcow2 overlay on a hard link to its base image.

    instances/<upstream_id>/    mode 0711: QEMU's user passes through, nobody else can look around
      base.qcow2                hard link into the image store; says that the image is in use
      disk.qcow2                the guest's disk, mode 0600; libvirt gives it to QEMU's user
      seed.iso                  cloud-init seed, mode 0600, likewise
      nvram.fd                  the guest's UEFI variables, made by libvirt

The base must stay the property of gpud's user. libvirt hands every file of a backing chain to QEMU's
user unless the domain XML forbids it (``<seclabel model='dac' relabel='no'/>`` in the ``<source>`` of
``<backingStore>``); through the hard link that would be the image itself, for all instances.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import structlog

from gpud.errors import Code, GpudError
from gpud.guest import qcow2
from gpud.guest.durable import commit, sync, temporary
from gpud.guest.image import Image
from gpud.model import UPSTREAM_ID

_log = structlog.get_logger()

_GIB: Final = 2**30


@dataclass(frozen=True, slots=True)
class InstanceFiles:
    """Where the files of one instance are. The only place that knows their names."""

    directory: Path

    @classmethod
    def of(cls, state_dir: Path, upstream_id: str) -> Self:
        """Name the files of an instance.

        Raises:
            ValueError: ``upstream_id`` is not one of ours; no path is made from it.
        """
        if not UPSTREAM_ID.fullmatch(upstream_id):
            raise ValueError(f"{upstream_id!r} is not an upstream_id")
        return cls(state_dir / "instances" / upstream_id)

    @property
    def base(self) -> Path:
        """Hard link to the base image."""
        return self.directory / "base.qcow2"

    @property
    def disk(self) -> Path:
        """The guest's own disk, an overlay of ``base``."""
        return self.directory / "disk.qcow2"

    @property
    def seed(self) -> Path:
        """The cloud-init seed, an ISO image."""
        return self.directory / "seed.iso"

    @property
    def nvram(self) -> Path:
        """The guest's UEFI variables."""
        return self.directory / "nvram.fd"

    def owns(self, name: str) -> bool:
        """Whether a file in the directory is ours, or grows beside one: ``disk.qcow2.new``."""
        known = (self.base, self.disk, self.seed, self.nvram)
        return any(name == file.name or name.startswith(f"{file.name}.") for file in known)


async def clone(files: InstanceFiles, image: Image, storage_gib: int) -> None:
    """Give an instance its disk; at a cost that does not depend on the image's size.

    May be repeated after a stop at any point. A disk under its final name is complete, may have been
    written by the guest, and is never touched again.

    Args:
        files: The instance's files.
        image: Its base, as the image store resolved it.
        storage_gib: Virtual size of the disk.

    Raises:
        GpudError: ``config_invalid`` when the image does not fit into ``storage_gib``;
            ``guest_failed`` when what is there belongs to another image, or the overlay came out wrong;
            ``state_unusable`` when the files cannot be written.
    """
    size_bytes = storage_gib * _GIB
    if size_bytes < image.virtual_size_bytes:
        raise GpudError(
            Code.CONFIG_INVALID,
            f"a disk of {storage_gib} GiB is too small for image {image.digest}, which holds one of "
            f"{image.virtual_size_bytes / _GIB:.2f} GiB",
            hint="raise offers[].per_gpu.storage_gib, or use a smaller image",
        )
    with _storage_errors(files):
        if await asyncio.to_thread(_stand_on_base, files, image):
            return
        overlay = temporary(files.disk)
        await qcow2.create_overlay(overlay, backing_file=files.base.name, size_bytes=size_bytes)
        if await qcow2.info(overlay) != qcow2.Info(size_bytes, files.base.name):
            raise GpudError(
                Code.GUEST_FAILED,
                f"qemu-img made {overlay}, but not with the size and backing file asked for",
            )
        await asyncio.to_thread(_finish, overlay, files.disk)


async def remove(files: InstanceFiles) -> None:
    """Remove the instance's files and directory; what is gone already is no matter.

    Raises:
        GpudError: ``state_unusable`` when something of ours cannot be removed.
    """
    with _storage_errors(files):
        await asyncio.to_thread(_remove, files)


def _stand_on_base(files: InstanceFiles, image: Image) -> bool:
    """Make the directory and the link to the base; True when the disk is there already."""
    for directory in (files.directory.parent, files.directory):
        _make_directory(directory)
    cloned = files.disk.exists()
    if not (files.base.exists() and files.base.samefile(image.path)):
        if cloned:
            raise GpudError(
                Code.GUEST_FAILED, f"{files.disk} stands on another image than {image.digest}"
            )
        files.base.unlink(missing_ok=True)
        _link(image, files.base)
        sync(files.directory)
    temporary(files.disk).unlink(missing_ok=True)
    return cloned


def _make_directory(path: Path) -> None:
    try:
        path.mkdir()
    except FileExistsError:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise
        return
    path.chmod(0o711)  # not left to the umask
    sync(path.parent)


def _link(image: Image, base: Path) -> None:
    try:
        base.hardlink_to(image.path)
    except PermissionError as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"no hard link to {image.path} can be made: it belongs to uid {image.path.stat().st_uid}, "
            f"and this is uid {os.geteuid()}",
            hint="give it back with chown: Linux lets only the owner link to it "
            "(fs.protected_hardlinks)",
        ) from error


def _finish(overlay: Path, disk: Path) -> None:
    overlay.chmod(0o600)
    sync(overlay)
    commit(overlay, disk)


def _remove(files: InstanceFiles) -> None:
    try:
        directory = os.open(files.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        for name in os.listdir(directory):  # noqa: PTH208 - by descriptor, so that no path is followed
            if files.owns(name):
                os.unlink(name, dir_fd=directory)
        foreign = sorted(os.listdir(directory))  # noqa: PTH208 - likewise
    finally:
        os.close(directory)
    if foreign:
        # Somebody's, so it stays; but it is no reason to keep a GPU from being sold again.
        _log.warning("not removed: not gpud's", directory=str(files.directory), names=foreign)
        return
    files.directory.rmdir()
    sync(files.directory.parent)


@contextmanager
def _storage_errors(files: InstanceFiles) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in {errno.ENOSPC, errno.EDQUOT}
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"the files of instance {files.directory.name} cannot be changed: {error}",
            hint="free disk space; host_reserve.storage_gib keeps some" if full else "",
        ) from error
