"""The tally of requests against prometheus_client's own counter and histogram."""

from __future__ import annotations

import random

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from gpud.tally import RequestTally

BOUNDS_S = (0.001, 0.25, 1, 10)


def test_its_page_is_the_one_that_prometheus_client_would_make() -> None:
    disable_created_metrics()  # type: ignore[no-untyped-call]  # as the daemon does
    theirs, ours = CollectorRegistry(), CollectorRegistry()
    requests = Counter(
        "gpud_api_requests", "API requests by route, method and status.",
        ["route", "method", "status"], registry=theirs,
    )  # fmt: skip
    seconds = Histogram(
        "gpud_api_request_seconds", "Time to answer an API request.",
        ["route"], buckets=BOUNDS_S, registry=theirs,
    )  # fmt: skip
    tally = RequestTally(BOUNDS_S)
    ours.register(tally)
    dice = random.Random(7)

    for _ in range(300):
        route, method, status = (
            dice.choice("ab"),
            dice.choice(["GET", "POST"]),
            dice.choice([200, 404]),
        )
        took_s = dice.choice([*BOUNDS_S, dice.expovariate(1)])
        tally.count(route, method, status, took_s)
        requests.labels(route, method, str(status)).inc()
        seconds.labels(route).observe(took_s)

    assert sorted(generate_latest(ours).splitlines()) == sorted(
        generate_latest(theirs).splitlines()
    )


def test_what_was_never_asked_has_no_series() -> None:
    registry = CollectorRegistry()
    registry.register(RequestTally(BOUNDS_S))

    page = generate_latest(registry).decode()

    assert [line for line in page.splitlines() if not line.startswith("#")] == []
