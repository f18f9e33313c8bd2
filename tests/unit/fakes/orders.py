"""Orders, grants and a clock for tests of the store and of the lifecycle."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path

from gpud.model import Gpu, Grant, GuestInput, NumaNode, Order, PciAddress, Shape, Tier

SHAPE = Shape("h100_sxm", 1, cpu_cores=4, memory_mib=2048, storage_gib=1)
IMAGE = "sha256:" + "0" * 64
_SHARED_MEMORY = Path("/dev/shm")


class Clock:
    """Time that passes when told to."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def gpu(number: int) -> Gpu:
    return Gpu(PciAddress(0, number, 0, 0), SHAPE.gpu_type, stand_in=True)


def grant(number: int = 1, address: str | None = None, shape: Shape = SHAPE) -> Grant:
    """A grant of the GPU at bus ``number``."""
    return Grant(
        shape=shape,
        gpus=(gpu(number),),
        address=None if address is None else IPv4Address(address),
        image_digest=IMAGE,
        cost_per_hour=Decimal("3.49"),
        region="US",
        datacenter_location="US-Test-1",
        nodes=(NumaNode(0, shape.cpu_cores, shape.memory_mib),),
    )


def granting(given: Grant) -> Callable[[Sequence[Grant]], Grant]:
    """Decide for every order alike."""
    return lambda _taken: given


def order(
    instance_id: str = "order-1",
    script: bytes | None = b"#!/bin/sh\n",
    keys: tuple[str, ...] = (),
    image: str | None = None,
) -> Order:
    digest = hashlib.sha256(instance_id.encode() + (script or b"")).hexdigest()
    given = GuestInput(keys, image, script)
    return Order(instance_id, SHAPE.gpu_type, 1, Tier.ON_DEMAND, None, given, digest)


@contextmanager
def quick_directory() -> Iterator[Path]:
    """A directory in memory where there is one: a flush to a disk costs milliseconds."""
    parent = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent, prefix="gpud-test-") as directory:
        yield Path(directory)


async def until(condition: Callable[[], object], patience_s: float = 8) -> None:
    """Wait until something is so that other threads and tasks bring about."""
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.001)


async def until_reaped() -> None:
    """Wait until every child that outlived its kill is reaped; one that is not is a warning."""
    await until(lambda: not any("waitpid" in thread.name for thread in threading.enumerate()))
    await asyncio.sleep(0.01)
