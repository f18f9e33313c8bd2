"""Decides what an order gets of the host. Pure: no clock, no files, no state of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from ipaddress import IPv4Address

from gpud.model import Gpu, Grant, Host, Shape


class Shortage(StrEnum):
    """What the host has too little of."""

    GPUS = "gpus"
    CPU_CORES = "cpu_cores"
    MEMORY = "memory"
    STORAGE = "storage"
    ADDRESSES = "addresses"


@dataclass(frozen=True, slots=True)
class Placement:
    """The very GPUs and the address for one instance."""

    gpus: tuple[Gpu, ...]
    address: IPv4Address | None


def remaining(host: Host, grants: Iterable[Grant]) -> Host:
    """What is left of ``host`` when every grant of a live instance is taken off; never below zero."""
    held = list(grants)
    taken_gpus = {gpu.address for grant in held for gpu in grant.gpus}
    taken_addresses = {grant.address for grant in held}
    addresses = host.addresses
    if addresses is not None:
        addresses = tuple(address for address in addresses if address not in taken_addresses)
    return Host(
        gpus=tuple(gpu for gpu in host.gpus if gpu.address not in taken_gpus),
        cpu_cores=max(0, host.cpu_cores - sum(grant.shape.cpu_cores for grant in held)),
        memory_mib=max(0, host.memory_mib - sum(grant.shape.memory_mib for grant in held)),
        storage_gib=max(0, host.storage_gib - sum(grant.shape.storage_gib for grant in held)),
        addresses=addresses,
    )


def place(shape: Shape, free: Host) -> Placement | Shortage:
    """Choose GPUs and an address for ``shape`` from what is free, or say what is short."""
    gpus = sorted(
        (gpu for gpu in free.gpus if gpu.gpu_type == shape.gpu_type), key=lambda gpu: gpu.address
    )
    checks = (
        (len(gpus) >= shape.gpu_count, Shortage.GPUS),
        (free.cpu_cores >= shape.cpu_cores, Shortage.CPU_CORES),
        (free.memory_mib >= shape.memory_mib, Shortage.MEMORY),
        (free.storage_gib >= shape.storage_gib, Shortage.STORAGE),
        (free.addresses is None or bool(free.addresses), Shortage.ADDRESSES),
    )
    for enough, shortage in checks:
        if not enough:
            return shortage
    address = min(free.addresses) if free.addresses else None
    return Placement(tuple(gpus[: shape.gpu_count]), address)


def how_many(shape: Shape, free: Host) -> int:
    """How many instances of ``shape`` could be placed one after another."""
    count = 0
    while isinstance(placement := place(shape, free), Placement):
        free = _without(free, shape, placement)
        count += 1
    return count


def _without(free: Host, shape: Shape, placement: Placement) -> Host:
    addresses = free.addresses
    if addresses is not None:
        addresses = tuple(address for address in addresses if address != placement.address)
    return replace(
        free,
        gpus=tuple(gpu for gpu in free.gpus if gpu not in placement.gpus),
        cpu_cores=free.cpu_cores - shape.cpu_cores,
        memory_mib=free.memory_mib - shape.memory_mib,
        storage_gib=free.storage_gib - shape.storage_gib,
        addresses=addresses,
    )
