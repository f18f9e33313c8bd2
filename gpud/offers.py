"""What is for sale: the offerings GPU.ai polls, and the grant an order gets from them. Pure.

The contract's choices on prices, stock and units are made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from ipaddress import IPv4Address

from gpud.allocator import Placement, Shortage, how_many, place, remaining
from gpud.config import Config, Offer
from gpud.errors import Code, GpudError, Problem
from gpud.model import GPU_TYPES, Grant, Host, Order, Shape, Tier

_SHORT_OF = {
    Shortage.GPUS: "free GPUs of that type",
    Shortage.CPU_CORES: "free CPU cores",
    Shortage.MEMORY: "free memory",
    Shortage.STORAGE: "free disk space",
    Shortage.ADDRESSES: "free addresses",
}


class NoCapacity(GpudError):  # noqa: N818 - reads as what it is
    """The order is for sale, but not at the moment.

    Attributes:
        shortage: What there is too little of; a metric label.
    """

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(Code.NO_CAPACITY, f"this server has not enough {_SHORT_OF[shortage]}")
        self.shortage = shortage


@dataclass(frozen=True, slots=True)
class Offering:
    """One entry of ``GET /v1/gpu/available``; names and units are the Supplier API's."""

    gpu_type: str
    gpu_count: int
    vram_per_gpu_gb: int
    cpu_cores: int
    ram_gb: int
    storage_gb: int
    price_per_hour: float
    tier: str
    region: str
    datacenter_location: str
    stock_status: str
    available_count: int

    def as_json(self) -> dict[str, object]:
        """The entry as it is sent."""
        return asdict(self)


def offerings(config: Config, host: Host, grants: Sequence[Grant]) -> list[Offering]:
    """Every shape and tier of the config, with how many of it could be sold right now (maybe 0)."""
    free = remaining(host, grants)
    return [
        _offering(config, offer, shape, tier, available)
        for offer in config.offers
        for shape in shapes(offer)
        for available in (how_many(shape, free, offer.gpu_counts),)
        for tier in offer.price_per_gpu_hour
    ]


def grant(
    config: Config,
    host: Host,
    grants: Sequence[Grant],
    order: Order,
    image_digest: str,
    last_address: IPv4Address | None = None,
) -> Grant:
    """Decide what ``order`` gets; ``last_address`` is the one that was given last of all.

    Raises:
        GpudError: ``NOT_OFFERED`` for what is never sold here; :class:`NoCapacity` for what is not
            free now.
    """
    offer = _matching_offer(config, order)
    shape = shape_of(offer, order.gpu_count)
    placement = place(shape, remaining(host, grants), offer.gpu_counts, last_address)
    if not isinstance(placement, Placement):
        raise NoCapacity(placement)
    return Grant(
        shape=shape,
        gpus=placement.gpus,
        address=placement.address,
        image_digest=image_digest,
        cost_per_hour=offer.price_per_gpu_hour[order.tier] * order.gpu_count,
        region=config.site.region,
        datacenter_location=config.site.datacenter_location,
        nodes=placement.nodes,
    )


def check_offered(config: Config, order: Order) -> None:
    """Refuse what is never sold here.

    Raises:
        GpudError: ``NOT_OFFERED``, with every field that does not fit.
    """
    _matching_offer(config, order)


def shapes(offer: Offer) -> Iterator[Shape]:
    """The shapes an offer sells, one for each GPU count."""
    return (shape_of(offer, count) for count in offer.gpu_counts)


def shape_of(offer: Offer, gpu_count: int) -> Shape:
    """What an instance with ``gpu_count`` GPUs gets under ``offer``."""
    return Shape(
        gpu_type=offer.gpu_type,
        gpu_count=gpu_count,
        cpu_cores=offer.per_gpu.cpu_cores * gpu_count,
        memory_mib=round(offer.per_gpu.memory_gib * 1024) * gpu_count,
        storage_gib=offer.per_gpu.storage_gib * gpu_count,
    )


def _offering(config: Config, offer: Offer, shape: Shape, tier: Tier, available: int) -> Offering:
    price = offer.price_per_gpu_hour[tier]
    if config.price_per_hour_is == "offering":
        price *= shape.gpu_count
    return Offering(
        gpu_type=shape.gpu_type,
        gpu_count=shape.gpu_count,
        vram_per_gpu_gb=GPU_TYPES[shape.gpu_type].vram_gb,
        cpu_cores=shape.cpu_cores,
        # Rounded down: a guest never has less than it was sold with.
        ram_gb=shape.memory_mib // 1024,
        storage_gb=shape.storage_gib,
        price_per_hour=as_number(price),
        tier=tier.value,
        region=config.site.region,
        datacenter_location=config.site.datacenter_location,
        stock_status=_stock_status(config, available),
        available_count=available,
    )


def as_number(price: Decimal) -> float:
    """A price as the JSON number it is sent as."""
    return float(price)


def _stock_status(config: Config, available: int) -> str:
    if available >= config.stock.high_from:
        return "High"
    return "Medium" if available >= config.stock.medium_from else "Low"


def _matching_offer(config: Config, order: Order) -> Offer:
    offer = next((one for one in config.offers if one.gpu_type == order.gpu_type), None)
    problems = []
    if offer is None:
        sold = ", ".join(one.gpu_type for one in config.offers) or "nothing at present"
        problems.append(Problem("gpu_type", f"not offered here; offered: {sold}"))
    else:
        if order.gpu_count not in offer.gpu_counts:
            counts = ", ".join(map(str, sorted(offer.gpu_counts)))
            problems.append(Problem("gpu_count", f"not offered; counts of this type: {counts}"))
        if order.tier not in offer.price_per_gpu_hour:
            problems.append(Problem("tier", f"{order.tier.value} is not offered for this type"))
    if order.region is not None and order.region != config.site.region:
        problems.append(Problem("region", f"this server is in {config.site.region}"))
    if offer is None or problems:
        raise GpudError(Code.NOT_OFFERED, "this server does not offer that", problems=problems)
    return offer
