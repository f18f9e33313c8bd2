"""An inventory of a server that a test makes up, over a real record."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field, replace

import pytest

from gpud.configfile import parse_config
from gpud.host.capacity import Capacity
from gpud.host.iommu import IommuFacts
from gpud.host.nvml import Nvml
from gpud.host.pci import PciFunction, PciTree
from gpud.inventory import Inventory
from gpud.model import Gpu, Instance, NumaNode, PciAddress, Step
from gpud.store import Store
from tests.unit.fakes.orders import grant, granting, order, quick_directory
from tests.unit.inventory.parts import SAFE, tree

CONFIG = """
auth: {issuer: x, audience: [a], jwks_url: "https://a/b"}
site: {region: US, datacenter_location: x}
host_reserve: {cpu_cores: 2, memory_gib: 1.5, storage_gib: 10}
network: {mode: user}
"""
ROOMY = Capacity((NumaNode(0, 8, 16384),), 100)
_RELEASE = (
    Step.STOP_DOMAIN,
    Step.REMOVE_FILES,
    Step.RETURN_ADDRESS,
    Step.CLEAN_GPUS,
    Step.RETURN_GPUS,
    Step.ENDED,
)


@dataclass
class Server:
    """What the inventory sees when it looks; change it between looks."""

    store: Store
    capacity: Capacity = ROOMY
    tree: PciTree = field(default_factory=tree)
    iommu: IommuFacts = SAFE
    domains: Mapping[PciAddress, str] = field(default_factory=dict)
    fails: Exception | None = None

    def has(self, *functions: PciFunction) -> None:
        self.tree = tree(*functions)

    def inventory(self, nvml: Nvml | None = None, config: str = CONFIG) -> Inventory:
        return Inventory(
            parse_config(config),
            self._measure,
            self._read_pci,
            nvml,
            self.store,
            read_iommu=lambda: self.iommu,
            domains=lambda: self.domains,
        )

    async def _read_pci(self) -> PciTree:
        return self.tree

    def _measure(self) -> Capacity:
        if self.fails is not None:
            raise self.fails
        return self.capacity

    async def claim(self, gpu: Gpu) -> Instance:
        """Give a GPU to a new instance."""
        given = replace(grant(), gpus=(gpu,))
        return (await self.store.admit(order(), granting(given))).instance

    async def release(self, instance: Instance, until: Step = Step.ENDED) -> None:
        """Walk an instance through its release."""
        for step in _RELEASE[: _RELEASE.index(until) + 1]:
            instance = await self.store.move(instance, step)


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    with quick_directory() as directory:
        store = await Store.open(directory)
        yield store
        await store.close()


@pytest.fixture
def server(store: Store) -> Server:
    return Server(store)
