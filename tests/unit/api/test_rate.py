"""How often somebody may ask."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpud.api.rate import PERIOD_S, Rates
from tests.unit.service import Clock


@pytest.fixture
def rates(monotonic: Clock) -> Rates:
    return Rates(monotonic=monotonic)


def test_a_minutes_worth_may_come_at_once(rates: Rates, monotonic: Clock) -> None:
    for _ in range(60):
        assert rates.take("a", 60) == 0
    assert rates.take("a", 60) == 1
    assert rates.take("b", 60) == 0, "everybody is counted alone"
    monotonic.advance(1)
    assert rates.take("a", 60) == 0, "what was not let in was not counted"
    assert rates.take("a", 60) == 1
    monotonic.advance(3600)
    for _ in range(60):
        assert rates.take("a", 60) == 0
    assert rates.take("a", 60) == 1, "a quiet hour is not saved up"


def test_what_is_given_back_may_be_asked_again(rates: Rates) -> None:
    for _ in range(10):
        assert rates.take("a", 10) == 0
    assert rates.take("a", 10) == 6
    rates.give_back("a", 10)
    assert rates.take("a", 10) == 0
    rates.give_back("never seen", 10)
    assert rates.take("never seen", 10) == 0


def test_the_longest_unseen_are_forgotten_first(monotonic: Clock) -> None:
    rates = Rates(most_keys=2, monotonic=monotonic)
    for key in ("a", "b", "a", "c"):
        for _ in range(5):
            assert rates.take(key, 10) == 0
    assert rates.take("a", 10) > 0
    assert [rates.take("c", 10) for _ in range(6)] == [0, 0, 0, 0, 0, 6]
    assert rates.take("b", 10) == 0


@given(
    per_minute=st.integers(10, 100), pauses_s=st.lists(st.floats(0, 20), min_size=1, max_size=200)
)
def test_nobody_gets_more_than_twice_the_limit_in_any_minute_nor_waits_in_vain(
    per_minute: int, pauses_s: list[float]
) -> None:
    clock = Clock(0.0)
    rates = Rates(monotonic=clock)
    let_in: list[float] = []
    for pause_s in pauses_s:
        clock.advance(pause_s)
        if wait_s := rates.take("a", per_minute):
            clock.advance(wait_s)
            assert rates.take("a", per_minute) == 0
        let_in.append(clock.now)
        recent = [at for at in let_in if clock.now - at < PERIOD_S]
        assert len(recent) <= 2 * per_minute


def test_it_is_cheap() -> None:
    rates = Rates()
    began = time.perf_counter()
    for _ in range(1000):
        rates.take("a", 1_000_000)
    assert (time.perf_counter() - began) / 1000 < 0.001, "a poll costs microseconds of it"
