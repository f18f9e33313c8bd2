"""One gpud among fakes, life after life, and what has to hold whatever was done to it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import errno
import shutil
import time
from collections import Counter
from pathlib import Path
from uuid import UUID

import libvirt
import pytest

from gpud import command
from gpud.errors import GpudError
from gpud.guest.image import ImageStore
from gpud.hypervisor import connection
from gpud.inventory import CardState
from gpud.model import PciAddress, Status, Step
from tests.chaos import badcards
from tests.chaos.edges import Edges, Killed, MortalLibvirtd, make_mortal, watch
from tests.chaos.parts import SHORT_PAUSES, follows, report_again, tell_unless_killed
from tests.faults import FaultLog
from tests.unit.fakes.libvirt_daemon import Fault, Guest, error
from tests.unit.fakes.orders import Clock, quick_directory, until
from tests.unit.fakes.qemu_img import QemuImg, base_image, failed
from tests.unit.lifecycle.gpud_under_test import Gpud, make_config, make_server

GPUS = (PciAddress(0, 1, 0, 0), PciAddress(0, 2, 0, 0))
PATIENCE_S = 10
_TURN_S = 0.0002


class World:
    """The event loop only turns while one of the methods runs.

    Attributes:
        deaths: How often the process was killed.
        died_at: When it was begun anew the last time, by ``time.perf_counter``.
        injected: What was done since everything was last seen to be in order.
        suspects: Cards of which a fault was injected, so that they may be quarantined.
        strangers: Domains that somebody else has started.
        statuses: Each order's, when it was last looked at.
    """

    def __init__(self, log: FaultLog) -> None:
        self.stack = contextlib.ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.runner.get_loop().set_exception_handler(tell_unless_killed)
        self.state_dir: Path = self.stack.enter_context(quick_directory())
        self.edges = Edges(self.state_dir)
        self.libvirtd, self.qemu_img = MortalLibvirtd(self.edges), QemuImg()
        self.clock, self.monotonic = Clock(), Clock(1000)
        self.deaths = 0
        self.injected: Counter[str] = Counter()
        self.suspects: set[PciAddress] = set()
        self.strangers: set[UUID] = set()
        self._log = log
        self._boots = 0
        self._hanging: list[Fault] = []
        self.statuses: dict[str, Status] = {}
        self._known: dict[str, str] = {}
        self._boot_kernel()
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(libvirt, "open", self.libvirtd.open)
        patch.setattr(command, "run", self.qemu_img.run)
        patch.setattr(connection, "start_event_loop", lambda: None)
        for module, name, value in SHORT_PAUSES:
            patch.setattr(module, name, value)
        self.runner.run(self._add_image())
        watch(self.edges)
        self._come_up()

    # -- what a caller does --------------------------------------------------------------------------

    def order(self, instance_id: str) -> None:
        """Order; the same order twice is one instance."""
        with contextlib.suppress(GpudError):
            upstream_id = self.runner.run(self.gpud.order(instance_id)).upstream_id
            assert self._known.setdefault(instance_id, upstream_id) == upstream_id

    def delete(self, instance_id: str) -> None:
        self.runner.run(self.gpud.store.request_delete(instance_id))

    # -- what happens to gpud ------------------------------------------------------------------------

    def turn(self, turns: int) -> None:
        """Let time pass; if the process dies in it, another is started."""
        self.runner.run(self._turn(turns))
        if self.edges.dead:
            self.crash("killed at a random act")

    def crash(self, how: str) -> None:
        """Kill the process where it stands, and start it again."""
        self._die(how)
        self._come_up()

    def reboot(self) -> None:
        """Cut the server's power."""
        self._die("power cut")
        self.suspects |= set(self.gpud.store.resets_begun)
        self.libvirtd.guests.clear()
        self.strangers.clear()
        for network in self.libvirtd.networks.values():
            network.live = copy.deepcopy(network.config) if network.autostart else None
        shutil.rmtree(self.kernel.root)
        self._boot_kernel()
        self._come_up()

    def restart_libvirtd(self, turns: int) -> None:
        self.injected["libvirtd: killed and restarted"] += 1
        self.libvirtd.stop()
        self.turn(turns)
        self.libvirtd.start()

    def fail_call(self, call: str, how: str) -> None:
        """Let the next call of this name go wrong."""
        self.injected[f"libvirt: {how}"] += 1
        match how:
            case "an error":
                self.libvirtd.fault(call, error("internal error: it broke"))
            case "done, then an error":
                self.libvirtd.fault(call, error("internal error: it broke"), after=True)
            case "connection lost":
                self.libvirtd.fault(call)
            case "done, its answer lost":
                self.libvirtd.fault(call, after=True)
            case _:
                assert how == "a call hangs"
                fault = self.libvirtd.fault(call)
                fault.raises = None
                fault.released.clear()
                self._hanging.append(fault)

    def lose_events(self) -> None:
        self.injected["libvirt: events lost"] += 1
        for one in self.libvirtd.connections:
            one.on_event = None

    def squat(self) -> None:
        """Let somebody start a domain with the name that an instance's will have."""
        names = {guest.name for guest in self.libvirtd.guests.values()}
        for instance in self.gpud.store.live.values():
            if instance.domain_name not in names:
                self.injected["libvirt: domain already exists"] += 1
                xml = f"<domain type='kvm'><name>{instance.domain_name}</name></domain>"
                self.strangers.add(self.libvirtd.begin(xml).uuid)
                return

    def fail_qemu_img(self) -> None:
        self.injected["disk: qemu-img fails"] += 1
        self.qemu_img.faults.append(failed())

    def spoil_card(self, gpu: PciAddress, how: str) -> None:
        """Let something go wrong with a card; see ``badcards``."""
        if gpu in self.kernel.addresses:
            self.injected[f"card: {how}"] += 1
            self.suspects.add(gpu)
            badcards.FAULTS[how](self.kernel, gpu)

    def fail_disk(self, number: int, times: int) -> None:
        """Let the next changes of files fail with this ``errno``."""
        self.injected[f"disk: {errno.errorcode[number]} at a random write"] += 1
        self.edges.fail_writes(number, times)

    def guest(self, what: str) -> None:
        """Let the first guest do something; or those that are started from now on."""
        if what == "falls silent":
            self.injected["guest: never reports"] += 1
            self.libvirtd.on_start = lambda _guest: None
            return
        own = [one for uuid, one in self.libvirtd.guests.items() if uuid not in self.strangers]
        for one in own[:1]:
            self.injected[f"guest: {what}"] += 1
            match what:
                case "powers off":
                    one.powers_off()
                case "panics":
                    self.libvirtd.remove(one.uuid, libvirt.VIR_DOMAIN_EVENT_STOPPED_CRASHED)
                    self.libvirtd.tell()
                case "reboots":
                    one.boots()
                case _:
                    assert what == "floods"
                    one.reports(b"gpud1 started\n" * 2000 + b"x" * 100_000)
                    one.prints(b"y" * 1_000_000)

    def jump(self, seconds: float) -> None:
        """Step the clock; time that has really passed moves both."""
        self.injected[f"clock: {seconds:+g} s"] += 1
        self.clock.advance(seconds)
        self.monotonic.advance(max(0.0, seconds))

    def reconcile(self) -> None:
        with contextlib.suppress(GpudError, OSError, Killed):
            self.runner.run(asyncio.wait_for(self.gpud.reconciler.once(), 0.05))

    # -- what has to hold ----------------------------------------------------------------------------

    def check_statuses(self) -> None:
        """No status ever goes backwards."""
        for instance in self.runner.run(self.gpud.store.recent(1000)):
            before = self.statuses.get(instance.instance_id, instance.status)
            assert follows(before, instance.status)
            self.statuses[instance.instance_id] = instance.status

    def check_claims(self) -> None:
        """Claims are exactly those of live instances, and no GPU has two."""
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
            inputs = {row[0] for row in rows("SELECT upstream_id FROM guest_input")}
            assert inputs == set(store.live)

        # On the store's own thread, between two transactions.
        self.runner.run(store._run(compare))

    def check_domains(self) -> None:
        """No guest runs that is on nobody's record; no stranger was touched."""
        known = {one.domain_uuid for one in self.gpud.store.live.values()}
        assert set(self.libvirtd.guests) - self.strangers <= known
        assert self.strangers <= set(self.libvirtd.guests)

    def until_settled(self) -> None:
        """Let time pass until every order runs or has ended; the process may die meanwhile."""
        for _ in range(2000):
            self.gpud.worker.wake_all()
            self.turn(5)
            if self._settled():
                return
        raise AssertionError(f"not settled: {self._stuck()}")

    def until_changed(self, changes: int) -> None:
        """Let time pass until gpud has made that many changes of files, or makes no more."""
        for _ in range(2000):
            if self.edges.changes >= changes or self._settled():
                return
            self.turn(1)
        raise AssertionError(f"no more than {self.edges.changes} changes: {self._stuck()}")

    def settle(self, since: float | None = None) -> None:
        """Once nothing goes wrong any more, all that is there belongs to instances that run."""
        self.check_domains()
        self.check_statuses()
        if self.edges.disarm():
            self.crash("killed at a random act")
        self._mend()
        with contextlib.ExitStack() as stack:
            log, injected = self._log, self.injected
            recoveries = [
                stack.enter_context(log.recovering(fault, runs=runs, since=since))
                for fault, runs in injected.items()
            ]
            injected.clear()
            self.runner.run(self._settle())
            self.runner.run(self._release_cards())
            findings = self.runner.run(self.gpud.findings())
            for recovery in recoveries:
                recovery.extend(findings)
        assert findings == [], findings
        self.check_statuses()

    def close(self) -> None:
        self._kill()
        watch(None)
        self.stack.close()

    # -- how -----------------------------------------------------------------------------------------

    def _boot_kernel(self) -> None:
        self._boots += 1
        self.kernel = make_server(self.state_dir / f"host-{self._boots}")
        make_mortal(self.kernel, self.edges)
        self._headers = {gpu: self.kernel._functions[gpu].header for gpu in GPUS}

    async def _add_image(self) -> None:
        source = self.state_dir / "source"
        source.write_bytes(base_image())
        await ImageStore(self.state_dir / "images").add(source, "base")

    def _come_up(self) -> None:
        while True:
            self.edges.live()
            self.died_at = time.perf_counter()
            config = make_config(self.state_dir)
            self.gpud = Gpud(config, self.kernel, self.clock, self.monotonic)
            if self.runner.run(self._start()):
                return
            self.deaths += 1
            self._kill()

    async def _start(self) -> bool:
        """Start; False when the process died in it."""
        starting = asyncio.create_task(self.gpud.start())
        await until(lambda: starting.done() or self.edges.dead, PATIENCE_S)
        if starting.done() and not self.edges.dead:
            starting.result()
        return not self.edges.dead

    def _die(self, how: str) -> None:
        self.injected[how] += 1
        self.deaths += 1
        self._kill()

    def _kill(self) -> None:
        self.edges.die()
        self._let_go()
        for one in list(self.libvirtd.connections):
            one.close()
        self.libvirtd.start()
        self.runner.run(self.gpud.kill())

    def _let_go(self) -> None:
        for fault in self._hanging:
            fault.release()
        self._hanging.clear()

    def _mend(self) -> None:
        for stranger in self.strangers:
            del self.libvirtd.guests[stranger]
        self.strangers.clear()
        self._let_go()
        self.libvirtd.heal()
        self.qemu_img.faults.clear()
        self.edges.heal()
        self.libvirtd.on_start = Guest.boots
        if not set(GPUS) <= set(self.kernel.addresses):
            self.runner.run(self._miss_cards())
        for gpu in GPUS:
            badcards.mend(self.kernel, gpu, self._headers[gpu])

    async def _miss_cards(self) -> None:
        """Let it be seen that cards are out; nobody puts one back in within seconds."""
        gone = set(GPUS) - set(self.kernel.addresses)

        def given_up() -> bool:
            self.gpud.worker.wake_all()
            held = [gpu for one in self.gpud.store.live.values() for gpu in one.grant.gpus]
            return gone.isdisjoint(gpu.address for gpu in held)

        await asyncio.wait_for(self.gpud.hypervisor.wait_available(), PATIENCE_S)
        await self.gpud.inventory.refresh()
        await until(given_up, PATIENCE_S)

    async def _turn(self, turns: int) -> None:
        while turns and not self.edges.dead:
            turns -= 1
            await asyncio.sleep(_TURN_S)

    async def _settle(self) -> None:
        await asyncio.wait_for(self.gpud.hypervisor.wait_available(), PATIENCE_S)

        def still() -> bool:
            self.gpud.worker.wake_all()
            for instance in self.gpud.store.live.values():
                guest = self.libvirtd.guests.get(instance.domain_uuid)
                if instance.step is Step.AWAIT_READY and guest is not None:
                    report_again(guest)
            return self._settled()

        try:
            await until(still, PATIENCE_S)
        except TimeoutError:
            raise AssertionError(f"not settled: {self._stuck()}") from None
        await self.gpud.reconciler.once()

    def _settled(self) -> bool:
        """Whether every order runs, with its guest and no other, or has ended."""
        live = self.gpud.store.live.values()
        # A DELETE shows in the status at once, and in the step when the worker comes to it.
        running = all((one.status, one.step) == (Status.RUNNING, Step.RUNNING) for one in live)
        guests = set(self.libvirtd.guests) - self.strangers
        return running and guests == {one.domain_uuid for one in live}

    def _stuck(self) -> list[str]:
        return [f"{one.instance_id} {one.step}" for one in self.gpud.store.live.values()]

    async def _release_cards(self) -> None:
        """A card is quarantined for a fault that it had, and can be sold once that is mended."""
        for address, quarantine in self.gpud.store.quarantines.items():
            assert address in self.suspects, quarantine.reason
            assert quarantine.reason
            assert await self.gpud.cleaner.release(address)
        self.suspects.clear()
        await self.gpud.inventory.refresh()
        for card in self.gpud.inventory.cards:
            if card.gpu_type is not None:
                assert card.state in {CardState.AVAILABLE, CardState.IN_USE}, card.why_not
