"""What is sold, at which price, and what the host keeps."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from gpud.config.section import Section
from gpud.configtypes import GpuTypeName
from gpud.model import Tier


class Site(Section):
    """Where this server stands, as GPU.ai shows it to customers."""

    region: Annotated[str, Field(min_length=1, max_length=64)]
    datacenter_location: Annotated[str, Field(min_length=1, max_length=128)]


class PerGpu(Section):
    """What comes with each GPU of an offer."""

    cpu_cores: Annotated[int, Field(ge=1, le=256)]
    memory_gib: Annotated[float, Field(ge=0.25, le=8192)]
    storage_gib: Annotated[int, Field(ge=1, le=65536)]


Price = Annotated[Decimal, Field(ge=0, le=100000, max_digits=12, decimal_places=6)]


class Offer(Section):
    """One GPU type for sale: in which counts, with what beside it, at which price."""

    gpu_type: GpuTypeName
    gpu_counts: Annotated[list[Annotated[int, Field(ge=1, le=16)]], Field(min_length=1)] = [1]
    per_gpu: PerGpu
    price_per_gpu_hour: Annotated[dict[Tier, Price], Field(min_length=1)]

    @field_validator("gpu_counts")
    @classmethod
    def _distinct_counts(cls, counts: list[int]) -> list[int]:
        if len(set(counts)) != len(counts):
            raise ValueError("a count is listed twice")
        return counts


class Stock(Section):
    """From how many sellable units on ``stock_status`` reads High or Medium; below that, Low."""

    medium_from: Annotated[int, Field(ge=1)] = 2
    high_from: Annotated[int, Field(ge=1)] = 4

    @field_validator("high_from")
    @classmethod
    def _high_above_medium(cls, value: int, info: ValidationInfo) -> int:
        if value < info.data.get("medium_from", value):
            raise ValueError("must not be below medium_from")
        return value


class HostReserve(Section):
    """What the host keeps for itself; never sold."""

    cpu_cores: Annotated[int, Field(ge=0, le=4096)] = 2
    memory_gib: Annotated[float, Field(ge=0, le=65536)] = 8
    storage_gib: Annotated[int, Field(ge=0, le=1048576)] = 20
