"""What the operator's socket answers of each thing, as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from gpud.api.schemas import uptime_s
from gpud.drains import Drain
from gpud.history import Event
from gpud.model import Instance
from gpud.offers import Offering, as_number

Row = dict[str, Any]


def instance_row(instance: Instance, now: float) -> Row:
    """An instance as it is listed; ``now`` in seconds since the epoch."""
    grant = instance.grant
    return {
        "upstream_id": instance.upstream_id,
        "instance_id": instance.instance_id,
        "status": instance.status.value,
        "step": instance.step.value,
        "in_step_seconds": max(0, int(now - instance.step_since)),
        "gpu_type": grant.shape.gpu_type,
        "gpus": [str(gpu.address) for gpu in grant.gpus],
        "tier": instance.tier.value,
        "cpu_cores": grant.shape.cpu_cores,
        "memory_mib": grant.shape.memory_mib,
        "storage_gib": grant.shape.storage_gib,
        "address": str(grant.address) if grant.address else None,
        "cost_per_hour": as_number(grant.cost_per_hour),
        "uptime_seconds": uptime_s(instance, now),
        "script_exit_code": instance.script_exit_code,
        "restarts": instance.restarts,
        "failure": instance.failure,
    }


def event_row(event: Event) -> Row:
    """Something that happened."""
    return {**asdict(event), "gpu": str(event.gpu) if event.gpu is not None else None}


def offer_row(offering: Offering, why_not: str) -> Row:
    """An offering, with why none of it is available."""
    return {**offering.as_json(), "why_not": why_not or None}


def drain_row(drain: Drain) -> Row:
    """A drain; of the whole server where ``gpu`` is null."""
    gpu = str(drain.address) if drain.address is not None else None
    return {"gpu": gpu, "since": drain.since, "reason": drain.reason}
