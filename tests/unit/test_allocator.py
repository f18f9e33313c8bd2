"""What an order gets of the host, and how many such orders fit."""

from __future__ import annotations

from decimal import Decimal
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpud.allocator import Placement, Shortage, how_many, place, remaining
from gpud.model import Gpu, Grant, Host, PciAddress, Shape


def gpu(number: int, gpu_type: str = "h100_sxm") -> Gpu:
    return Gpu(PciAddress(0, number, 0, 0), gpu_type)


def shape(gpu_count: int = 1, cpu_cores: int = 4, memory_mib: int = 64, disk: int = 9) -> Shape:
    return Shape("h100_sxm", gpu_count, cpu_cores, memory_mib, disk)


def grant(of: Shape, placement: Placement) -> Grant:
    return Grant(of, placement.gpus, placement.address, "sha256:x", Decimal(1), "US", "here")


ADDRESSES = tuple(IPv4Address(f"10.0.0.{number}") for number in range(2, 5))
HOST = Host((gpu(2), gpu(1), gpu(3, "l40s")), 8, 128, 18, ADDRESSES)


def test_the_lowest_gpus_and_address_are_given_first() -> None:
    assert place(shape(), HOST) == Placement((gpu(1),), ADDRESSES[0])
    assert place(shape(2), HOST) == Placement((gpu(1), gpu(2)), ADDRESSES[0])


def test_without_addresses_none_is_given() -> None:
    assert place(shape(), Host((gpu(1),), 4, 64, 9)) == Placement((gpu(1),), None)


@pytest.mark.parametrize(
    ("wanted", "short"),
    [
        (shape(3), Shortage.GPUS),
        (shape(cpu_cores=9), Shortage.CPU_CORES),
        (shape(memory_mib=129), Shortage.MEMORY),
        (shape(disk=19), Shortage.STORAGE),
        (shape(3, 9, 129, 19), Shortage.GPUS),
    ],
)
def test_what_is_short_is_named(wanted: Shape, short: Shortage) -> None:
    assert place(wanted, HOST) is short
    assert how_many(wanted, HOST) == 0


def test_no_address_left_is_a_shortage() -> None:
    assert place(shape(), Host((gpu(1),), 4, 64, 9, ())) is Shortage.ADDRESSES


def test_exactly_enough_is_enough() -> None:
    assert isinstance(place(shape(2, 8, 128, 18), HOST), Placement)


def test_grants_are_taken_off() -> None:
    held = grant(shape(), Placement((gpu(1),), ADDRESSES[1]))
    left = Host((gpu(2), gpu(3, "l40s")), 4, 64, 9, (ADDRESSES[0], ADDRESSES[2]))
    assert remaining(HOST, [held]) == left
    assert remaining(HOST, []) == HOST


def test_nothing_goes_below_zero_when_the_host_has_shrunk() -> None:
    held = grant(shape(1, 99, 999, 99), Placement((gpu(9),), None))
    left = remaining(HOST, [held])
    assert (left.cpu_cores, left.memory_mib, left.storage_gib) == (0, 0, 0)
    assert left.addresses == ADDRESSES
    assert remaining(Host(), [held]).addresses is None


small = st.integers(0, 40)
hosts = st.builds(
    Host,
    gpus=st.integers(0, 8).map(lambda count: tuple(gpu(number) for number in range(count))),
    cpu_cores=small,
    memory_mib=small,
    storage_gib=small,
    addresses=st.none() | st.integers(0, 8).map(
        lambda count: tuple(IPv4Address(number) for number in range(count))
    ),
)  # fmt: skip
shapes = st.builds(
    shape, st.integers(1, 4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)
)


@settings(max_examples=150, deadline=None)
@given(host=hosts, taken=st.lists(shapes, max_size=3), wanted=shapes)
def test_as_many_can_be_admitted_one_after_another_as_are_said_to_be_available(
    host: Host, taken: list[Shape], wanted: Shape
) -> None:
    grants: list[Grant] = []
    for one in taken:
        placement = place(one, remaining(host, grants))
        if isinstance(placement, Placement):
            grants.append(grant(one, placement))
    available = how_many(wanted, remaining(host, grants))
    admitted = 0
    while isinstance(placement := place(wanted, remaining(host, grants)), Placement):
        grants.append(grant(wanted, placement))
        admitted += 1
    assert admitted == available
    gpus = [gpu.address for one in grants for gpu in one.gpus]
    assert len(gpus) == len(set(gpus))
    addresses = [one.address for one in grants if one.address is not None]
    assert len(addresses) == len(set(addresses))
    assert sum(one.shape.cpu_cores for one in grants) <= host.cpu_cores
    assert sum(one.shape.memory_mib for one in grants) <= host.memory_mib
    assert sum(one.shape.storage_gib for one in grants) <= host.storage_gib
