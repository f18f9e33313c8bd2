"""What is true at the moment, as Prometheus' metric families. Pure: facts in, numbers out.

Series of what is gone vanish by themselves, since each scrape makes all of them anew. Every closed set of
label values is told in full, zeros included, so that a query never has to ask what is missing.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import InfoMetricFamily as Info

from gpud import __version__
from gpud.config import Deadlines
from gpud.guest.image import Image
from gpud.host.capacity import Disk
from gpud.inventory import Card, CardState
from gpud.lifecycle.cards import step_limit_s
from gpud.model import Instance, Status, Step
from gpud.offers import Offering

Samples = Iterable[tuple[Sequence[str], float]]


def of_daemon() -> Iterator[Gauge | Info]:
    """Which gpud this is."""
    info = Info("gpud_build", "The daemon's version.")
    info.add_metric([], {"version": __version__, "python_version": platform.python_version()})
    yield info


def of_connections(
    *, libvirt_up: bool, calls_pending: int, keys_ready: bool, host_readable: bool
) -> Iterator[Gauge]:
    """What the daemon depends on."""
    yield _one("gpud_libvirt_up", "1 while libvirt is connected and answers.", libvirt_up)
    yield _one("gpud_libvirt_calls_pending", "Calls of libvirt under way, hung ones too.",
               calls_pending)  # fmt: skip
    yield _one("gpud_auth_ready", "1 while tokens can be judged.", keys_ready)
    yield _one("gpud_host_readable", "1 while the host's cards and capacity can be read.",
               host_readable)  # fmt: skip


def of_drain(*, whole_server: bool) -> Iterator[Gauge]:
    """Whether the operator keeps new orders away; of single cards ``gpud_gpu_not_sold`` tells."""
    yield _one("gpud_drained", "1 while the whole server takes no new orders.", whole_server)


def of_certificate(expires_at: float | None) -> Iterator[Gauge]:
    """When the API's certificate expires; nothing without TLS."""
    family = Gauge(
        "gpud_tls_certificate_expiry_timestamp_seconds", "When the API's certificate expires."
    )
    if expires_at is not None:
        family.add_metric([], expires_at)
    yield family


def of_cards(cards: Sequence[Card]) -> Iterator[Gauge | Info]:
    """The cards: how many are in which state, why one is not sold, and what NVML measured.

    NVML sees idle cards only, those that NVIDIA's driver has.
    """
    kinds = Counter((card.gpu_type or "none", card.state) for card in cards)
    states = [(gpu_type, state) for gpu_type, _ in dict.fromkeys(kinds) for state in CardState]
    yield _family("gpud_gpus", "Cards by GPU type (none: GPU.ai does not buy it) and state.",
                  ("gpu_type", "state"),
                  (((gpu_type, state.value), kinds[gpu_type, state])
                   for gpu_type, state in dict.fromkeys(states)))  # fmt: skip
    info = Info("gpud_gpu", "A card.", labels=["gpu"])
    for card in cards:
        told = {"gpu_type": card.gpu_type or "none", "name": card.name or ""}
        info.add_metric([str(card.address)], told)
    yield info
    yield _family("gpud_gpu_not_sold", "1 for each kind of reason for which a card is not sold.",
                  ("gpu", "reason"),
                  (((str(card.address), why), 1) for card in cards
                   for why in sorted({one.why.value for one in card.reasons})))  # fmt: skip
    yield from _health(cards)


def _health(cards: Sequence[Card]) -> Iterator[Gauge]:
    mib = 2**20
    for name, text, fact, unit in (
        ("temperature_celsius", "Temperature of an idle card.", "temperature_c", 1),
        ("power_watts", "Power that an idle card draws.", "power_w", 1),
        ("memory_used_bytes", "Memory in use of an idle card.", "memory_used_mib", mib),
        ("ecc_uncorrected_errors", "Memory errors since the card's reset.", "ecc_uncorrected", 1),
        ("retired_pages", "Memory pages given up for good (before Ampere).", "retired_pages", 1),
        ("retirement_pending", "1 if pages are retired at the next reset.", "retirement_pending", 1),
        ("row_remap_pending", "1 if rows are remapped at the next reset.", "remap_pending", 1),
    ):  # fmt: skip
        found = ((str(card.address), getattr(card.health, fact)) for card in cards)
        samples = (((gpu,), value * unit) for gpu, value in found if value is not None)
        yield _family(f"gpud_gpu_{name}", text, ("gpu",), samples)


def of_instances(live: Sequence[Instance], deadlines: Deadlines, now: float) -> Iterator[Gauge]:
    """Live instances by status, and those that are in a step for longer than it may take."""
    statuses = Counter(instance.status for instance in live)
    yield _family("gpud_instances", "Live instances by status.", ("status",),
                  (((status.value,), statuses[status]) for status in Status))  # fmt: skip
    overdue = Counter(one.step for one in live if _overdue(one, deadlines, now))
    yield _family("gpud_instances_overdue",
                  "Instances that are in a step for longer than its deadline.", ("step",),
                  (((step.value,), overdue[step]) for step in Step
                   if deadlines.of(step) is not None))  # fmt: skip


def _overdue(instance: Instance, deadlines: Deadlines, now: float) -> bool:
    limit_s = step_limit_s(deadlines, instance)
    return limit_s is not None and now - instance.step_since > limit_s


def of_offerings(offerings: Iterable[Offering]) -> Iterator[Gauge]:
    """How much of each offering could be sold right now."""
    yield _family("gpud_offers_available", "How often an offering could be sold right now.",
                  ("gpu_type", "gpu_count", "tier"),
                  (((one.gpu_type, str(one.gpu_count), one.tier), one.available_count)
                   for one in offerings))  # fmt: skip


def of_images(images: Sequence[Image], guest_image: str) -> Iterator[Gauge]:
    """The base images, and whether the one that guests get can be used."""
    usable = any(guest_image in one.names and not one.fault for one in images)
    yield _one("gpud_guest_image_usable", "1 while the image that guests get is sound.", usable)
    named = [((one.names[0] if one.names else one.digest,), one) for one in images]
    yield _family("gpud_image_size_bytes", "Size of a base image's file.", ("image",),
                  ((label, one.size_bytes) for label, one in named))  # fmt: skip
    yield _family("gpud_image_instances", "Instances that stand on a base image.", ("image",),
                  ((label, one.in_use_by) for label, one in named))  # fmt: skip


def of_disk(disk: Disk) -> Iterator[Gauge]:
    """How full the file system of the state directory is."""
    yield _one("gpud_disk_size_bytes", "Size of the state directory's file system.",
               disk.size_bytes)  # fmt: skip
    yield _one("gpud_disk_free_bytes", "What may still be written to it.", disk.free_bytes)
    yield _one("gpud_disk_instances_bytes", "What instances' files take up of it.",
               disk.instances_bytes)  # fmt: skip


def _one(name: str, text: str, value: float) -> Gauge:
    return Gauge(name, text, value=float(value))


def _family(name: str, text: str, labels: Sequence[str], samples: Samples) -> Gauge:
    family = Gauge(name, text, labels=labels)
    for values, number in samples:
        family.add_metric(values, float(number))
    return family
