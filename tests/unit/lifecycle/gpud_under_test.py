"""gpud put together as ``gpud.app`` does, less its listeners, on the edges that a test gives it."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from ipaddress import IPv4Address
from pathlib import Path
from uuid import UUID

import pytest

from gpud import offers
from gpud.audit.facts import Facts, Finding
from gpud.audit.judge import judge
from gpud.audit.reading import Reader, told
from gpud.config import (
    Auth,
    Config,
    Deadlines,
    Guest,
    HostReserve,
    Libvirt,
    Network,
    Offer,
    PerGpu,
    Site,
)
from gpud.guest.console import ConsoleLogs
from gpud.guest.image import ImageStore
from gpud.host import iommu, livebus
from gpud.host.capacity import Capacity
from gpud.host.nvml import Nvml
from gpud.host.vfio import Handover
from gpud.hypervisor.libvirtd import Hypervisor
from gpud.inventory import Inventory
from gpud.lifecycle.cards import CardSteps
from gpud.lifecycle.cleaning import Cleaner
from gpud.lifecycle.guests import GuestWatch
from gpud.lifecycle.outcome import StepFunction
from gpud.lifecycle.reconcile import Reconciler
from gpud.lifecycle.steps import Steps
from gpud.lifecycle.strays import StrayWatch
from gpud.lifecycle.worker import Worker
from gpud.model import (
    FIRST_RELEASE_STEP,
    FIRST_STEP,
    LEGAL_STEPS,
    Instance,
    NumaNode,
    PciAddress,
    Status,
    Step,
    Tier,
)
from gpud.store import Store
from gpud.telemetry import Metrics
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.libvirt_daemon import LibvirtDaemon
from tests.unit.fakes.orders import SHAPE, Clock, order, until

MOMENTS = pytest.mark.parametrize(
    "after", [False, True], ids=["before its act", "before its commit"]
)
StepsMapping = Mapping[Step, StepFunction]
CAPACITY = Capacity((NumaNode(0, 64, 65536),), 1000)
ADDRESSES = tuple(IPv4Address("10.77.0.10") + number for number in range(4))


def way(first: Step, last: Step) -> list[Step]:
    """The shortest way through the table of legal moves: a step that is added later is on it too."""
    ways = [[first]]
    for taken in ways:
        if taken[-1] is last:
            return taken
        ways += [[*taken, step] for step in sorted(LEGAL_STEPS[taken[-1]]) if step not in taken]
    raise AssertionError(f"no way from {first} to {last}")


def make_server(directory: Path) -> FakeKernel:
    """A server with two cards, each a GPU on NVIDIA's driver with its audio function."""
    kernel = FakeKernel(directory)
    for number in (1, 2):
        slot = f"0000:{number:02x}:00"
        kernel.add_function(f"{slot}.0", driver="nvidia", group=number)
        kernel.add_function(
            f"{slot}.1", device=0x22BA, class_code=0x040300, driver="snd_hda_intel", group=number,
            bars=(16384,), reset_methods=(),
        )  # fmt: skip
    return kernel


def drivers(kernel: FakeKernel) -> dict[PciAddress, tuple[str | None, str]]:
    """Which driver has each function, and what overrides that."""
    return {one: (kernel.driver(one), kernel.override(one)) for one in kernel.addresses}


CREATE_STEPS = way(FIRST_STEP, Step.RUNNING)[:-1]
LIVING_STEPS = [*CREATE_STEPS, Step.RUNNING]
RELEASE_STEPS = way(FIRST_RELEASE_STEP, Step.ENDED)[:-1]


def make_config(
    state_dir: Path,
    *,
    mode: str = "network",
    domain_type: str = "auto",
    deadlines: Deadlines | None = None,
    **guest: object,
) -> Config:
    """The config of one GPU type on sale; ``guest`` are keys of its section of that name."""
    per_gpu = PerGpu(
        cpu_cores=SHAPE.cpu_cores,
        memory_gib=SHAPE.memory_mib / 1024,
        storage_gib=SHAPE.storage_gib,
    )
    price = {Tier.ON_DEMAND: Decimal("3.49")}
    return Config(
        state_dir=state_dir,
        auth=Auth(issuer="test", audience=["gpud"], key_files=[state_dir / "key.pem"]),
        site=Site(region="US", datacenter_location="US-Test-1"),
        offers=[Offer(gpu_type=SHAPE.gpu_type, per_gpu=per_gpu, price_per_gpu_hour=price)],
        libvirt=Libvirt.model_validate({"domain_type": domain_type}),
        host_reserve=HostReserve(cpu_cores=0, memory_gib=0, storage_gib=0),
        network=Network.model_validate(
            {"mode": mode, "first_address": ADDRESSES[0], "last_address": ADDRESSES[-1]}
        ),
        guest=Guest.model_validate(guest),
        deadlines=deadlines or Deadlines(),
    )


