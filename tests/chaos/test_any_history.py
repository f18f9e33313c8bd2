"""Any history of orders, DELETEs, deaths of the daemon, faults and time keeps the invariants.

The event loop only turns inside a rule, so what is under way when a rule ends is really under way in the
next one. Histories are drawn until there were enough deaths: ``CHAOS_CRASHES``, of ``--hypothesis-seed``.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import structlog
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gpud.model import PciAddress
from tests.chaos import badcards
from tests.chaos.world import GPUS, World
from tests.faults import FaultLog

CALLS = st.sampled_from(
    [
        "createXML",
        "destroy",
        "getCapabilities",
        "getLibVersion",
        "isActive",
        "listAllDomains",
        "lookupByUUIDString",
        "metadata",
        "networkCreate",
        "networkDefineXML",
        "networkLookupByName",
        "networkUpdate",
        "openChannel",
        "openConsole",
        "XMLDesc",
    ]
)
HOW = st.sampled_from(
    [
        "an error",
        "done, then an error",
        "connection lost",
        "done, its answer lost",
        "a call hangs",
    ]
)
ERRNOS = st.sampled_from([errno.ENOSPC, errno.EIO, errno.EROFS])
TURNS = st.integers(0, 30)
ACTS = st.integers(1, 60)
CRASHES = int(os.environ.get("CHAOS_CRASHES", "40"))
PARTS = 2
HISTORIES = settings(
    max_examples=4,
    stateful_step_count=25,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # a history that fails is told whole: threads make it hard to shorten
    suppress_health_check=list(HealthCheck),
)


class AnyHistory(RuleBasedStateMachine):
    """gpud among fakes, through whatever happens."""

    log: ClassVar[FaultLog]
    deaths: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.log)
        self.count = 0
        self.drained: dict[PciAddress | None, set[str]] = {}
        """What is drained, each with the instances that may be there: those from before."""

    # -- callers -----------------------------------------------------------------------------------

    @initialize(turns=TURNS)
    def first_order(self, turns: int) -> None:
        self.order(turns)

    @rule(turns=TURNS)
    def order(self, turns: int) -> None:
        self.count += 1
        self.world.order(f"order-{self.count}")
        self.world.turn(turns)

    @rule(back=st.integers(0, 3), turns=TURNS)
    def order_again(self, back: int, turns: int) -> None:
        self.world.order(f"order-{max(1, self.count - back)}")
        self.world.turn(turns)

    @rule(back=st.integers(0, 2), turns=TURNS)
    def delete(self, back: int, turns: int) -> None:
        self.world.delete(f"order-{max(1, self.count - back)}")
        self.world.turn(turns)

    # -- the operator ------------------------------------------------------------------------------

    @rule(what=st.sampled_from([*GPUS, None]), turns=TURNS)
    def drain(self, what: PciAddress | None, turns: int) -> None:
        self.world.runner.run(self.world.gpud.store.drain(what, "a new fan"))
        self.drained.setdefault(what, self._holders(what))
        self.world.turn(turns)

    @rule(what=st.sampled_from([*GPUS, None]), turns=TURNS)
    def undrain(self, what: PciAddress | None, turns: int) -> None:
        ended = self.world.runner.run(self.world.gpud.store.undrain(what))
        assert ended == (self.drained.pop(what, None) is not None)
        self.world.turn(turns)

    def _holders(self, what: PciAddress | None) -> set[str]:
        """The instances that have a card, or with None any."""
        return {
            upstream_id
            for upstream_id, instance in self.world.gpud.store.live.items()
            if what is None or what in {gpu.address for gpu in instance.grant.gpus}
        }

    # -- deaths ------------------------------------------------------------------------------------

    @rule(turns=TURNS)
    def killed(self, turns: int) -> None:
        self.world.turn(turns)
        self.world.crash("killed at a random await")

    @rule(act=ACTS, turns=TURNS)
    def killed_at_an_act(self, act: int, turns: int) -> None:
        self.world.edges.die_at(act)
        self.world.turn(turns)

    @rule(act=ACTS, turns=TURNS)
    def killed_after_an_order(self, act: int, turns: int) -> None:
        self.world.edges.die_at(act)
        self.order(turns)

    @rule(act=ACTS, turns=TURNS)
    def killed_after_a_delete(self, act: int, turns: int) -> None:
        self.world.edges.die_at(act)
        self.delete(0, turns)

    @rule(turns=TURNS)
    def power_cut(self, turns: int) -> None:
        self.world.reboot()
        self.world.turn(turns)

    # -- faults ------------------------------------------------------------------------------------

    @rule(call=CALLS, how=HOW)
    def libvirt_fault(self, call: str, how: str) -> None:
        self.world.fail_call(call, how)

    @rule(
        what=st.sampled_from(["libvirtd restarts", "events are lost", "a stranger", "qemu-img"]),
        turns=TURNS,
    )
    def other_fault(self, what: str, turns: int) -> None:
        match what:
            case "libvirtd restarts":
                self.world.restart_libvirtd(turns)
            case "events are lost":
                self.world.lose_events()
            case "a stranger":
                self.world.squat()
            case _:
                self.world.fail_qemu_img()
        self.world.turn(turns)

    @rule(number=ERRNOS, times=st.integers(1, 6), turns=TURNS)
    def disk_fault(self, number: int, times: int, turns: int) -> None:
        self.world.fail_disk(number, times)
        self.world.turn(turns)

    @rule(gpu=st.sampled_from(GPUS), how=st.sampled_from(sorted(badcards.FAULTS)), turns=TURNS)
    def bad_card(self, gpu: Any, how: str, turns: int) -> None:
        self.world.spoil_card(gpu, how)
        self.world.turn(turns)

    @rule(
        what=st.sampled_from(["powers off", "panics", "reboots", "floods", "falls silent"]),
        turns=TURNS,
    )
    def guest(self, what: str, turns: int) -> None:
        self.world.guest(what)
        self.world.turn(turns)

    @rule(seconds=st.sampled_from([4000, 86400, -5000]), turns=TURNS)
    def time_jumps(self, seconds: int, turns: int) -> None:
        self.world.jump(seconds)
        self.world.turn(turns)

    @rule()
    def reconcile(self) -> None:
        self.world.reconcile()

    # -- what holds --------------------------------------------------------------------------------

    @rule()
    def settle(self) -> None:
        for what in list(self.drained):
            self.undrain(what, 0)
        self.world.settle()

    @invariant()
    def drains(self) -> None:
        assert self.world.gpud.store.drains.keys() == self.drained.keys()
        for what, before in self.drained.items():
            assert self._holders(what) <= before, "sold although it is drained"

    @invariant()
    def statuses(self) -> None:
        self.world.check_statuses()

    @invariant()
    def claims(self) -> None:
        self.world.check_claims()

    @invariant()
    def domains(self) -> None:
        self.world.check_domains()

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            type(self).deaths += self.world.deaths
            self.world.close()


@pytest.fixture
def _untraced() -> Iterator[None]:
    """Without coverage: CPython 3.11 refuses a trace function that another thread sets meanwhile."""
    tracer = threading.gettrace()
    threading.settrace(None)
    yield
    threading.settrace(tracer)


@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("_untraced")
@pytest.mark.parametrize("part", range(PARTS))
def test_any_history_keeps_the_invariants(
    fault_log: FaultLog, part: int, request: pytest.FixtureRequest
) -> None:
    first = int(request.config.getoption("--hypothesis-seed", default=None) or 0)
    wanted = -(-CRASHES // PARTS)
    deaths = turn = 0
    structlog.configure(processors=[_drop])
    while deaths < wanted:
        number = (first * PARTS + part) * 1_000_000 + turn

        class History(AnyHistory):
            log = fault_log

        History.deaths = 0
        try:
            run_state_machine_as_test(seed(number)(History), settings=HISTORIES)
        except BaseException as error:
            error.add_note(f"the histories of seed {number}, --hypothesis-seed={first}")
            raise
        deaths += History.deaths
        turn += 1


def _drop(_logger: object, _method: str, _event: object) -> str:
    raise structlog.DropEvent
