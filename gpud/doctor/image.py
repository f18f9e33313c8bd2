"""Checks of the image that guests' disks stand on, as far as it can be told from outside."""

from __future__ import annotations

import asyncio
import os
from typing import Final

from gpud.config import Config
from gpud.doctor.account import Account
from gpud.doctor.check import Check, Group, Verdict
from gpud.errors import GpudError
from gpud.guest import qcow2
from gpud.guest.image import Image, ImageStore
from gpud.offers import shapes

_IMAGE: Final = Check(Group.IMAGES, "guest.image")
_SEAL: Final = Check(Group.IMAGES, "seal")
_DISK: Final = Check(Group.IMAGES, "disk")
_CHECK_S: Final = 20.0
"""For the tables of an image; those of a large one are read in a second or two."""


async def image(config: Config, limit_s: float = _CHECK_S) -> list[Verdict]:
    """Whether the image is there, as it was when it was added, and sound, and fits what is sold."""
    name = config.guest.image
    try:
        found = await asyncio.to_thread(
            lambda: ImageStore(config.state_dir / "images").resolve(name)
        )
    except GpudError as error:
        return [_IMAGE.failed(error, _adding("FILE", config))]
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.to_thread(qcow2.judge, found.path)
            await qcow2.check(found.path)
    except TimeoutError:
        said = _IMAGE.note(f"{name} was not checked within {limit_s:g} s")
    except (GpudError, OSError) as error:
        what = error.detail if isinstance(error, GpudError) else error.strerror
        said = _IMAGE.fault(
            f"{name} is unsound: {what}", f"{_adding('FILE', config)}, from its source"
        )
    else:
        said = _IMAGE.ok(f"{name}, {found.digest[:19]}, as it was when it was added")
    return [said, _sealed(config, found), _fits(config, found)]


def _adding(file: str, config: Config) -> str:
    """The command that adds an image: images must belong to the daemon's user."""
    daemon = Account.owner(config.state_dir)
    command = f"gpud image add {file} --name {config.guest.image}"
    if daemon is None or daemon.uid == os.geteuid():
        return command
    return f"runuser -u {daemon.name} -- {command}"


def _sealed(config: Config, found: Image) -> Verdict:
    if found.sealed:
        return _SEAL.ok("it was found fit to be cloned when it was added")
    return _SEAL.warning(
        "nobody looked whether it is fit to be cloned: guests may share host keys and a machine-id",
        f"gpud image check {found.path}; if it is, {_adding(str(found.path), config)}",
    )


def _fits(config: Config, found: Image) -> Verdict:
    """A guest's disk is as large as it was sold, never as small as would cut the image short."""
    size_gib = found.virtual_size_bytes / 2**30
    sold = [shape for offer in config.offers for shape in shapes(offer)]
    short = sorted({one.gpu_type for one in sold if one.storage_gib < size_gib})
    if short:
        return _DISK.fault(
            f"the image has {size_gib:.1f} GiB, more than {', '.join(short)} is sold with",
            "offers: per_gpu.storage_gib, or a smaller image",
        )
    return _DISK.ok(f"the image has {size_gib:.1f} GiB, no more than is sold")
