"""What samples say: medians, quartiles, and the ratio of two sides that took turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


def quantile(samples: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the samples lie, between two of them by interpolation.

    Raises:
        ValueError: There are no samples.
    """
    if not samples:
        raise ValueError("no samples")
    ordered = sorted(samples)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Of at least one sample."""
        return cls(*(quantile(samples, share) for share in (0.5, 0.25, 0.75)))


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs. Samples of one round are held against each other: what the machine did else
    in that round was in both.

    Raises:
        ValueError: The sides have not the same number of samples, or none, or theirs has a zero.
    """  # noqa: D205 - two sentences
    if 0 in theirs:
        raise ValueError("a side took no time at all: too little work to be measured")
    return Spread.of([mine / other for mine, other in zip(ours, theirs, strict=True)])
