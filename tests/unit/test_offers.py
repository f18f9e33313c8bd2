"""Offerings and grants as pure functions of config, host and what is held already."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud import offers
from gpud.config import Config
from gpud.errors import Code, GpudError
from gpud.model import Gpu, Grant, Host, NumaNode, PciAddress, Tier
from gpud.offers import NoCapacity
from tests.unit.allocator.hosts import hosts
from tests.unit.service import config_from, order

PER_GPU = {"cpu_cores": 4, "memory_gib": 15.75, "storage_gib": 100}


def gpus(gpu_type: str, count: int) -> tuple[Gpu, ...]:
    return tuple(Gpu(PciAddress(0, number, 0, 0), gpu_type) for number in range(count))


def config(**changes: Any) -> Config:
    h100 = {
        "gpu_type": "h100_sxm",
        "gpu_counts": [1, 2, 4, 8],
        "per_gpu": PER_GPU,
        "price_per_gpu_hour": {"on_demand": "0.1", "spot": "0"},
    }
    l40s = {"gpu_type": "l40s", "per_gpu": PER_GPU, "price_per_gpu_hour": {"spot": "0.333333"}}
    return config_from(Path("/state"), **{"gpus": {}, "offers": [h100, l40s], **changes})


def room(cpu_cores: int = 64, memory_mib: int = 200_000) -> tuple[NumaNode, ...]:
    return (NumaNode(0, cpu_cores, memory_mib),)


HOST = Host(gpus("h100_sxm", 8), room(), 4000)


def test_1_2_4_and_8_gpu_shapes_share_one_pool() -> None:
    found = {
        one.gpu_count: (one.available_count, one.cpu_cores, one.storage_gb)
        for one in offers.offerings(config(), HOST, [])
        if (one.gpu_type, one.tier) == ("h100_sxm", "spot")
    }
    assert found == {1: (8, 4, 100), 2: (4, 8, 200), 4: (2, 16, 400), 8: (1, 32, 800)}


def test_ram_is_rounded_down_and_the_grant_is_exact() -> None:
    by_count = {one.gpu_count: one.ram_gb for one in offers.offerings(config(), HOST, [])}
    assert (by_count[2], by_count[4], by_count[8]) == (31, 63, 126)
    granted = offers.grant(config(), HOST, [], order(gpu_count=2), "sha256:x")
    assert granted.shape.memory_mib == 32256


def test_prices_are_decimal_until_they_are_sent() -> None:
    granted = offers.grant(config(), HOST, [], order(gpu_count=8), "sha256:x")
    assert granted.cost_per_hour == Decimal("0.8")
    prices = {
        (one.gpu_type, one.tier, one.gpu_count): one.price_per_hour
        for one in offers.offerings(config(), HOST, [])
    }
    assert prices["h100_sxm", "on_demand", 8] == 0.8
    assert prices["h100_sxm", "spot", 8] == 0
    assert prices["l40s", "spot", 1] == 0.333333


def test_what_is_not_there_is_listed_with_none_available() -> None:
    l40s = [one for one in offers.offerings(config(), HOST, []) if one.gpu_type == "l40s"]
    assert [(one.available_count, one.stock_status) for one in l40s] == [(0, "Low")]


@pytest.mark.parametrize(
    ("available", "stock"), [(8, "High"), (5, "High"), (4, "Medium"), (3, "Medium"), (2, "Low")]
)
def test_stock_by_thresholds(available: int, stock: str) -> None:
    changed = config(stock={"medium_from": 3, "high_from": 5})
    host = Host(gpus("h100_sxm", available), room(), 4000)
    assert offers.offerings(changed, host, [])[0].stock_status == stock


def test_a_grant_names_all_that_the_instance_gets() -> None:
    addresses = (IPv4Address("10.0.0.3"), IPv4Address("10.0.0.2"))
    host = Host(gpus("h100_sxm", 2), room(), 4000, addresses)
    granted = offers.grant(config(), host, [], order(tier=Tier.SPOT, region="US"), "sha256:x")
    assert granted == Grant(
        shape=next(offers.shapes(config().offers[0])),
        gpus=gpus("h100_sxm", 1),
        address=IPv4Address("10.0.0.2"),
        image_digest="sha256:x",
        cost_per_hour=Decimal(0),
        region="US",
        datacenter_location="US-Demo-1",
        nodes=(NumaNode(0, 4, 16_128),),
    )


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (Host(), "free GPUs of that type"),
        (Host(HOST.gpus, room(cpu_cores=3), 4000), "free CPU cores"),
        (Host(HOST.gpus, room(memory_mib=16_127), 4000), "free memory"),
        (Host(HOST.gpus, room(), 99), "free disk space"),
        (Host(HOST.gpus, room(), 4000, ()), "free addresses"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refusal_says_what_is_short(host: Host, words: str) -> None:
    with pytest.raises(NoCapacity, match=words) as refused:
        offers.grant(config(), host, [], order(), "sha256:x")
    assert refused.value.code is Code.NO_CAPACITY


@pytest.mark.parametrize(
    ("change", "faults"),
    [
        ({"gpu_type": "h200_sxm"}, {"gpu_type": "not offered here; offered: h100_sxm, l40s"}),
        ({"gpu_count": 3}, {"gpu_count": "not offered; counts of this type: 1, 2, 4, 8"}),
        (
            {"gpu_type": "l40s", "gpu_count": 2, "region": "EU"},
            {
                "gpu_count": "not offered; counts of this type: 1",
                "tier": "on_demand is not offered for this type",
                "region": "this server is in US",
            },
        ),
    ],
    ids=["type", "count", "all"],
)
def test_what_is_never_sold_is_refused_with_every_fault(
    change: dict[str, Any], faults: dict[str, str]
) -> None:
    with pytest.raises(GpudError, match="does not offer") as refused:
        offers.check_offered(config(), order(**change))
    assert refused.value.code is Code.NOT_OFFERED
    assert {fault.where: fault.what for fault in refused.value.problems} == faults


def test_a_server_that_sells_nothing_says_so() -> None:
    with pytest.raises(GpudError) as refused:
        offers.check_offered(config(offers=[]), order())
    assert "nothing at present" in str(refused.value)


SMALL = {"cpu_cores": 1, "memory_gib": 0.25, "storage_gib": 1}


@given(
    whole=hosts(),
    history=st.lists(st.sampled_from((1, 2, 3, 4)), max_size=5),
    ended=st.sets(st.integers(0, 4)),
)
def test_of_every_shape_as_many_are_admitted_as_are_offered(
    whole: Host, history: list[int], ended: set[int]
) -> None:
    price = {"on_demand": "1"}
    h100 = {"gpu_type": "h100_sxm", "gpu_counts": [1, 2, 3, 4], "price_per_gpu_hour": price}
    selling = config(offers=[{**h100, "per_gpu": SMALL}])
    nodes = tuple(replace(node, memory_mib=node.memory_mib * 64) for node in whole.nodes)
    whole = replace(whole, nodes=nodes)
    grants: list[Grant] = []
    for count in history:
        grants += admitted(selling, whole, grants, count, at_most=1)
    grants = [one for number, one in enumerate(grants) if number not in ended]
    for one in offers.offerings(selling, whole, grants):
        assert one.available_count == len(admitted(selling, whole, grants, one.gpu_count))


def admitted(
    selling: Config, whole: Host, grants: list[Grant], gpu_count: int, at_most: int = 99
) -> list[Grant]:
    """What orders get that come one after another, until one is refused."""
    new: list[Grant] = []
    with suppress(NoCapacity):
        while len(new) < at_most:
            wanted = order(gpu_count=gpu_count)
            new.append(offers.grant(selling, whole, [*grants, *new], wanted, "sha256:x"))
    return new
