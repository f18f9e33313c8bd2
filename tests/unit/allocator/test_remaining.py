"""What is left of a host when instances hold parts of it."""

from __future__ import annotations

from dataclasses import replace

from gpud.allocator import Placement, remaining
from gpud.model import Grant, Host, NumaNode
from tests.unit.allocator.hosts import ADDRESSES, gpu, grant, host, shape

NODES = (NumaNode(0, 8, 128), NumaNode(1, 8, 128))
WHOLE = Host((gpu(1), gpu(2, 1)), NODES, 18, ADDRESSES)


def held(*nodes: NumaNode, bus: int = 1) -> Grant:
    return grant(shape(), Placement((gpu(bus),), ADDRESSES[1], nodes))


def test_grants_are_taken_off_where_they_were_given() -> None:
    left = remaining(WHOLE, [held(NumaNode(1, 4, 64))])
    assert left == Host(
        (gpu(2, 1),),
        (NumaNode(0, 8, 128), NumaNode(1, 4, 64)),
        9,
        (ADDRESSES[0], *ADDRESSES[2:]),
    )
    assert remaining(WHOLE, []) == WHOLE


def test_a_grant_without_nodes_takes_from_the_nodes_in_order() -> None:
    """As grants were before gpud knew of nodes; so do two of them."""
    big = replace(held(), shape=shape(1, 6, 100))
    left = remaining(WHOLE, [big, big])
    assert left.nodes == (NumaNode(0, 0, 0), NumaNode(1, 4, 56))


def test_what_a_node_no_longer_has_is_in_use_on_another() -> None:
    """After a change of the server's nodes, by its firmware's setting say."""
    left = remaining(WHOLE, [held(NumaNode(5, 4, 64))])
    assert left.nodes == (NumaNode(0, 4, 64), NumaNode(1, 8, 128))
    left = remaining(WHOLE, [replace(held(NumaNode(1, 10, 64)), shape=shape(1, 10))])
    assert left.nodes == (NumaNode(0, 6, 128), NumaNode(1, 0, 64))


def test_nothing_goes_below_zero_when_the_host_has_shrunk() -> None:
    vast = replace(held(NumaNode(0, 99, 999), bus=9), shape=shape(1, 99, 999, 99), address=None)
    left = remaining(WHOLE, [vast])
    assert left.nodes == (NumaNode(0, 0, 0), NumaNode(1, 0, 0))
    assert left.storage_gib == 0
    assert left.addresses == ADDRESSES
    assert remaining(Host(), [vast]) == Host()


def test_a_gpu_that_shares_a_function_or_a_bundle_with_a_taken_one_is_not_left() -> None:
    """Names of bundles may change with a reboot, addresses tell."""
    shared = replace(gpu(2), functions=(gpu(2).address, gpu(1).functions[1]))
    mates = [gpu(1, bundle="now-one"), gpu(4, bundle="now-one"), gpu(5, bundle="other")]
    assert remaining(host([gpu(1), shared, gpu(3)]), [held()]).gpus == (gpu(3),)
    assert remaining(host([*mates, gpu(3)]), [held()]).gpus == (mates[2], gpu(3))
