"""Making an image fit to be cloned, and looking whether it is."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpud.doctor.check import Level, Verdict
from gpud.errors import Code, GpudError, Problem
from gpud.golden import disk as sectors
from gpud.golden.inside import Layout, collect, lay_out, people_of
from gpud.golden.judge import Firmware, faults, judge
from gpud.golden.traces import TRACES, removable
from gpud.guest.durable import commit, sync, temporary
from gpud.guest.qcow2 import Format

_MACHINE_ID: Final = "/etc/machine-id"


@dataclass(frozen=True, slots=True)
class _Bench:
    """A copy of an image's disk, to look at and to work on."""

    disk: Path
    layout: Layout
    form: Format

    async def look(self, firmware: Firmware) -> list[Verdict]:
        return judge(await collect(self.disk, self.layout), firmware)


async def check(image: Path, firmware: Firmware) -> list[Verdict]:
    """Look into an image, which stays as it is.

    Args:
        image: A qcow2 image or a raw disk.
        firmware: What guests start with.

    Raises:
        GpudError: ``image_invalid``: it cannot be looked into, and why.
    """
    with _about(image):
        return await _look(image, firmware)


async def refuse_unfit(image: Path, firmware: Firmware) -> list[Verdict]:
    """Look into an image, and refuse one that must not be cloned.

    Returns:
        What should be mended nevertheless.

    Raises:
        GpudError: ``image_invalid``, with everything that is wrong; it does not name the image.
    """
    verdicts = await _look(image, firmware)
    found = faults(verdicts)
    if found:
        raise GpudError(
            Code.IMAGE_INVALID,
            "it is not fit to be cloned",
            hint="gpud image seal mends most of it; --unsealed adds it as it is",
            problems=[Problem(one.name, one.what, one.mend) for one in found],
        )
    return [one for one in verdicts if one.level is Level.WARNING]


async def seal(image: Path, target: Path, firmware: Firmware) -> list[Verdict]:
    """Write a sealed copy of an image, if it comes out fit to be cloned.

    Args:
        image: A qcow2 image or a raw disk.
        target: Where the copy goes, in the same format; replaced whole, or, where faults remain that
            sealing cannot mend, not at all. It may be ``image``.
        firmware: What guests start with.

    Returns:
        What there is to say of the copy.

    Raises:
        GpudError: ``image_invalid``: it cannot be looked into or is in use, and why.
    """
    _refuse_one_in_use(target)
    with _about(image):
        return await _seal(image, target, firmware)


async def _look(image: Path, firmware: Firmware) -> list[Verdict]:
    async with _bench(image) as bench:
        return await bench.look(firmware)


async def _seal(image: Path, target: Path, firmware: Firmware) -> list[Verdict]:
    async with _bench(image) as bench:
        await _remove_traces(bench.layout)
        for part in bench.layout.all:
            await part.wipe_free_space()
        verdicts = await bench.look(firmware)
        if not faults(verdicts):
            await _write(bench, target)
        return verdicts


def _refuse_one_in_use(target: Path) -> None:
    """An image of gpud's store that guests stand on has a further name in each of their directories."""
    if target.exists() and target.stat().st_nlink > 1:
        detail = f"{target} has further names, so guests may stand on it"
        raise GpudError(Code.IMAGE_INVALID, detail, hint="--output FILE")


async def _remove_traces(layout: Layout) -> None:
    root = layout.root
    people = await people_of(root)
    for trace in TRACES:
        await root.remove(await removable(root, trace, people))
    # Empty, not gone: a system without the file is set up from scratch, with every unit's preset.
    await root.empty(_MACHINE_ID)


async def _write(bench: _Bench, target: Path) -> None:
    unfinished = temporary(target)
    try:
        await sectors.write_image(bench.disk, unfinished, bench.form)
        await asyncio.to_thread(_put_in_place, unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)


def _put_in_place(unfinished: Path, target: Path) -> None:
    if target.exists():
        shutil.copymode(target, unfinished)
    sync(unfinished)
    commit(unfinished, target)


@contextmanager
def _about(image: Path) -> Iterator[None]:
    try:
        yield
    except GpudError as error:
        raise GpudError(error.code, f"{image}: {error.detail}", hint=error.hint) from error


@asynccontextmanager
async def _bench(image: Path) -> AsyncIterator[_Bench]:
    """Scratch space is taken from ``$TMPDIR``, else from /var/tmp, where large files belong (hier(7))."""
    parent = os.environ.get("TMPDIR", "/var/tmp")  # noqa: S108 - mkdtemp's directory is ours alone
    with _scratch_errors(parent):
        scratch = Path(tempfile.mkdtemp(prefix="gpud-image-", dir=parent))
    try:
        disk = scratch / "disk.raw"
        with _scratch_errors(parent):
            form = await sectors.copy_raw(image, disk)
        yield _Bench(disk, await lay_out(disk), form)
    finally:
        await asyncio.to_thread(shutil.rmtree, scratch)


@contextmanager
def _scratch_errors(parent: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GpudError(
            Code.STATE_UNUSABLE,
            f"{parent} cannot hold a copy of the disk: {error.strerror}",
            hint="set TMPDIR to a directory with room",
        ) from error
