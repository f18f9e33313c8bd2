"""An instance's disk: what it costs must not depend on how big the image is."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

from gpud.guest import disk
from gpud.guest.disk import InstanceFiles
from gpud.guest.image import Image
from tests.bench.core import Bench, Side
from tests.bench.row import FLAT_COST, Row

_GIB = 2**30
_SIZES_GIB = (0.5, 5, 50)


async def measure(bench: Bench) -> AsyncIterator[Row]:
    sides = [clone(bench, _base(bench.directory, size_gib)) for size_gib in _SIZES_GIB]
    smallest, *bigger = await bench.take_turns("clone", bench.rounds(40, 10), *sides)
    for size_gib, samples in zip(_SIZES_GIB[1:], bigger, strict=True):
        what, against = (f"clone of a base of {size} GB" for size in (size_gib, _SIZES_GIB[0]))
        yield Row(what, against, "ms", samples, smallest, FLAT_COST)


def clone(bench: Bench, image: Image) -> Side:
    """Make an instance's disk, and remove it again outside of the measurement; in ms."""

    async def once() -> float:
        files = InstanceFiles.of(bench.directory, f"i-{secrets.token_hex(8)}")
        began = time.perf_counter()
        await disk.clone(files, image, storage_gib=64)
        took_s = time.perf_counter() - began
        await disk.remove(files)
        return took_s * 1000

    return once


def _base(directory: Path, size_gib: float) -> Image:
    """An image whose file is that long; what is in it is holes, but for qcow2's own tables."""
    path = directory / f"base-{size_gib}.qcow2"
    size_bytes = int(size_gib * _GIB)
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"]
    subprocess.run([*create, path, str(size_bytes)], check=True)
    os.truncate(path, max(size_bytes, path.stat().st_size))
    return Image(
        digest="sha256:" + "0" * 64, path=path, names=("base",), size_bytes=path.stat().st_size,
        virtual_size_bytes=size_bytes, added_at=0, in_use_by=0,
    )  # fmt: skip
