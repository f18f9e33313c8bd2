"""What a disk image from outside must pass before it may become a base image."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from gpud.errors import Code, GpudError
from gpud.guest import copying, qcow2
from gpud.guest.copying import Progress
from gpud.guest.durable import sync

Judge = Callable[[Path], Awaitable[object]]
"""Looks at an image, and raises what forbids to clone it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A qcow2 image that passed, on disk and ready for its final name.

    Attributes:
        file: Our own copy.
        sha256: Of that copy, in hex.
        virtual_size_bytes: Size of the disk in it.
        sealed: Whether it was found fit to be cloned.
    """

    file: Path
    sha256: str
    virtual_size_bytes: int
    sealed: bool = False


async def take_in(
    source: Path,
    directory: Path,
    expected_sha256: str | None = None,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> Candidate:
    """Copy an image, and judge the copy: nobody else can change that between check and use.

    Args:
        source: A qcow2 image, or a raw disk, which is converted.
        directory: An empty directory of ours, for the copy.
        expected_sha256: SHA-256 (hex) that ``source`` must have.
        progress: Told of the bytes copied and their total.
        judge: Looks into the copy.

    Raises:
        GpudError: ``image_invalid``: it is unusable, and why.
    """
    try:
        copy = directory / "copy"
        sha256 = await copying.copy(source, copy, progress)
        if expected_sha256 is not None and sha256 != expected_sha256.strip().lower():
            raise GpudError(
                Code.IMAGE_INVALID,
                f"its SHA-256 is {sha256}, not {expected_sha256} as expected",
                hint="fetch it again",
            )
        if qcow2.judge(copy) is qcow2.Format.RAW:
            copy, sha256 = await _convert(copy, directory / "converted")
        candidate = Candidate(copy, sha256, await examine(copy), sealed=judge is not None)
        if judge is not None:
            await judge(copy)
    except GpudError as error:
        detail = f"{source} is not usable as a base image: {error.detail}"
        raise GpudError(error.code, detail, hint=error.hint, problems=error.problems) from error
    return candidate


async def examine(file: Path) -> int:
    """Hold a qcow2 image against all that a base must be, and return its virtual size in bytes.

    Raises:
        GpudError: ``image_invalid``: it is unusable, and why.
    """
    if qcow2.judge(file) is not qcow2.Format.QCOW2:
        raise GpudError(Code.IMAGE_INVALID, "it is not a qcow2 image")
    await qcow2.check(file)
    return (await qcow2.info(file)).virtual_size_bytes


async def _convert(raw: Path, target: Path) -> tuple[Path, str]:
    await qcow2.convert_raw(raw, target)
    sync(target)
    return target, await copying.sha256(target)
