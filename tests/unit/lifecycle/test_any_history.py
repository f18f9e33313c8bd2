"""Any history of orders, DELETEs, deaths of the daemon, faults of libvirt and time keeps the invariants.

The event loop only turns inside a rule, so what is under way when a rule ends is really under way in the
next one. A run is repeated from its seed: ``pytest --hypothesis-seed=N``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

import libvirt
import pytest
import structlog
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from gpud import command
from gpud.errors import GpudError
from gpud.guest.image import ImageStore
from gpud.hypervisor import connection
from gpud.lifecycle import guests, worker
from gpud.lifecycle.steps import lease_name
from gpud.model import LEGAL_STATUS, Instance, Status, Step
from gpud.store import Store
from tests.unit.fakes.libvirt_daemon import Guest, LibvirtDaemon, error
from tests.unit.fakes.orders import Clock, quick_directory, until
from tests.unit.fakes.qemu_img import QemuImg, base_image, failed
from tests.unit.lifecycle.gpud_under_test import Gpud, drivers, make_config, make_server

CALLS = st.sampled_from(
    [
        "createXML",
        "destroy",
        "lookupByUUIDString",
        "networkLookupByName",
        "networkUpdate",
        "getLibVersion",
        "metadata",
        "qemu-img",
    ]
)
WORLD = [
    "libvirtd restarts",
    "a guest powers off",
    "guests fall silent",
    "a long time passes",
    "the clock is stepped back",
]
TURNS = st.integers(0, 30)
ENOUGH = settings(
    max_examples=12,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def _follows(before: Status, after: Status) -> bool:
    seen, reachable = {before}, [before]
    while reachable:
        for status in LEGAL_STATUS[reachable.pop()] - seen:
            seen.add(status)
            reachable.append(status)
    return after in seen


class AnyHistory(RuleBasedStateMachine):
    """gpud on a libvirtd in memory, through whatever happens."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.state_dir: Path = self.stack.enter_context(quick_directory())
        self.libvirtd, self.qemu_img = LibvirtDaemon(), QemuImg()
        self.kernel = make_server(self.state_dir / "host")
        self.clock, self.monotonic = Clock(), Clock(1000)
        self.seen: dict[str, Status] = {}
        self.count = 0
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(libvirt, "open", self.libvirtd.open)
        patch.setattr(command, "run", self.qemu_img.run)
        patch.setattr(connection, "start_event_loop", lambda: None)
        for module, name in (
            (connection, "FIRST_PAUSE_S"), (connection, "LONGEST_PAUSE_S"),
            (worker, "_FIRST_RETRY_S"), (worker, "_LAST_RETRY_S"),
            (guests, "_PAUSE_S"), (guests, "_PAUSE_AFTER_REPORT_S"),
        ):  # fmt: skip
            patch.setattr(module, name, 0.0005)
        patch.setattr(guests, "_BOOT_EVERY_S", 0)  # on a clock that stands still
        self.runner.run(self._add_image())
        self.gpud = self.runner.run(self._start())

    # -- what happens ------------------------------------------------------------------------------

    @initialize(turns=TURNS)
    def first_order(self, turns: int) -> None:
        self.order(turns)

    @rule(turns=TURNS)
    def order(self, turns: int) -> None:
        self.count += 1
        self.runner.run(self._order(f"order-{self.count}", turns))

    @rule(turns=TURNS)
    def order_again(self, turns: int) -> None:
        """The same order twice is one instance."""
        known = self.runner.run(self.gpud.store.find(f"order-{self.count}"))
        again = self.runner.run(self._order(f"order-{self.count}", turns))
        assert known is None or (again is not None and again.upstream_id == known.upstream_id)

    @rule(data=st.data(), turns=TURNS)
    def delete(self, data: st.DataObject, turns: int) -> None:
        number = data.draw(st.integers(max(1, self.count - 3), max(1, self.count)))
        self.runner.run(self.gpud.store.request_delete(f"order-{number}"))
        self.turn(turns)

    @rule(turns=TURNS)
    def turn(self, turns: int) -> None:
        self.runner.run(self._turn(turns))

    @rule()
    def crash(self) -> None:
        self.runner.run(self.gpud.kill())
        self.gpud = self.runner.run(self._start())

    @rule(call=CALLS, after=st.booleans(), lost=st.booleans())
    def libvirt_or_disk_fault(self, call: str, after: bool, lost: bool) -> None:
        if call == "qemu-img":
            self.qemu_img.faults.append(failed())
        else:
            raises = None if lost else error("internal error: it broke")
            self.libvirtd.fault(call, raises, after=after)

    @rule(what=st.sampled_from(WORLD), turns=TURNS)
    def world(self, what: str, turns: int) -> None:
        """Something happens that gpud has no say in."""
        if what == "libvirtd restarts":
            self.libvirtd.stop()
            self.turn(turns)
            self.libvirtd.start()
        elif what == "a guest powers off":
            for guest in list(self.libvirtd.guests.values())[:1]:
                guest.powers_off()
        elif what == "guests fall silent":
            self.libvirtd.on_start = lambda _guest: None
        elif what == "a long time passes":
            self.clock.advance(4000)
            self.monotonic.advance(1000)
        else:
            self.clock.advance(-5000)
        self.turn(turns)

    @rule()
    def settle(self) -> None:
        """Once nothing goes wrong any more, all that is there belongs to instances that run."""
        self.libvirtd.heal()
        self.qemu_img.faults.clear()
        self.libvirtd.on_start = Guest.boots
        self.runner.run(self._settle())
        self._nothing_but_what_runs()
        self.runner.run(self.gpud.reconciler.once())
        self._nothing_but_what_runs()

    def _nothing_but_what_runs(self) -> None:
        live = self.gpud.store.live
        assert {one.status for one in live.values()} <= {Status.RUNNING}
        assert set(self.libvirtd.guests) == {one.domain_uuid for one in live.values()}
        assert self.gpud.directories() == set(live)
        network = self.libvirtd.networks.get("gpud")
        leases = set() if network is None else set(network.hosts())
        taken = {
            function
            for one in live.values()
            for gpu in one.grant.gpus
            for function in gpu.functions
        }
        found = {one for one, (driver, _) in drivers(self.kernel).items() if driver == "vfio-pci"}
        assert found == taken
        owner = self.gpud.store.owner
        assert leases == {lease_name(one.upstream_id, owner) for one in live.values()}

    # -- what always holds -------------------------------------------------------------------------

    @invariant()
    def no_status_goes_backwards(self) -> None:
        for instance in self.runner.run(self.gpud.store.recent(1000)):
            before = self.seen.get(instance.upstream_id, instance.status)
            assert _follows(before, instance.status)
            self.seen[instance.upstream_id] = instance.status

    @invariant()
    def claims_are_exactly_those_of_live_instances(self) -> None:
        store = self.gpud.store

        def compare() -> None:
            rows = store._connection.execute
            held = [
                (str(gpu.address), one.upstream_id)
                for one in store.live.values()
                for gpu in one.grant.gpus
            ]
            assert len({address for address, _ in held}) == len(held)
            assert set(held) == {tuple(row) for row in rows("SELECT * FROM gpu_claim")}
            assert {row[0] for row in rows("SELECT upstream_id FROM guest_input")} == set(
                store.live
            )

        # On the store's own thread, between two transactions.
        self.runner.run(store._run(compare))

    @invariant()
    def nothing_runs_that_is_on_nobodys_record(self) -> None:
        known = {one.domain_uuid for one in self.gpud.store.live.values()}
        assert set(self.libvirtd.guests) <= known

    def teardown(self) -> None:
        try:
            self.settle()
        finally:
            self.runner.run(self.gpud.kill())
            self.stack.close()

    # -- how ---------------------------------------------------------------------------------------

    async def _add_image(self) -> None:
        source = self.state_dir / "source"
        source.write_bytes(base_image())
        await ImageStore(self.state_dir / "images").add(source, "base")

    async def _start(self) -> Gpud:
        gpud = Gpud(make_config(self.state_dir), self.kernel, self.clock, self.monotonic)
        await asyncio.wait_for(gpud.start(), 8)
        await self._network(gpud)
        return gpud

    async def _network(self, gpud: Gpud) -> None:
        """Without its network an address cannot be given back: a known fault, tested elsewhere."""
        while "gpud" not in self.libvirtd.networks:
            with contextlib.suppress(GpudError):
                await gpud.reconciler.once()

    async def _order(self, instance_id: str, turns: int) -> Instance | None:
        try:
            return await self.gpud.order(instance_id)
        except GpudError:
            return None
        finally:
            await self._turn(turns)

    async def _turn(self, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0.0002)

    async def _settle(self) -> None:
        await asyncio.wait_for(self.gpud.hypervisor.wait_available(), 8)
        store: Store = self.gpud.store

        def still() -> bool:
            self.gpud.worker.wake_all()
            for instance in store.live.values():
                if instance.step is Step.AWAIT_READY:  # a guest from a silent time
                    guest = self.libvirtd.guests.get(instance.domain_uuid)
                    if guest is not None:
                        guest.boots()
            settled = all(one.step is Step.RUNNING for one in store.live.values())
            return settled and set(self.libvirtd.guests) == {
                one.domain_uuid for one in store.live.values()
            }

        await until(still)


def test_any_history_keeps_the_invariants() -> None:
    before: dict[str, Any] = structlog.get_config()
    structlog.configure(processors=[_drop])
    tracer = threading.gettrace()
    # CPython 3.11 refuses a trace function that another thread sets at the same moment, which would
    # happen among the tens of thousands of threads here; other tests measure the coverage.
    threading.settrace(None)
    try:
        run_state_machine_as_test(AnyHistory, settings=ENOUGH)
    finally:
        threading.settrace(tracer)
        structlog.configure(**before)


def _drop(_logger: object, _method: str, _event: object) -> str:
    raise structlog.DropEvent
