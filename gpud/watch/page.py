"""Prometheus' page: what was counted, and what is true at the moment, gathered anew for each scrape."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence

import structlog
from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from gpud.config import Config
from gpud.errors import GpudError
from gpud.guest.image import Image
from gpud.host import capacity
from gpud.host.capacity import Disk
from gpud.telemetry import Metrics
from gpud.watch import families
from gpud.watch.earnings import Earnings
from gpud.watch.sources import Sources

_log = structlog.get_logger()


class Page(Collector):
    """Makes the page.

    Args:
        config: Deadlines, offers, and where things are.
        metrics: What was counted.
        sources: What is looked at.
        certificate_expires_at: Tells when the API's certificate expires, in seconds since the epoch.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        sources: Sources,
        certificate_expires_at: Callable[[], float | None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._registry = metrics.registry
        self._sources = sources
        self._certificate_expires_at = certificate_expires_at
        self._clock = clock
        self._earnings = Earnings(sources.store, metrics.earnings_usd, clock)
        self._found: Sequence[Metric] = ()
        self._metrics = metrics
        self.reconfigure(config)
        metrics.registry.register(self)
        ProcessCollector(namespace="gpud", registry=metrics.registry)

    def reconfigure(self, config: Config) -> None:
        """Show what ``config`` says from now on."""
        self._config = config
        for offer in config.offers:  # so that the first dollar is seen as an increase
            for tier in offer.price_per_gpu_hour:
                self._metrics.earnings_usd.labels(offer.gpu_type, tier.value)
                self._metrics.gpu_claims.labels(offer.gpu_type, tier.value)

    async def add_up(self) -> None:
        """Read what was earned before. To be begun before any instance can end."""
        await self._earnings.add_up()

    async def render(self) -> bytes:
        """The page, in Prometheus' text format; waits until :meth:`add_up` is done."""
        await self._earnings.added_up()
        images, disk = await asyncio.to_thread(self._read_disk)
        # Nothing awaits from here on: the page is of one moment.
        self._earnings.update()
        self._found = [
            *self._of_memory(),
            *(families.of_images(images, self._config.guest.image) if images is not None else ()),
            *(families.of_disk(disk) if disk is not None else ()),
        ]
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What the last :meth:`render` found; the registry asks this."""
        return self._found

    def _of_memory(self) -> Iterable[Metric]:
        sources = self._sources
        live = list(sources.store.live.values())
        yield from families.of_daemon()
        yield from families.of_connections(
            libvirt_up=sources.hypervisor.available,
            calls_pending=sources.hypervisor.calls_in_thread,
            keys_ready=sources.keys.ready,
            host_readable=sources.inventory.problem is None,
        )
        yield from families.of_drain(whole_server=None in sources.store.drains)
        yield from families.of_certificate(self._certificate_expires_at())
        yield from families.of_cards(sources.inventory.cards)
        yield from families.of_instances(live, self._config.deadlines, self._clock())
        yield from families.of_offerings(sources.desk.offerings())

    def _read_disk(self) -> tuple[Sequence[Image] | None, Disk | None]:
        """The images and the file system; what cannot be read is missing on the page."""
        images, disk = None, None
        try:
            images = self._sources.images.list()
            disk = capacity.disk(self._config.state_dir)
        except (GpudError, OSError) as error:
            _log.warning("metrics are incomplete", error=str(error))
        return images, disk
