"""What is made of the samples of ``make bench``."""

from __future__ import annotations

import pytest

from tests.bench.row import FLAT_COST, FLAT_RATE, Row, Target
from tests.bench.stats import Spread, quantile, ratio


@pytest.mark.parametrize(
    ("samples", "share", "value"),
    [
        ([7], 0.99, 7),
        ([3, 1, 2], 0.5, 2),
        ([4, 1, 3, 2], 0.5, 2.5),
        ([1, 2, 3, 4, 5], 0.25, 2),
        ([1, 2], 0.25, 1.25),
        ([5, 1], 0, 1),
        ([5, 1], 1, 5),
    ],
)
def test_a_quantile_lies_between_the_samples_around_it(
    samples: list[float], share: float, value: float
) -> None:
    assert quantile(samples, share) == value


def test_nothing_is_made_of_no_samples() -> None:
    with pytest.raises(ValueError, match="no samples"):
        quantile([], 0.5)


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([9, 1, 5, 3, 7]) == Spread(median=5, low=3, high=7)


def test_a_ratio_holds_samples_of_one_round_against_each_other() -> None:
    # The second round met a busy machine, and both sides took ten times as long.
    assert ratio([1, 20, 3], [2, 40, 6]) == Spread(0.5, 0.5, 0.5)


def test_sides_of_unlike_length_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1, 2], [1])


def test_a_side_that_took_no_time_was_not_measured() -> None:
    with pytest.raises(ValueError, match="too little work"):
        ratio([1], [0])


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        (Target(1.3), 1.3, True),
        (Target(1.3), 1.31, False),
        (Target(0.7, at_least=True), 0.7, True),
        (Target(0.7, at_least=True), 0.69, False),
        (FLAT_COST, 0.5, True),
        (FLAT_COST, 1.11, False),
        (FLAT_RATE, 2, True),
        (FLAT_RATE, 0.89, False),
    ],
)
def test_a_target_is_a_bound_on_one_side(target: Target, value: float, met: bool) -> None:
    assert target.met(value) is met


def test_a_row_is_judged_by_the_median_of_its_ratios() -> None:
    row = Row("ours", "theirs", "s", [1, 2, 9], [2, 2, 2], Target(1))
    assert row.ratio.median == 1
    assert row.met is True
    assert row.as_json()["target"] == "≤ 1"


def test_a_row_without_a_target_is_only_reported() -> None:
    row = Row("p99", "p99", "ms", [3], [2], None)
    assert row.met is None
    assert row.as_json()["target"] is None


def test_a_target_reads_as_it_is_meant() -> None:
    assert [str(one) for one in (Target(1.05), FLAT_RATE)] == ["≤ 1.05", "≥ 0.9"]
