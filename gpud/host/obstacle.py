"""What an obstacle to a hand-over is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that forbids handing a card over.

    Attributes:
        what: What is wrong, in plain words.
        mend: What to do about it; empty where there is nothing to be done.
        users: The processes that it consists of: ``process PID (NAME)``.
    """

    what: str
    mend: str = ""
    users: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.what}: {self.mend}" if self.mend else self.what
