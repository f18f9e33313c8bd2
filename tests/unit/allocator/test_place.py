"""What an order gets of servers as they are built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import IPv4Address

import pytest

from gpud.allocator import Placement, Shortage, how_many, place, remaining
from gpud.allocator.choices import all_nodes, choices
from gpud.allocator.stacks import stacked
from gpud.model import Gpu, Grant, Host, NumaNode, Shape
from tests.unit.allocator.hosts import ADDRESSES, ROOMY, buses, gpu, grant, host, shape

HOST = Host((gpu(2), gpu(1), gpu(3, gpu_type="l40s")), (NumaNode(0, 8, 128),), 18, ADDRESSES)


def server(count: int = 8, per_node: int = 4, links: str = "", **changes: str) -> list[Gpu]:
    """GPUs on nodes in turn; ``links`` has the NVLink set of each, a dot for one without."""
    names = links or "." * count
    return [
        gpu(number, number // per_node, nvlink=names[number].strip("."), **changes)
        for number in range(count)
    ]


PAIRS = server(links="aabbccdd")
HGX = server(links="aaaaaaaa")


def sold(free: Host, *gpu_counts: int) -> list[list[int]]:
    """The buses of the GPUs that orders get one after another."""
    grants: list[Grant] = []
    found = []
    for count in gpu_counts:
        given = place(shape(count), remaining(free, grants))
        found.append(buses(given))
        assert isinstance(given, Placement)
        grants.append(grant(shape(count), given))
    return found


def test_the_lowest_gpus_and_address_are_given_first() -> None:
    one, two = place(shape(), HOST), place(shape(2), HOST)
    assert one == Placement((gpu(1),), ADDRESSES[0], (NumaNode(0, 4, 64),))
    assert two == Placement((gpu(1), gpu(2)), ADDRESSES[0], (NumaNode(0, 8, 128),))


def test_without_addresses_none_is_given() -> None:
    given = place(shape(), replace(HOST, addresses=None))
    assert isinstance(given, Placement)
    assert given.address is None


@pytest.mark.parametrize(
    ("wanted", "short"),
    [
        (shape(3), Shortage.GPUS),
        (shape(cpu_cores=9), Shortage.CPU_CORES),
        (shape(memory_mib=129), Shortage.MEMORY),
        (shape(storage_gib=19), Shortage.STORAGE),
        (shape(3, 9, 129, 19), Shortage.GPUS),
    ],
)
def test_what_is_short_is_named(wanted: Shape, short: Shortage) -> None:
    assert place(wanted, HOST) is short
    assert how_many(wanted, HOST) == 0


def test_no_address_left_is_a_shortage() -> None:
    assert place(shape(), replace(HOST, addresses=())) is Shortage.ADDRESSES


def test_exactly_enough_is_enough() -> None:
    assert isinstance(place(shape(2), HOST), Placement)


def test_what_needs_neither_cores_nor_memory_draws_from_no_node() -> None:
    free = Host((gpu(1, None),))
    assert place(shape(1, 0, 0, 0), free) == Placement((gpu(1, None),), None, ())


def test_small_orders_share_a_node_so_that_a_large_one_has_the_other() -> None:
    assert sold(host(server()), 1, 1, 2, 4) == [[0], [1], [2, 3], [4, 5, 6, 7]]
    assert sold(host(server()), 4, 1, 2, 1) == [[0, 1, 2, 3], [4], [5, 6], [7]]


def test_a_single_gpu_comes_from_where_it_breaks_no_bigger_order() -> None:
    free = host([*server()[:4], *(gpu(number, 1) for number in range(4, 9))])
    assert buses(place(shape(), free)) == [4]
    assert buses(place(shape(), free, counts=(1, 5))) == [0]
    assert buses(place(shape(), free, counts=(1,))) == [0]


def test_the_biggest_count_on_sale_matters_most() -> None:
    free = host([*server()[:3], *server()[4:]])
    assert buses(place(shape(), free, counts=(2, 3))) == [4]
    assert buses(place(shape(), free, counts=(2,))) == [0]


def test_without_bigger_counts_on_sale_the_larger_set_stays_whole_all_the_same() -> None:
    assert buses(place(shape(), host(server(7, 4)), counts=(1,))) == [4]
    assert buses(place(shape(), host(server(5, 8, "aaabb")), counts=(1,))) == [3]


@pytest.mark.parametrize("scarce", [NumaNode(1, 15, 4096), NumaNode(1, 64, 255)])
def test_a_node_with_too_little_for_the_big_order_serves_the_small(scarce: NumaNode) -> None:
    free = host(server(), nodes=(NumaNode(0, 16, 256), scarce))
    assert buses(place(shape(), free)) == [4]


def test_linked_pairs_stay_pairs() -> None:
    assert sold(host(PAIRS), 1, 2, 1, 2) == [[0], [2, 3], [1], [4, 5]]
    assert sold(host(PAIRS), 2, 4, 1, 1) == [[0, 1], [4, 5, 6, 7], [2], [3]]


def test_an_order_for_two_gets_a_pair_rather_than_two_singles() -> None:
    assert buses(place(shape(2), host(server(4, links=".aa.")))) == [1, 2]
    assert buses(place(shape(2), host(server(5, 8, links="..aaa")))) == [2, 3]


def test_an_order_for_one_gets_a_single_rather_than_half_a_pair() -> None:
    assert buses(place(shape(), host(server(3, links="aa.")))) == [2]
    assert buses(place(shape(), host(server(3, links="abb")))) == [0]
    assert buses(place(shape(), host(server(7, 8, links="aabbbcc")))) == [2]


def test_a_linked_pair_is_kept_rather_than_a_node() -> None:
    free = host([gpu(0, 0, nvlink="a"), gpu(1, 0, nvlink="a"), *(gpu(n, 1) for n in range(2, 6))])
    assert buses(place(shape(), free)) == [2]


def test_the_remainder_of_a_board_is_sold_before_a_whole_one() -> None:
    """On the only node that has the cores; the board's other GPUs are on another."""
    links = [(0, "b"), (0, "b"), (0, "a"), (0, "a"), (1, "a"), (1, "b"), (1, "b")]
    free = host(
        [gpu(number, node, nvlink=link) for number, (node, link) in enumerate(links)],
        nodes=(NumaNode(0, 8, 4096), NumaNode(1, 4, 4096)),
    )
    assert buses(place(shape(2), free)) == [2, 3]


