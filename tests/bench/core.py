"""What every family of measurements works with: turns, progress, a place for its files."""

from __future__ import annotations

import inspect
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

Side = Callable[[], float | Awaitable[float]]
"""Does the work once and returns the sample, in whatever unit its row says."""

_TELL_EVERY_S = 5.0


class OutOfTime(Exception):  # noqa: N818 - reads as what it is
    """The run's time is spent; what has not been measured is left out."""


@dataclass
class Bench:
    """One run.

    Attributes:
        directory: For state directories and images; QEMU's user gets to it.
        quick: Whether to make do with few rounds.
        ends_at: When the run has to end, by ``time.monotonic``; None for as long as it takes.
        console: Where progress is told.
    """

    directory: Path
    quick: bool
    ends_at: float | None
    console: Console

    def rounds(self, full: int, quick: int) -> int:
        """How many rounds to take."""
        return quick if self.quick else full

    @property
    def left_s(self) -> float | None:
        """How much time there is left; None for any amount."""
        return None if self.ends_at is None else self.ends_at - time.monotonic()

    @property
    def out_of_time(self) -> bool:
        return self.left_s is not None and self.left_s <= 0

    def say(self, text: str) -> None:
        """Tell how it is going."""
        self.console.print(f"[dim]{time.strftime('%H:%M:%S')}[/] {text}", highlight=False)

    async def take_turns(self, title: str, rounds: int, *sides: Side) -> list[tuple[float, ...]]:
        """Let every side do its work in every round; returns the samples of each side.

        The order is turned around from round to round, so that none is always the first. In a run
        that has to end, no round is begun that would not fit in, judged by the longest so far.
        """
        taken: list[tuple[float, ...]] = []
        longest_s, told_at = 0.0, 0.0
        for number in range(rounds):
            if self.left_s is not None and self.left_s < longest_s:
                break
            began = time.monotonic()
            if began - told_at >= _TELL_EVERY_S:
                self.say(f"{title}: round {number + 1} of {rounds}")
                told_at = began
            samples: dict[int, float] = {}
            numbered = list(enumerate(sides))
            for which, side in numbered if number % 2 == 0 else reversed(numbered):
                sample = side()
                samples[which] = await sample if inspect.isawaitable(sample) else sample
            taken.append(tuple(samples[which] for which in range(len(sides))))
            longest_s = max(longest_s, time.monotonic() - began)
        if not taken:
            raise OutOfTime
        return list(zip(*taken, strict=True))
