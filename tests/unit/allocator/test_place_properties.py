"""What holds of every placement on every host, held against all ways to serve the order."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from hypothesis import event, given
from hypothesis import strategies as st

from gpud.allocator import Placement, Shortage, how_many, place, remaining
from gpud.model import Grant, Host, Shape
from tests.unit.allocator.hosts import (
    COUNTS,
    all_ways,
    bundles,
    grant,
    hosts,
    locality,
    orders_left,
    servers,
    shape,
    shapes,
)


@given(wanted=shapes, free=hosts())
def test_an_order_gets_what_it_asks_for_of_what_is_free(wanted: Shape, free: Host) -> None:
    given = place(wanted, free, COUNTS)
    if not isinstance(given, Placement):
        return
    assert len(set(given.gpus)) == len(given.gpus) == wanted.gpu_count
    assert set(given.gpus) <= set(free.gpus)
    assert {gpu.gpu_type for gpu in given.gpus} == {wanted.gpu_type}
    has = {node.number: node for node in free.nodes}
    for node in given.nodes:
        assert 0 <= node.cpu_cores <= has[node.number].cpu_cores
        assert 0 <= node.memory_mib <= has[node.number].memory_mib
        assert (node.cpu_cores, node.memory_mib) != (0, 0)
    assert sum(node.cpu_cores for node in given.nodes) == wanted.cpu_cores
    assert sum(node.memory_mib for node in given.nodes) == wanted.memory_mib
    assert given.address is None if free.addresses is None else given.address in free.addresses


@given(wanted=shapes, free=hosts())
def test_bundles_are_given_whole_or_not_at_all(wanted: Shape, free: Host) -> None:
    given = place(wanted, free, COUNTS)
    if isinstance(given, Placement):
        touched = [one for one in bundles(free) if set(one) & set(given.gpus)]
        assert set(chain(*touched)) == set(given.gpus)


@given(wanted=shapes, free=hosts())
def test_an_order_is_refused_only_when_nothing_can_serve_it(wanted: Shape, free: Host) -> None:
    given = place(wanted, free, COUNTS)
    elsewhere_enough = free.addresses != () and free.storage_gib >= wanted.storage_gib
    assert isinstance(given, Placement) == bool(all_ways(wanted, free) and elsewhere_enough)
    if given is Shortage.CPU_CORES:
        assert free.cpu_cores < wanted.cpu_cores
    if given is Shortage.MEMORY:
        assert free.memory_mib < wanted.memory_mib
    assert how_many(wanted, free, COUNTS) >= isinstance(given, Placement)


@given(wanted=shapes, free=hosts())
def test_it_comes_from_one_node_if_any_has_all_of_it_and_else_from_the_fewest(
    wanted: Shape, free: Host
) -> None:
    given = place(wanted, free, COUNTS)
    if isinstance(given, Placement):
        spanned = {gpu.numa_node for gpu in given.gpus} | {node.number for node in given.nodes}
        fewest = len(all_ways(wanted, free)[0][0])
        event(f"{fewest} nodes")
        assert len(spanned - {None}) <= fewest


@given(wanted=shapes, free=hosts())
def test_cores_and_memory_come_from_the_gpus_own_nodes_first(wanted: Shape, free: Host) -> None:
    given = place(wanted, free, COUNTS)
    if not isinstance(given, Placement):
        return
    own = {gpu.numa_node for gpu in given.gpus}
    drawn = {node.number: node for node in given.nodes}
    for what in ("cpu_cores", "memory_mib"):
        if any(getattr(node, what) for node in given.nodes if node.number not in own):
            for node in free.nodes:
                left = getattr(node, what) - getattr(drawn.get(node.number), what, 0)
                assert node.number not in own or left == 0


@given(wanted=shapes, free=hosts())
def test_no_way_from_as_few_nodes_is_better_on_bundles_and_nvlink(
    wanted: Shape, free: Host
) -> None:
    given = place(wanted, free, COUNTS)
    if isinstance(given, Placement):
        ways = [tuple(chain(*chosen)) for _, chosen in all_ways(wanted, free)]
        assert locality(given.gpus, free) == min(locality(way, free) for way in ways)


@given(wanted=st.builds(shape, st.sampled_from((1, 1, 2))) | shapes, free=servers() | hosts())
def test_of_equally_good_ways_on_one_node_it_leaves_the_most_big_orders(
    wanted: Shape, free: Host
) -> None:
    given = place(wanted, free, COUNTS)
    if not isinstance(given, Placement):
        return
    ways = all_ways(wanted, free)
    if len(ways[0][0]) > 1:
        return
    best = locality(given.gpus, free)
    possible = [
        orders_left(wanted, _after(wanted, Placement(gpus, None, nodes), free))
        for (node,), chosen in ways
        for gpus in [tuple(chain(*chosen))]
        for nodes in [(replace(node, cpu_cores=wanted.cpu_cores, memory_mib=wanted.memory_mib),)]
        if locality(gpus, free) == best
    ]
    event(f"{len({tuple(one) for one in possible})} outcomes")
    assert orders_left(wanted, _after(wanted, given, free)) == max(possible)


@given(wanted=shapes, free=hosts(), turn=st.integers(1, 7))
def test_the_order_in_which_a_host_is_told_makes_no_difference(
    wanted: Shape, free: Host, turn: int
) -> None:
    gpus, nodes = free.gpus[turn:] + free.gpus[:turn], free.nodes[::-1]
    told = replace(free, gpus=gpus, nodes=nodes)
    assert place(wanted, told, COUNTS) == place(wanted, free, COUNTS)


@given(
    orders=st.lists(st.tuples(shapes, st.booleans()), max_size=6),
    ended=st.sets(st.integers(0, 5)),
    wanted=shapes,
    whole=hosts(),
)
def test_as_many_are_admitted_one_after_another_as_were_said_to_be_available(
    orders: list[tuple[Shape, bool]], ended: set[int], wanted: Shape, whole: Host
) -> None:
    """After some orders came and went, some of them from before grants told their nodes."""
    grants: list[Grant] = []
    for one, told in orders:
        if isinstance(given := place(one, remaining(whole, grants), COUNTS), Placement):
            grants.append(replace(grant(one, given), nodes=given.nodes if told else ()))
    grants = [one for number, one in enumerate(grants) if number not in ended]
    available = how_many(wanted, remaining(whole, grants), COUNTS)
    admitted = 0
    while isinstance(given := place(wanted, remaining(whole, grants), COUNTS), Placement):
        grants.append(grant(wanted, given))
        admitted += 1
    event(f"{available} available")
    assert admitted == available
    _assert_nothing_is_held_twice(whole, grants)


def _assert_nothing_is_held_twice(whole: Host, grants: list[Grant]) -> None:
    for held in (
        [gpu.address for one in grants for gpu in one.gpus],
        [one.address for one in grants if one.address is not None],
    ):
        assert len(held) == len(set(held))
    assert sum(one.shape.cpu_cores for one in grants) <= whole.cpu_cores
    assert sum(one.shape.memory_mib for one in grants) <= whole.memory_mib
    assert sum(one.shape.storage_gib for one in grants) <= whole.storage_gib
    for node in whole.nodes:
        drawn = [part for one in grants for part in one.nodes if part.number == node.number]
        assert sum(part.cpu_cores for part in drawn) <= node.cpu_cores
        assert sum(part.memory_mib for part in drawn) <= node.memory_mib


@given(
    whole=hosts(),
    before=hosts(),
    wanted=st.lists(st.tuples(shapes, st.booleans()), max_size=5),
)
def test_a_host_that_changed_never_has_more_left_than_is_not_in_use(
    whole: Host, before: Host, wanted: list[tuple[Shape, bool]]
) -> None:
    """Grants from before a change of its nodes, cards, or disk."""
    grants: list[Grant] = []
    for one, told in wanted:
        if isinstance(given := place(one, remaining(before, grants), COUNTS), Placement):
            grants.append(replace(grant(one, given), nodes=given.nodes if told else ()))
    left = remaining(whole, grants)
    for what in ("cpu_cores", "memory_mib", "storage_gib"):
        used = sum(getattr(one.shape, what) for one in grants)
        assert getattr(left, what) == max(0, getattr(whole, what) - used)
    assert all(node.cpu_cores >= 0 and node.memory_mib >= 0 for node in left.nodes)
    taken = {gpu.address for one in grants for gpu in one.gpus}
    assert not taken & {gpu.address for gpu in left.gpus}
    assert left == remaining(whole, reversed(grants))


def _after(of: Shape, given: Placement, free: Host) -> Host:
    return remaining(free, [grant(of, given)])
