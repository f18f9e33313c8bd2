"""A page over real parts: the record, the inventory, images; only libvirt and the keys are told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gpud.guest.image import ImageStore
from gpud.watch.page import Page
from gpud.watch.sources import Sources
from tests.unit.service import Clock, Service, config_from, images, running_service

__all__ = ["images"]

CERTIFICATE_EXPIRES_AT = 1_800_000_000.0


@dataclass
class Libvirt:
    """What is told of the connection."""

    available: bool = True
    calls_in_thread: int = 0


@dataclass
class Keys:
    """Whether tokens can be judged."""

    ready: bool = True


@dataclass
class Watched:
    """A service and what is told of it."""

    service: Service
    sources: Sources
    page: Page
    libvirt: Libvirt
    keys: Keys

    async def samples(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """The page, read as Prometheus reads it: by name, each sample's labels and value."""
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        for family in text_string_to_metric_families((await self.page.render()).decode()):
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        return found

    async def value(self, name: str, **labels: str) -> float:
        """The one sample with exactly these labels."""
        (value,) = [number for told, number in (await self.samples())[name] if told == labels]
        return value


async def watch(service: Service, clock: Clock) -> Watched:
    libvirt, keys = Libvirt(), Keys()
    sources = Sources(service.store, service.inventory, service.images, libvirt, service.desk, keys)
    page = Page(service.config, service.metrics, sources, lambda: CERTIFICATE_EXPIRES_AT, clock)
    await page.add_up()
    return Watched(service, sources, page, libvirt, keys)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
async def watched(state_dir: Path, images: ImageStore, clock: Clock) -> AsyncIterator[Watched]:
    config: Any = config_from(state_dir)
    async with running_service(config, images, clock) as service:
        yield await watch(service, clock)
