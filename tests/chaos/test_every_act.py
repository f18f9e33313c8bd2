"""gpud killed, or failed, at every single act of an order's life: on a file, on libvirt, on the kernel.

The acts are counted in one life without a fault; then there is a life for each of them. A new step, call
or write is covered without anyone thinking of it. ``make chaos`` takes every act, ``make test`` some.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial

import pytest

from gpud.model import Status
from tests.chaos.world import World
from tests.faults import FaultLog
from tests.unit.fakes.libvirt_daemon import error, lost

EVERY = 1 if "CHAOS_CRASHES" in os.environ else 23
Life = Callable[[World], None]

_UNDER_WAY = 12
"""Changes of files after which an order has its disk, and no guest yet."""


def created_and_deleted(world: World) -> None:
    world.order("order-1")
    world.until_settled()
    world.delete("order-1")
    world.until_settled()


def deleted_meanwhile(world: World) -> None:
    world.order("order-1")
    world.until_changed(_UNDER_WAY)
    world.delete("order-1")
    world.until_settled()


def guest_started_again(world: World) -> None:
    world.order("order-1")
    world.until_settled()
    world.guest("panics")
    world.until_settled()


def server_rebooted(world: World) -> None:
    world.order("order-1")
    world.until_settled()
    world.reboot()
    world.until_settled()


def die(act: int, world: World) -> None:
    world.edges.die_at(act)


def fail_change(change: int, number: int, world: World) -> None:
    world.edges.fail_change_at(change, number)


def fail_call(call: int, raises: Callable[[], Exception], after: bool, world: World) -> None:
    world.libvirtd.fail_call_at(call, raises, after=after)


LIVES = pytest.mark.parametrize(
    "life", [created_and_deleted, deleted_meanwhile, guest_started_again, server_rebooted]
)
pytestmark = [pytest.mark.timeout(1200), LIVES]


def live(log: FaultLog, life: Life, fault: str, prepare: Callable[[World], None]) -> World:
    """A life with a fault prepared in it, which has to end in order.

    Lives differ by a few acts, as threads do; a fault that was not met is not recorded.
    """
    with closing(World(log)) as world:
        prepare(world)
        life(world)
        met = not (world.edges.armed or world.libvirtd.armed)
        world.injected = Counter({f"{fault}, {life.__name__.replace('_', ' ')}": int(met)})
        world.settle(world.died_at if world.deaths else None)
    return world


def plain(life: Life) -> World:
    """A life without a fault, whose acts can be counted."""
    return live(FaultLog(), life, "none", lambda _: None)


def test_killed_at_any_act_an_order_is_kept(fault_log: FaultLog, life: Life) -> None:
    once = plain(life)
    died = 0
    for act in range(1, once.edges.acts, EVERY):
        world = live(fault_log, life, "killed at every act", partial(die, act))
        kept = world.statuses["order-1"]
        assert kept is once.statuses["order-1"]
        died += world.deaths > once.deaths
    assert died > once.edges.acts // EVERY // 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EMFILE], ids=errno.errorcode.get)
def test_any_change_of_a_file_may_fail(fault_log: FaultLog, life: Life, number: int) -> None:
    changes = plain(life).edges.changes
    assert changes > 5
    for change in range(1, changes + 1, -(-EVERY // 4)):
        live(
            fault_log,
            life,
            f"disk: {errno.errorcode[number]} at every change",
            partial(fail_change, change, number),
        )


@pytest.mark.parametrize(
    ("how", "raises", "after"),
    [
        ("connection lost", lost, False),
        ("done, its answer lost", lost, True),
        ("an error", lambda: error("internal error: it broke"), False),
    ],
)
def test_any_call_of_libvirt_may_fail(
    fault_log: FaultLog, life: Life, how: str, raises: Callable[[], Exception], after: bool
) -> None:
    calls = plain(life).libvirtd.answered
    for call in range(1, calls + 1, EVERY):
        world = live(
            fault_log,
            life,
            f"libvirt: {how} at every call",
            partial(fail_call, call, raises, after),
        )
        if raises is lost:
            assert world.statuses["order-1"] is not Status.ERROR