def test_of_equals_the_lowest_address_is_given() -> None:
    links = [(0, "b"), (0, "a"), (1, "a"), (1, "b")]
    free = host([gpu(number, node, nvlink=link) for number, (node, link) in enumerate(links)])
    assert buses(place(shape(), free)) == [0]


def test_one_node_comes_before_nvlink() -> None:
    free = host([gpu(0, 0, nvlink="a"), gpu(1, 1, nvlink="a"), gpu(2, 1)])
    assert buses(place(shape(2), free)) == [1, 2]


def test_a_board_across_nodes_is_sold_node_by_node_and_kept_whole() -> None:
    assert sold(host(HGX), 1, 2, 4, 1) == [[0], [1, 2], [4, 5, 6, 7], [3]]
    boards = host(
        server(16, links="a" * 8 + "b" * 8), nodes=[NumaNode(n, 64, 4096) for n in range(4)]
    )
    assert sold(boards, 4, 4, 8) == [[0, 1, 2, 3], [4, 5, 6, 7], [*range(8, 16)]]


def test_an_order_across_nodes_draws_each_gpus_part_from_its_own() -> None:
    given = place(shape(8), host(HGX))
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(0, 16, 256), NumaNode(1, 16, 256))


def test_cores_that_are_short_come_from_another_node() -> None:
    """Being sold comes before being near."""
    free = host(server(2), nodes=(NumaNode(0, 3, 4096), NumaNode(1, 64, 0), NumaNode(2, 64, 0)))
    given = place(shape(2), free)
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(0, 3, 128), NumaNode(1, 5, 0))


def test_the_gpus_nodes_are_drained_before_others() -> None:
    free = host([gpu(0, 1)], nodes=(NumaNode(0, 3, 4096), NumaNode(1, 3, 4096)))
    given = place(shape(), free)
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(0, 1, 0), NumaNode(1, 3, 64))


def test_where_cores_take_two_nodes_the_gpus_are_on_one_if_they_can() -> None:
    free = host(
        [gpu(0, 1), gpu(1, 0), gpu(2, 0)], nodes=(NumaNode(0, 6, 4096), NumaNode(1, 5, 4096))
    )
    assert buses(place(shape(2), free)) == [1, 2]


def test_gpus_on_a_node_without_cores_or_memory_are_sold() -> None:
    free = host([gpu(0, 5), gpu(1, 1), gpu(2, 5)])
    assert sold(free, 1, 1) == [[1], [0]]
    given = place(shape(3), free)
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(1, 12, 192),)


def test_gpus_of_which_no_node_is_known_fit_any() -> None:
    free = host([gpu(0, None), gpu(1, None)], nodes=(NumaNode(0, 4, 4096), NumaNode(1, 8, 4096)))
    given = place(shape(2), free)
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(1, 8, 128),)