class Gpud:
    """One life of the daemon, from :meth:`start` to :meth:`stop` or :meth:`kill`."""

    def __init__(
        self,
        config: Config,
        kernel: FakeKernel,
        clock: Clock,
        monotonic: Clock,
        nvml: Nvml | None = None,
    ) -> None:
        self._nvml = nvml
        self.config = config
        self.kernel = kernel
        self._clock = clock
        self._monotonic = monotonic
        self.metrics = Metrics()
        self.stopped = False

    async def start(self, around: Callable[[StepsMapping], StepsMapping] = lambda it: it) -> Gpud:
        """Come up; ``around`` may put something around the steps."""
        config = self.config
        self._executor = ThreadPoolExecutor(4)
        asyncio.get_running_loop().set_default_executor(self._executor)
        self._started_at = self._clock()
        self.store = await Store.open(config.state_dir, self._clock)
        cpuinfo = config.state_dir / "cpuinfo"
        cpuinfo.write_text("flags : vmx\n")
        self.hypervisor = Hypervisor(
            "fake:///", config.libvirt.call_timeout_s, config.libvirt.threads, cpuinfo
        )
        self.images = ImageStore(config.state_dir / "images")
        self.consoles = ConsoleLogs(
            config.state_dir / "console", config.guest.console_log_kib * 1024
        )
        self.guests = GuestWatch(
            self.hypervisor, self.store, self.consoles, self.metrics, self._monotonic
        )
        handover = Handover(
            self.kernel.sysfs, self.kernel.proc, sleep=self.kernel.sleep, clock=self.kernel.clock
        )
        self.inventory = Inventory(
            config,
            lambda: CAPACITY,
            lambda: livebus.read(self.kernel.sysfs),
            self._nvml,
            self.store,
            read_iommu=lambda: iommu.facts(self.kernel.sysfs.root, self.kernel.proc),
            clock=self._monotonic,
            handover=handover,
        )
        await self.inventory.refresh()
        self.cleaner = Cleaner(
            self.store,
            self.kernel.sysfs,
            handover,
            self._nvml,
            self.hypervisor,
            str(self.kernel.root),  # another tree is another boot
            self.metrics,
        )
        self.cards = CardSteps(
            config, self.store, self.inventory, self.kernel.sysfs, handover, self.cleaner
        )
        self.steps = Steps(
            config,
            self.store,
            self.images,
            self.hypervisor,
            self.guests,
            self.cards,
            self.metrics,
            self._clock,
        )
        self.worker = Worker(
            self.store,
            around(self.steps.functions()),
            config.deadlines,
            self.metrics,
            monotonic=self._monotonic,
        )
        self.reconciler = Reconciler(
            config,
            self.store,
            self.hypervisor,
            self.consoles,
            self.metrics,
            StrayWatch(self.store, self.hypervisor, self.kernel.sysfs, self.cleaner.boot_id),
        )
        self.store.subscribe(self._forget_console)
        self.hypervisor.subscribe(self.guests.hear)
        self.hypervisor.subscribe(lambda uuid, *_: self._wake(uuid))
        self.hypervisor.on_connect(self.worker.wake_all)
        self._connection = asyncio.create_task(self.hypervisor.run())
        await self.hypervisor.wait_available()
        self.worker.start()
        return self

    async def stop(self) -> None:
        """Stop in order, as the daemon does."""
        await self.worker.close()
        await self.guests.close()
        await self._end()

    async def kill(self) -> None:
        """Vanish without finishing anything: what was under way is dropped where it stands."""
        own = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not own]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._end()

    async def order(self, instance_id: str = "order-1", script: bytes = b"#!/bin/sh\n") -> Instance:
        """Order one GPU, as the order desk does."""
        wanted = order(instance_id, script)
        digest = self.images.resolve(self.config.guest.image).digest
        admission = await self.store.admit(
            wanted,
            lambda grants: offers.grant(self.config, self.inventory.host, grants, wanted, digest),
        )
        return admission.instance

    async def reach(self, instance: Instance, *wanted: Status | Step) -> Instance:
        """Wait until an instance has a status or step; what naps in between is woken."""
        found = instance

        def there() -> bool:
            nonlocal found
            found = self.store.live.get(instance.upstream_id, found)
            self.worker.wake_all()
            # By identity: as strings, the status and the step "running" are equal.
            return any(found.status is one or found.step is one for one in wanted)

        await until(there)
        return found

    async def running(self, instance_id: str = "order-1") -> Instance:
        """Order, and wait until it runs."""
        return await self.reach(await self.order(instance_id), Step.RUNNING)

    async def ended(self, instance: Instance) -> Instance:
        """Wait until an instance holds nothing any more."""

        def gone() -> bool:
            self.worker.wake_all()
            return instance.upstream_id not in self.store.live

        await until(gone)
        found = await self.store.find(instance.upstream_id)
        assert found is not None
        return found

    async def deleted(self, instance: Instance) -> Instance:
        """DELETE, and wait for the end."""
        await self.store.request_delete(instance.upstream_id)
        return await self.ended(instance)

    @property
    def settled(self) -> bool:
        """Whether every order runs or has ended."""
        return all(one.step is Step.RUNNING for one in self.store.live.values())

    async def findings(self) -> list[Finding]:
        """What ``gpud check`` would find: the record against libvirtd, the kernel and the files."""
        return judge(await self.facts())

    async def facts(self) -> Facts:
        """What ``gpud check`` would go by."""
        reader = Reader(
            self.config,
            self.hypervisor,
            self.kernel.sysfs,
            lambda: CAPACITY,
            self.cleaner.boot_id,
            self._clock,
        )
        instances = [
            {"upstream_id": key, "status": one.status, "step": one.step}
            for key, one in self.store.live.items()
        ]
        cards = [card.as_json() for card in self.inventory.cards]
        return await reader.read(told(instances, cards, self._started_at))

    def directories(self) -> set[str]:
        """Names of the instances' directories."""
        parent = self.config.state_dir / "instances"
        return {entry.name for entry in parent.iterdir()} if parent.is_dir() else set()

    def _wake(self, uuid: UUID) -> None:
        for instance in self.store.live.values():
            if instance.domain_uuid == uuid:
                self.worker.wake(instance.upstream_id)

    def _forget_console(self, instance: Instance) -> None:
        if instance.status is Status.TERMINATED:
            self.consoles.remove(instance.upstream_id)

    async def _end(self) -> None:
        self._connection.cancel()
        await asyncio.wait([self._connection])
        # A thread dies with its process; here it is waited for, lest it acts in the next life.
        await until(lambda: not self.hypervisor.calls_in_thread)
        self._executor.shutdown(wait=True)
        await self.store.close()
        self.stopped = True


