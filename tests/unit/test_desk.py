"""The desk on its own: admission from the real store, and what it counts and remembers."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpud.backup import back_up, restore
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from gpud.host.capacity import Capacity
from gpud.model import NumaNode, PciAddress, Tier
from tests.unit.service import (
    Clock,
    Service,
    config_from,
    images,
    make_ended,
    make_running,
    order,
    running_service,
)

__all__ = ["images"]  # a fixture


@pytest.fixture
async def service(tmp_path: Path, images: ImageStore) -> AsyncIterator[Service]:
    async with running_service(config_from(tmp_path), images, Clock()) as service:
        yield service


async def refusal(service: Service, **changes: object) -> Code:
    with pytest.raises(GpudError) as refused:
        await service.desk.order(order("other", **changes))
    assert await service.store.find("other") is None
    return refused.value.code


async def test_an_order_gets_the_image_as_it_is_now(service: Service) -> None:
    accepted = await service.desk.order(order())
    assert accepted.instance.grant.image_digest == service.images.resolve("base").digest
    assert accepted.estimated_ready_s == 180
    assert not accepted.replayed


async def test_an_address_rests_while_there_are_others_also_over_a_restart(
    tmp_path: Path, images: ImageStore
) -> None:
    """What is still on its way to the former guest must not reach the next."""
    network = {"mode": "network", "name": "guests", "subnet": "10.7.0.0/29"}  # four of them
    config, clock, given = config_from(tmp_path, network=network), Clock(), []
    for number in range(6):
        clock.advance(60)
        async with running_service(config, images, clock) as service:
            accepted = await service.desk.order(order(f"order-{number}"))
            given.append(str(accepted.instance.grant.address))
            await make_ended(service, accepted.instance.upstream_id)
    assert given == [f"10.7.0.{last}" for last in (2, 3, 4, 5, 6, 2)]


async def test_each_refusal_is_counted_by_its_code(service: Service) -> None:
    assert await refusal(service, gpu_count=9) is Code.NOT_OFFERED
    await service.desk.order(order(gpu_count=2))
    assert await refusal(service) is Code.NO_CAPACITY
    service.hypervisor.up = False
    assert await refusal(service) is Code.HYPERVISOR_UNAVAILABLE
    for code in ("not_offered", "no_capacity", "hypervisor_unavailable", "accepted"):
        assert service.metric("gpud_orders_total", outcome=code) == 1
    assert service.metric("gpud_capacity_refusals_total", shortage="gpus") == 1
    claims = service.metric("gpud_gpu_claims_total", gpu_type="h100_sxm", tier="on_demand")
    assert claims == 2


async def test_what_is_never_sold_is_told_even_where_all_is_sold_out(service: Service) -> None:
    await service.desk.order(order(gpu_count=2))
    assert await refusal(service, tier=Tier.SPOT, region="EU") is Code.NOT_OFFERED


async def test_the_estimate_is_the_upper_quartile_of_recent_boots(service: Service) -> None:
    for seconds in (10, 20, 30, 40):
        upstream_id = (await service.desk.order(order(f"boot-{seconds}"))).instance.upstream_id
        service.clock.advance(seconds)
        await make_running(service, upstream_id)
        await make_ended(service, upstream_id)
    assert (await service.desk.order(order())).estimated_ready_s == 40
    assert (await service.desk.order(order("big", gpu_count=1, tier=Tier.SPOT))).replayed is False


async def test_a_shape_that_never_booted_has_the_configured_estimate(service: Service) -> None:
    upstream_id = (await service.desk.order(order("one"))).instance.upstream_id
    service.clock.advance(5)
    await make_running(service, upstream_id)
    await make_ended(service, upstream_id)
    assert (await service.desk.order(order(gpu_count=2))).estimated_ready_s == 180


async def test_the_offerings_and_the_bytes_sent_agree(service: Service) -> None:
    await service.desk.order(order())
    assert [one.available_count for one in service.desk.offerings()] == [1, 1, 0, 0]
    assert service.desk.available_json().count(b'"available_count": 1') == 2
    assert b'"available_count": 0' not in service.desk.available_json()


@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    cpu_cores=st.integers(0, 20),
    memory_gib=st.integers(0, 80),
    held=st.integers(0, 2),
    count=st.sampled_from([1, 2]),
)
async def test_as_many_orders_are_accepted_as_were_said_to_be_available(
    tmp_path_factory: pytest.TempPathFactory,
    images: ImageStore,
    cpu_cores: int,
    memory_gib: int,
    held: int,
    count: int,
) -> None:
    config = config_from(
        tmp_path_factory.mktemp("state"),
        gpus={"stand_ins": [{"gpu_type": "h100_sxm", "count": 4}]},
    )

    def measure() -> Capacity:
        return Capacity((NumaNode(0, cpu_cores, memory_gib * 1024),), 1000)

    async with running_service(config, images, Clock(), measure) as service:
        for number in range(held):
            if service.desk.offerings()[0].available_count:
                await service.desk.order(order(f"held-{number}"))
        available = {one.gpu_count: one.available_count for one in service.desk.offerings()}[count]
        for number in range(available):
            await service.desk.order(order(f"new-{number}", gpu_count=count))
        assert await refusal(service, gpu_count=count) is Code.NO_CAPACITY


async def test_nothing_is_for_sale_on_a_state_from_a_backup_until_it_is_trusted(
    tmp_path: Path, images: ImageStore
) -> None:
    config = config_from(tmp_path / "state")
    async with running_service(config, images, Clock()) as service:
        assert b"h100_sxm" in service.desk.available_json()
        back_up(config.state_dir, tmp_path / "backup")
    restore(config.state_dir, tmp_path / "backup")
    async with running_service(config, images, Clock()) as service:
        assert b"h100_sxm" not in service.desk.available_json()
        assert await refusal(service) is Code.NO_CAPACITY
        await service.store.trust()
        assert b"h100_sxm" in service.desk.available_json()
        await service.desk.order(order("other"))


# -- drains, and why something is not offered ------------------------------------------------------


async def test_a_drained_server_lists_its_offers_with_nothing_available_and_refuses_orders(
    service: Service,
) -> None:
    accepted = await service.desk.order(order())
    assert b"h100_sxm" in service.desk.available_json()
    await service.store.drain(None, "new kernel")
    assert [one.available_count for one in service.desk.offerings()] == [0] * 4
    assert service.desk.available_json() == b'{"offerings": []}'
    assert await refusal(service) is Code.NO_CAPACITY
    assert await refusal(service, gpu_count=9) is Code.NOT_OFFERED
    again = await service.desk.order(order())
    assert (again.replayed, again.instance) == (True, accepted.instance)
    await service.store.undrain(None)
    await service.desk.order(order("other"))


async def test_a_drained_card_alone_is_not_sold(service: Service) -> None:
    first, second = service.inventory.cards
    await service.store.drain(first.address)
    assert [one.available_count for one in service.desk.offerings()] == [1, 1, 0, 0]
    sold = (await service.desk.order(order())).instance.grant
    assert [gpu.address for gpu in sold.gpus] == [second.address]
    assert await refusal(service) is Code.NO_CAPACITY


_ACTS = st.lists(
    st.tuples(
        st.sampled_from(["order", "order two", "end", "drain", "undrain", "quarantine", "release"]),
        st.sampled_from([0, 1, 2, 3, None]),
    ),
    max_size=25,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=_ACTS)
async def test_a_drained_card_is_never_granted(
    tmp_path_factory: pytest.TempPathFactory,
    images: ImageStore,
    acts: list[tuple[str, int | None]],
) -> None:
    config = config_from(
        tmp_path_factory.mktemp("state"),
        gpus={"stand_ins": [{"gpu_type": "h100_sxm", "count": 4}]},
    )
    async with running_service(config, images, Clock()) as service:
        addresses = [card.address for card in service.inventory.cards]
        drained: set[PciAddress | None] = set()
        for number, (act, which) in enumerate(acts):
            address = addresses[which] if which is not None else None
            if act == "drain":
                await service.store.drain(address)
                drained.add(address)
            elif act == "undrain":
                assert await service.store.undrain(address) == (address in drained)
                drained.discard(address)
            elif act == "quarantine" and address is not None:
                await service.store.quarantine(address, "smells")
            elif act == "release" and address is not None:
                await service.store.release(address)
            elif act == "end" and service.store.live:
                await make_ended(service, next(iter(service.store.live)))
            elif act.startswith("order"):
                await _order_beside(service, drained, number, 2 if act == "order two" else 1)


async def _order_beside(
    service: Service, drained: set[PciAddress | None], number: int, gpu_count: int
) -> None:
    said = {one.gpu_count: one.available_count for one in service.desk.offerings()}[gpu_count]
    if not said:
        assert await refusal(service, gpu_count=gpu_count) is Code.NO_CAPACITY
        return
    made = (await service.desk.order(order(f"n-{number}", gpu_count=gpu_count))).instance
    assert drained.isdisjoint({None, *(gpu.address for gpu in made.grant.gpus)})


async def test_why_is_told_of_what_is_not_available_and_of_nothing_else(service: Service) -> None:
    assert {why for _, why in service.desk.explained()} == {""}
    await service.desk.order(order())
    told = {one.gpu_count: why for one, why in service.desk.explained()}
    assert told == {1: "", 2: "2 GPUs needed, 1 of 2 free: 1 in use"}
    assert [one for one, _ in service.desk.explained()] == service.desk.offerings()


async def test_what_closes_the_desk_is_told_all_of_it(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert service.desk.closed() == []
    await service.store.drain(None, "new kernel")
    service.hypervisor.up = False
    service.store.restored = True
    monkeypatch.setattr(service.desk, "_unrecorded_at", math.inf)
    monkeypatch.setattr(service.inventory, "view", 0)
    monkeypatch.setattr(service.inventory, "problem", "/sys is gone")
    monkeypatch.setattr(service.images, "_root", Path("/nowhere"))
    told = service.desk.closed()
    for number, words in enumerate(
        ("from a backup", "could not be recorded", "libvirt does not answer",
         "the guest image cannot be used", "the host cannot be read: /sys is gone",
         "the server is drained since 2026-09-21 14:13 UTC: new kernel"),
    ):  # fmt: skip
        assert words in told[number]
    for one, why in service.desk.explained():
        assert (one.available_count, why) == (0, "; ".join(told))
