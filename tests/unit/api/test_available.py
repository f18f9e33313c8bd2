"""GET /v1/gpu/available: what can be provisioned right now, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.client import Client
from tests.unit.service import SETTINGS, Service, make_ended

AVAILABLE = "/v1/gpu/available"


def sold(counts: list[int], prices: dict[str, str], **changes: Any) -> dict[str, Any]:
    """Settings that sell H100s in these counts at these prices."""
    offer = {**SETTINGS["offers"][0], "gpu_counts": counts, "price_per_gpu_hour": prices}
    return {"offers": [offer], **changes}


def stand_ins(count: int) -> dict[str, Any]:
    return {"stand_ins": [{"gpu_type": "h100_sxm", "count": count}]}


async def offerings(client: Client) -> list[dict[str, Any]]:
    answer = await client.get(AVAILABLE)
    assert answer.status == 200
    found: list[dict[str, Any]] = answer.json["offerings"]
    return found


async def counts(client: Client) -> dict[int, int]:
    return {one["gpu_count"]: one["available_count"] for one in await offerings(client)}


async def test_an_offering_has_exactly_these_fields(client: Client) -> None:
    assert (await offerings(client))[0] == {
        "gpu_type": "h100_sxm",
        "gpu_count": 1,
        "vram_per_gpu_gb": 80,
        "cpu_cores": 4,
        "ram_gb": 16,
        "storage_gb": 100,
        "price_per_hour": 3.49,
        "tier": "on_demand",
        "region": "US",
        "datacenter_location": "US-Demo-1",
        "stock_status": "Medium",
        "available_count": 2,
    }


async def test_every_shape_and_tier_is_an_offering_over_one_pool(client: Client) -> None:
    found = {
        (one["gpu_count"], one["tier"]): (one["available_count"], one["price_per_hour"])
        for one in await offerings(client)
    }
    assert found == {
        (1, "on_demand"): (2, 3.49),
        (1, "spot"): (2, 1.99),
        (2, "on_demand"): (1, 6.98),
        (2, "spot"): (1, 3.98),
    }


@pytest.mark.parametrize("settings", [{"price_per_hour_is": "gpu"}], ids=[""])
async def test_prices_can_be_per_gpu_and_the_cost_stays_the_whole(client: Client) -> None:
    prices = {(one["gpu_count"], one["price_per_hour"]) for one in await offerings(client)}
    assert prices == {(1, 3.49), (1, 1.99), (2, 3.49), (2, 1.99)}
    assert (await client.order(gpu_count=2)).json["cost_per_hour"] == 6.98


@pytest.mark.parametrize(
    "settings",
    [sold([1], {"spot": "1"}, gpus=stand_ins(6), stock={"medium_from": 3, "high_from": 5})],
    ids=[""],
)
async def test_stock_goes_down_through_the_configured_thresholds(client: Client) -> None:
    seen = []
    for number in range(6):
        (offering,) = await offerings(client)
        seen.append((offering["available_count"], offering["stock_status"]))
        assert (await client.order(str(number), tier="spot")).status == 201
    assert seen == [
        (6, "High"),
        (5, "High"),
        (4, "Medium"),
        (3, "Medium"),
        (2, "Low"),
        (1, "Low"),
    ]
    assert await offerings(client) == []


async def test_an_order_and_its_end_change_what_is_listed(client: Client, service: Service) -> None:
    assert await counts(client) == {1: 2, 2: 1}
    made = await client.order()
    assert await counts(client) == {1: 1}
    await client.delete(made.headers["Location"])
    assert await counts(client) == {1: 1}, "what is stopping still holds its GPU"
    await make_ended(service, made.json["upstream_id"])
    assert await counts(client) == {1: 2, 2: 1}


async def test_the_answer_is_remembered_while_nothing_changes(
    client: Client, service: Service
) -> None:
    await client.get(AVAILABLE)
    first = service.desk.available_json()
    await client.order(gpu_type="l40s")
    assert service.desk.available_json() is first
    await service.inventory.refresh()
    assert service.desk.available_json() is not first


async def test_nothing_is_listed_while_the_hypervisor_is_away(
    client: Client, service: Service
) -> None:
    assert await offerings(client)
    service.hypervisor.up = False
    assert await offerings(client) == []
    service.hypervisor.up = True
    assert await offerings(client)


@pytest.mark.parametrize("settings", [{"guest": {"image": "missing"}}], ids=[""])
async def test_nothing_is_listed_without_the_guest_image(client: Client) -> None:
    assert await offerings(client) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"offers": []},
        {"gpus": {"stand_ins": []}},
        {"host_reserve": {"cpu_cores": 61, "memory_gib": 0, "storage_gib": 0}},
        {"host_reserve": {"cpu_cores": 0, "memory_gib": 241, "storage_gib": 0}},
        {"host_reserve": {"cpu_cores": 0, "memory_gib": 0, "storage_gib": 3901}},
    ],
    ids=["offers", "gpus", "cores", "memory", "disk"],
)
async def test_nothing_is_listed_when_anything_is_short(client: Client) -> None:
    assert await offerings(client) == []


@pytest.mark.parametrize(
    "settings",
    [
        {
            "network": {
                "mode": "network",
                "subnet": "10.9.0.0/29",
                "first_address": "10.9.0.2",
                "last_address": "10.9.0.2",
            }
        }
    ],
    ids=[""],
)
async def test_addresses_count_too(client: Client) -> None:
    assert await counts(client) == {1: 1, 2: 1}
    await client.order()
    assert await offerings(client) == []
    assert (await client.order("gpuai-2")).code == "no_capacity"