class Hold:
    """Holds whoever comes to one step: before its act, or between the act and its commit."""

    def __init__(self, step: Step, *, after: bool) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self._step = step
        self._after = after

    def __call__(self, functions: StepsMapping) -> StepsMapping:
        act = functions[self._step]

        async def held(instance: Instance) -> object:
            outcome = await act(instance) if self._after else None
            self.reached.set()
            await self.open.wait()
            return outcome if self._after else await act(instance)

        return {**functions, self._step: held}  # type: ignore[dict-item]


def nothing_left(gpud: Gpud, libvirtd: LibvirtDaemon) -> bool:
    """Whether all is as before the first order: record, leases, guests, files, drivers."""
    claims = sqlite3.connect(gpud.config.state_dir / "state.sqlite")
    claimed = claims.execute(
        "SELECT (SELECT count(*) FROM gpu_claim) + (SELECT count(*) FROM address_claim)"
        " + (SELECT count(*) FROM guest_input)"
    ).fetchone()[0]
    claims.close()
    networks = libvirtd.networks.values()
    leases = [name for network in networks if network.live is not None for name in network.hosts()]
    as_found = {("nvidia", ""), ("snd_hda_intel", "")} == set(drivers(gpud.kernel).values())
    left = claimed or leases or libvirtd.guests or gpud.directories() or gpud.store.live
    return as_found and not left


def one_domain(libvirtd: LibvirtDaemon, instance: Instance) -> bool:
    """Whether the instance's guest is there, and no other."""
    return list(libvirtd.guests) == [instance.domain_uuid]
