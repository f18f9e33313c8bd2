"""How often somebody may ask: the generic cell rate algorithm (ITU-T I.371, annex A).

Per key it keeps one number, the moment at which everything asked so far would have been due at an even
pace. Nobody is refused while that lies less than a minute ahead, so a minute's worth may come at once.
One look costs some microseconds; GPU.ai's polls pay it each time.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Final

PERIOD_S: Final = 60.0
_MOST_KEYS: Final = 10_000
_ROUNDING_S: Final = 1e-6


class Rates:
    """Counts requests by key, each kind against its own limit.

    Args:
        most_keys: Of more, the longest unseen are forgotten.
        monotonic: Seconds that only go forward.
    """

    def __init__(
        self, most_keys: int = _MOST_KEYS, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._most_keys = most_keys
        self._monotonic = monotonic
        self._due_at: OrderedDict[Hashable, float] = OrderedDict()

    def take(self, key: Hashable, per_minute: int) -> int:
        """Count one request if it is within the limit.

        Returns:
            0, or, of one that is not, whole seconds until it would be.
        """
        now = self._monotonic()
        due_at = max(self._due_at.get(key, now), now) + PERIOD_S / per_minute
        over_s = due_at - now - PERIOD_S
        if over_s > _ROUNDING_S:
            return math.ceil(over_s)
        self._due_at[key] = due_at
        self._due_at.move_to_end(key)
        if len(self._due_at) > self._most_keys:
            self._due_at.popitem(last=False)
        return 0

    def give_back(self, key: Hashable, per_minute: int) -> None:
        """Count one request less, because it failed by no fault of the caller's."""
        if key in self._due_at:
            self._due_at[key] -= PERIOD_S / per_minute
