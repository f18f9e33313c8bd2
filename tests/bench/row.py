"""One row of the table: our side, a peer or a floor, and what their ratio should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.bench.stats import Spread, ratio


@dataclass(frozen=True, slots=True)
class Target:
    """Where a ratio should be: at most ``limit``, or at least."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


FLAT_COST = Target(1.1)
"""Of two costs that should be the same: within ten per cent."""
FLAT_RATE = Target(0.9, at_least=True)
"""Of two rates that should be the same."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured against what.

    Attributes:
        what: Our side.
        against: The other.
        unit: Of the samples.
        ours: Our samples, one for each round.
        theirs: The other side's, of the same rounds.
        target: Where the ratio should be; None for what is only reported.
    """

    what: str
    against: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    target: Target | None

    @property
    def ratio(self) -> Spread:
        return ratio(self.ours, self.theirs)

    @property
    def met(self) -> bool | None:
        return None if self.target is None else self.target.met(self.ratio.median)

    def as_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "against": self.against,
            "unit": self.unit,
            "rounds": len(self.ours),
            "ours": asdict(Spread.of(self.ours)),
            "theirs": asdict(Spread.of(self.theirs)),
            "ratio": asdict(self.ratio),
            "target": None if self.target is None else str(self.target),
            "met": self.met,
            "samples": {"ours": list(self.ours), "theirs": list(self.theirs)},
        }
