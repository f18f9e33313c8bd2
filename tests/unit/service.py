"""The parts behind the API, all real but for the host's capacity, libvirt's state and the clock."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from gpud.config import Config
from gpud.desk import OrderDesk
from gpud.guest.console import ConsoleLogs
from gpud.guest.image import ImageStore
from gpud.host.capacity import Capacity
from gpud.host.pci import PciTree
from gpud.inventory import Inventory
from gpud.model import GuestInput, Instance, NumaNode, Order, Status, Step, Tier
from gpud.store import Store
from gpud.telemetry import Metrics
from gpud.watch.overview import Overview
from gpud.watch.sources import Sources
from tests.unit.lifecycle.gpud_under_test import CREATE_STEPS, RELEASE_STEPS

NOW = 1_790_000_000.0
ROOMY = Capacity((NumaNode(0, 64, 256 * 1024),), storage_gib=4000)

SETTINGS: Mapping[str, Any] = {
    "auth": {"issuer": "https://issuer.example", "audience": ["gpud"], "key_files": ["/k.pem"]},
    "site": {"region": "US", "datacenter_location": "US-Demo-1"},
    "offers": [
        {
            "gpu_type": "h100_sxm",
            "gpu_counts": [1, 2],
            "per_gpu": {"cpu_cores": 4, "memory_gib": 16, "storage_gib": 100},
            "price_per_gpu_hour": {"on_demand": "3.49", "spot": "1.99"},
        }
    ],
    "host_reserve": {"cpu_cores": 0, "memory_gib": 0, "storage_gib": 0},
    "network": {"mode": "user"},
    "gpus": {"stand_ins": [{"gpu_type": "h100_sxm", "count": 2}]},
}

_CREATE = CREATE_STEPS[1:]
_RELEASE = (*RELEASE_STEPS, Step.ENDED)


class Clock:
    """A clock that moves only when told to."""

    def __init__(self, now: float = NOW) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Hypervisor:
    """Whether libvirt answers."""

    up: bool = True
    calls_in_thread: int = 0

    @property
    def available(self) -> bool:
        return self.up


@dataclass
class Keys:
    """Whether tokens can be judged."""

    ready: bool = True


@dataclass
class Service:
    """The parts, wired as the daemon wires them."""

    config: Config
    store: Store
    inventory: Inventory
    images: ImageStore
    desk: OrderDesk
    metrics: Metrics
    clock: Clock
    hypervisor: Hypervisor = field(default_factory=Hypervisor)
    keys: Keys = field(default_factory=Keys)

    def overview(self, consoles: ConsoleLogs) -> Overview:
        """What the operator is told, on this clock."""
        sources = Sources(
            self.store, self.inventory, self.images, self.hypervisor, self.desk, self.keys
        )
        return Overview(self.config.deadlines, sources, consoles, self.clock, self.clock)

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0


def config_from(state_dir: Path, **changes: Any) -> Config:
    """A config; each keyword is a section that goes over the usual one."""
    settings: dict[str, Any] = {**SETTINGS, **changes, "state_dir": state_dir}
    return Config.model_validate(settings, strict=False)


async def _no_pci() -> PciTree:
    return PciTree({})


@asynccontextmanager
async def running_service(
    config: Config,
    images: ImageStore,
    clock: Clock,
    measure: Callable[[], Capacity] = lambda: ROOMY,
) -> AsyncIterator[Service]:
    """The parts behind the API, over a state file of their own."""
    store = await Store.open(config.state_dir, clock)
    inventory = Inventory(config, measure, _no_pci, None, store)
    await inventory.refresh()
    metrics = Metrics()
    hypervisor = Hypervisor()
    desk = OrderDesk(config, store, inventory, images, lambda: hypervisor.up, metrics, clock)
    yield Service(config, store, inventory, images, desk, metrics, clock, hypervisor)
    await store.close()


def make_qcow2(path: Path) -> None:
    """Make a real, empty image of 1 MiB."""
    create: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2", path, "1M"]
    subprocess.run(create, check=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    """A store with one real, tiny image in it, named ``base``. For all tests: not to be changed."""
    directory = tmp_path_factory.mktemp("images")
    source = directory / "source.qcow2"
    make_qcow2(source)
    store = ImageStore(directory / "store")
    # On a thread of its own, because this one's event loop belongs to the tests.
    adding = Thread(target=lambda: asyncio.run(store.add(source, "base")))
    adding.start()
    adding.join()
    store.resolve("base")
    return store


def order(instance_id: str = "gpuai-1", **changes: Any) -> Order:
    """An order for one H100."""
    usual: dict[str, Any] = {
        "instance_id": instance_id,
        "gpu_type": "h100_sxm",
        "gpu_count": 1,
        "tier": Tier.ON_DEMAND,
        "region": None,
        "guest_input": GuestInput(),
        "fingerprint": instance_id,
    }
    return Order(**{**usual, **changes})


async def make_running(service: Service, upstream_id: str) -> Instance:
    """Walk a new instance to where its guest has started the script."""
    instance = service.store.live[upstream_id]
    for step in _CREATE:
        instance = await service.store.move(instance, step)
    return await service.store.move(
        instance, Step.RUNNING, status=Status.RUNNING, running_at=service.clock()
    )


async def make_failed(service: Service, upstream_id: str, failure: str) -> Instance:
    """Let an instance fail; it still holds what it was given."""
    return await service.store.move(
        service.store.live[upstream_id], Step.STOP_DOMAIN, status=Status.ERROR, failure=failure
    )


async def make_ended(service: Service, upstream_id: str) -> Instance:
    """Walk an instance through its release; what it held is free afterwards."""
    instance = service.store.live[upstream_id]
    steps = _RELEASE[1:] if instance.step is Step.STOP_DOMAIN else _RELEASE
    for step in steps:
        instance = await service.store.move(instance, step)
    return instance