def bundled(sizes: Sequence[int]) -> list[Gpu]:
    names = [f"group-{number}" for number, size in enumerate(sizes) for _ in range(size)]
    return [
        gpu(number, bundle="" if names.count(name) == 1 else name)
        for number, name in enumerate(names)
    ]


def test_bundles_are_sold_whole_only() -> None:
    free = host(bundled([2, 2, 2]))
    available = {count: how_many(shape(count), free) for count in (1, 2, 3, 4, 6, 8)}
    assert available == {1: 0, 2: 3, 3: 0, 4: 1, 6: 1, 8: 0}
    assert place(shape(), free) is Shortage.GPUS


def test_a_bundle_serves_where_it_can_and_leaves_the_singles() -> None:
    free = host(bundled([1, 1, 1, 2, 2, 2]))
    assert sold(free, 3, 3, 3) == [[0, 3, 4], [1, 5, 6], [2, 7, 8]]
    assert buses(place(shape(2), free)) == [3, 4]
    assert buses(place(shape(2), free, counts=(2,))) == [3, 4]


def test_bundles_count_as_the_sets_that_they_make_up() -> None:
    mates = [gpu(number, bundle=f"{number // 2}") for number in range(4)]
    singles = [gpu(4), gpu(5), *(gpu(number, 1) for number in range(6, 10))]
    assert buses(place(shape(), host([*mates, *singles]))) == [4]


def test_bundles_across_nodes_tell_the_nodes_apart() -> None:
    inner = [gpu(2, 1, bundle="inner"), gpu(3, 2, bundle="inner")]
    outer = [gpu(0, 0, bundle="outer"), gpu(1, 3, bundle="outer")]
    free = host([*inner, *outer], nodes=[NumaNode(number, 64, 4096) for number in range(4)])
    assert buses(place(shape(2), free)) == [0, 1]


def test_a_board_sold_whole_spans_its_nodes() -> None:
    board = [replace(one, bundle="board") for one in HGX]
    given = place(shape(8), host([*board, *(gpu(number, 0) for number in range(8, 10))]))
    assert buses(given) == [*range(8)]
    assert isinstance(given, Placement)
    assert given.nodes == (NumaNode(0, 16, 256), NumaNode(1, 16, 256))


def test_a_bundle_with_a_gpu_of_another_type_is_never_sold() -> None:
    free = host([gpu(0, bundle="group"), gpu(1, bundle="group", gpu_type="l40s")])
    assert place(shape(), free) is Shortage.GPUS
    assert place(shape(2), free) is Shortage.GPUS


LARGE = {
    "two nodes": host(server(16, 8)),
    "pairs on one node": host(server(16, 16, "aabbccddeeffgghh"), [NumaNode(0, 256, 9999)]),
    "pairs on two": host(server(16, 8, "aabbccddeeffgghh")),
    "two boards": host(server(16, 4, "a" * 8 + "b" * 8), [NumaNode(n, 64, 4096) for n in range(4)]),
    "many nodes": host(server(16, 2, "a" * 16), [NumaNode(n, 7, 4096) for n in range(8)]),
    "bundles": host([replace(one, bundle=f"{one.address.bus // 2}") for one in server(16, 8)]),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("count", [1, 2, 4, 8, 16])
def test_few_ways_need_to_be_looked_at(name: str, count: int) -> None:
    """Each takes some 20 us; without mirror images left out they were thousands."""
    free = LARGE[name]
    stacks = stacked(free.gpus, "h100_sxm")
    assert len(choices(shape(count, 2), stacks, all_nodes(free, stacks))) <= 60


def test_a_host_on_which_everything_differs_is_not_searched_forever() -> None:
    free = host(server(13, 1), nodes=[NumaNode(n, 4 + n, 4096) for n in range(13)])
    stacks = stacked(free.gpus, "h100_sxm")
    assert len(choices(shape(6), stacks, all_nodes(free, stacks))) == 1000
    assert len(buses(place(shape(6), free))) == 6


def test_addresses_are_given_from_the_lowest_up() -> None:
    free = replace(host(server(), nodes=ROOMY), addresses=ADDRESSES[::-1])
    given = place(shape(), free)
    assert isinstance(given, Placement)
    assert given.address == IPv4Address("10.0.0.2")


@pytest.mark.parametrize(("last", "then"), [(2, 3), (3, 4), (4, 2), (200, 2)])
def test_an_address_rests_while_there_are_others(last: int, then: int) -> None:
    addresses = tuple(IPv4Address(f"10.0.0.{one}") for one in (2, 3, 4))
    free = replace(host(server(), nodes=ROOMY), addresses=addresses)
    given = place(shape(), free, last_address=IPv4Address(f"10.0.0.{last}"))
    assert isinstance(given, Placement)
    assert given.address == IPv4Address(f"10.0.0.{then}")
