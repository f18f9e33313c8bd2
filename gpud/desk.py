"""The order desk: what is for sale right now, and the admission of an order."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import structlog

from gpud import offers
from gpud.allocator import Shortage
from gpud.bottleneck import bottleneck
from gpud.config import Config
from gpud.errors import Code, GpudError
from gpud.guest.image import ImageStore
from gpud.inventory import Inventory
from gpud.inventory.reasons import drained
from gpud.model import Grant, Host, Instance, Order, Status
from gpud.offers import NoCapacity, Offering
from gpud.store import Store
from gpud.telemetry import Metrics

_log = structlog.get_logger()

_RETRY_AFTER_S = 10
_UNRECORDED_S = 60.0
"""How long nothing is offered after an order could not be recorded."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The answer to an accepted order.

    Attributes:
        instance: The instance, new or from before.
        replayed: True when the same order had been accepted earlier.
        estimated_ready_s: Seconds until it will probably be running; 0 when there is nothing to wait for.
    """

    instance: Instance
    replayed: bool
    estimated_ready_s: int


class OrderDesk:
    """Sells this host.

    Args:
        config: Offers and prices.
        store: Where orders are recorded.
        inventory: What the host has.
        images: Where the guest's image must be.
        hypervisor_up: Whether libvirt answers at the moment.
        metrics: Where orders and refusals are counted.
        clock: Seconds since the epoch.
        monotonic: Seconds that only go forward.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        inventory: Inventory,
        images: ImageStore,
        hypervisor_up: Callable[[], bool],
        metrics: Metrics,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._store = store
        self._inventory = inventory
        self._images = images
        self._hypervisor_up = hypervisor_up
        self._metrics = metrics
        for shortage in Shortage:  # so that the first of each is seen as an increase
            metrics.capacity_refusals.labels(shortage.value)
        self._clock = clock
        self._monotonic = monotonic
        self._unrecorded_at = -math.inf
        self._cached_for: object = None
        self._cached = b""

    def reconfigure(self, config: Config) -> None:
        """Sell by ``config`` from now on; what was sold before stays as it was granted."""
        self._config = config
        self._cached_for = None

    def offerings(self) -> list[Offering]:
        """Every shape and tier on offer, also those with nothing available, with how many there are.

        Nothing is available while anything of :meth:`closed` holds.
        """
        return self._offerings(self._inventory.host, self._grants(), self.closed())

    def closed(self) -> list[str]:
        """Why nothing at all is for sale now, in words for the operator; empty when it may be."""
        why = [*self.faults().values()]
        if (drain := self._store.drains.get(None)) is not None:
            why.append(str(drained(drain)))
        return why

    def faults(self) -> dict[str, str]:
        """The same less a drain, which somebody wanted: each with what it is of."""
        why = {}
        if self._store.restored:
            why["backup"] = "the state is from a backup (after a look: gpud check --repair)"
        if not self._recordable():
            why["record"] = (
                "an order could not be recorded within the last minute (see df and dmesg)"
            )
        if not self._hypervisor_up():
            why["libvirt"] = "libvirt does not answer (virsh list; systemctl restart libvirtd)"
        if (fault := self._image_fault()) is not None:
            why["image"] = f"the guest image cannot be used: {fault}"
        if self._inventory.view == 0:
            why["host"] = f"the host cannot be read: {self._inventory.problem}"
        return why

    def explained(self) -> list[tuple[Offering, str]]:
        """The offerings, each with why none of it is available, for the operator; empty if one is."""
        host, grants, cards, closed = (
            self._inventory.host, self._grants(), self._inventory.cards, self.closed(),
        )  # fmt: skip
        short = {
            (shape.gpu_type, shape.gpu_count): bottleneck(offer, shape, host, grants, cards)
            for offer in self._config.offers
            for shape in offers.shapes(offer)
        }
        return [
            (one, "; ".join(closed) or short[one.gpu_type, one.gpu_count])
            for one in self._offerings(host, grants, closed)
        ]

    def available_json(self) -> bytes:
        """Body of ``GET /v1/gpu/available``: what can be provisioned right now. Remembered until
        an order changes something or the host is looked at anew.
        """  # noqa: D205 - one sentence and its rider
        now_for = (
            self._store.version,
            self._inventory.view,
            self._hypervisor_up(),
            self._recordable(),
        )
        if self._cached_for != now_for:
            available = [one.as_json() for one in self.offerings() if one.available_count > 0]
            self._cached = json.dumps({"offerings": available}).encode()
            self._cached_for = now_for
        return self._cached

    async def order(self, order: Order) -> Accepted:
        """Admit an order; it is durable when this returns.

        Raises:
            GpudError: The order is refused; nothing was recorded.
        """
        try:
            admission = await self._store.admit(order, lambda grants: self._grant(order, grants))
        except GpudError as error:
            if isinstance(error, NoCapacity):
                self._metrics.capacity_refusals.labels(error.shortage.value).inc()
            if error.code is Code.RECORD_UNAVAILABLE:
                self._unrecorded_at = self._monotonic()
                _log.error("order refused", error=str(error))
            self._metrics.orders.labels(error.code.value).inc()
            raise
        outcome = "replayed" if admission.replayed else "accepted"
        self._metrics.orders.labels(outcome).inc()
        if not admission.replayed:
            claims = self._metrics.gpu_claims.labels(order.gpu_type, order.tier.value)
            claims.inc(order.gpu_count)
        estimate_s = admission.usual_boot_s or self._config.guest.estimated_ready_s
        return Accepted(
            admission.instance,
            admission.replayed,
            self._remaining_s(admission.instance, estimate_s),
        )

    def _grant(self, order: Order, grants: Sequence[Grant]) -> Grant:
        """Decide inside the store's transaction; a repeat of an accepted order never comes here."""
        if not self._hypervisor_up():
            raise GpudError(
                Code.HYPERVISOR_UNAVAILABLE,
                "the hypervisor does not answer at the moment",
                retry_after_s=_RETRY_AFTER_S,
            )
        config = self._config  # a reload may put another in its place meanwhile
        offers.check_offered(config, order)
        try:
            image = self._images.resolve(config.guest.image)
        except GpudError as error:
            _log.error("order refused: the guest image cannot be used", error=str(error))
            raise GpudError(Code.NO_CAPACITY, "this server has no usable guest image") from error
        last, host = self._store.last_address, self._inventory.host
        return offers.grant(config, host, grants, order, image.digest, last)

    def _recordable(self) -> bool:
        return self._monotonic() - self._unrecorded_at >= _UNRECORDED_S

    def _image_fault(self) -> str | None:
        try:
            self._images.resolve(self._config.guest.image)
        except GpudError as error:
            return str(error)
        return None

    def _offerings(
        self, host: Host, grants: Sequence[Grant], closed: Sequence[str]
    ) -> list[Offering]:
        found = offers.offerings(self._config, host, grants)
        if not closed:
            return found
        return [replace(one, available_count=0, stock_status="Low") for one in found]

    def _grants(self) -> list[Grant]:
        return [instance.grant for instance in self._store.live.values()]

    def _remaining_s(self, instance: Instance, estimate_s: float) -> int:
        if instance.status is not Status.CREATING:
            return 0
        return max(1, math.ceil(instance.created_at + estimate_s - self._clock()))
