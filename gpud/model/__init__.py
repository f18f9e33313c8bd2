"""The words of the house: GPUs, orders, instances, and the legal moves between their states.

Types only. Nothing here reads a clock, a file or the network.
"""

from gpud.model.card import GPU_TYPES, Gpu, GpuType, KnownCard, PciAddress, Quarantine
from gpud.model.host import Grant, Host, NumaNode
from gpud.model.instance import DOMAIN_PREFIX, UPSTREAM_ID, Instance
from gpud.model.order import GuestInput, Order, Shape, Tier
from gpud.model.step import (
    FIRST_RELEASE_STEP,
    FIRST_STEP,
    LEGAL_STATUS,
    LEGAL_STEPS,
    RELEASE_STEPS,
    Status,
    Step,
)

__all__ = [
    "DOMAIN_PREFIX",
    "FIRST_RELEASE_STEP",
    "FIRST_STEP",
    "GPU_TYPES",
    "LEGAL_STATUS",
    "LEGAL_STEPS",
    "RELEASE_STEPS",
    "UPSTREAM_ID",
    "Gpu",
    "GpuType",
    "Grant",
    "GuestInput",
    "Host",
    "Instance",
    "KnownCard",
    "NumaNode",
    "Order",
    "PciAddress",
    "Quarantine",
    "Shape",
    "Status",
    "Step",
    "Tier",
]
