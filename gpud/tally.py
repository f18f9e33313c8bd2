"""The API's requests, counted cheaply: GPU.ai polls, and each poll pays for the counting.

A ``prometheus_client`` histogram takes a lock and walks its buckets at every request; here that is left
to the scrape, and a request costs two additions. Not for threads: the event loop's only.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import inf

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class RequestTally(Collector):
    """Requests by route, method and status, and how long they took by route.

    Args:
        bounds_s: Upper bounds of the buckets of times, in seconds, rising.
    """

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = (*bounds_s, inf)
        self._answers: defaultdict[tuple[str, str, int], list[int]] = defaultdict(self._no_answers)
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def count(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request; all but the seconds must be from closed sets."""
        self._answers[route, method, status][bisect_left(self._bounds_s, seconds)] += 1
        self._seconds[route] += seconds

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily]:
        """What was counted so far; the registry asks this."""
        requests = CounterMetricFamily(
            "gpud_api_requests", "API requests by route, method and status.",
            labels=["route", "method", "status"],
        )  # fmt: skip
        of_route: defaultdict[str, list[int]] = defaultdict(self._no_answers)
        for (route, method, status), answers in self._answers.items():
            requests.add_metric([route, method, str(status)], sum(answers))
            of_route[route] = [a + b for a, b in zip(of_route[route], answers, strict=True)]
        yield requests
        seconds = HistogramMetricFamily(
            "gpud_api_request_seconds", "Time to answer an API request.", labels=["route"]
        )
        bounds = [floatToGoString(bound) for bound in self._bounds_s]  # type: ignore[no-untyped-call]
        for route, answers in of_route.items():
            buckets = list(zip(bounds, accumulate(answers), strict=True))
            seconds.add_metric([route], buckets, self._seconds[route])
        yield seconds

    def _no_answers(self) -> list[int]:
        return [0] * len(self._bounds_s)
