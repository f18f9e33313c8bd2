"""How long the kernel is given for each of its acts, and the waiting for what comes after them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """How long the kernel is given, in seconds.

    Attributes:
        write_s: For writes and reads that take no time unless the function is stuck.
        driver_s: For a driver to let go of a function or to take it, while it is asked to.
        settle_s: For a driver to show up afterwards (audio and USB may be slow), and for a function to
            answer after its reset.
        reset_s: For a reset; the kernel itself waits 60 s for a device to come back.
    """

    write_s: float = 5
    driver_s: float = 45
    settle_s: float = 5
    reset_s: float = 75


DEFAULT_LIMITS: Final = Limits()


class Patience:
    """Waits for what happens by itself.

    Args:
        sleep: Waits for seconds.
        clock: Seconds that only go forward.
    """

    def __init__(
        self, sleep: Callable[[float], Awaitable[None]], clock: Callable[[], float]
    ) -> None:
        self._sleep = sleep
        self._clock = clock

    async def until(self, condition: Callable[[], Awaitable[bool]], limit_s: float) -> bool:
        """Ask again and again until ``condition`` holds; False when it takes longer than ``limit_s``."""
        end = self._clock() + limit_s
        while not await condition():
            if self._clock() >= end:
                return False
            await self._sleep(_POLL_S)
        return True
