"""What the benchmarks count, by hand-worked numbers: a wrong bound or exponent would look like a result."""

from __future__ import annotations

import pytest

from generation import Bound, ended, frequent_stops
from scaling import Curve, exponents


def test_exponents_of_a_power_and_of_a_bend():
    assert exponents([1, 4, 16, 64], [3, 24, 192, 1536]) == pytest.approx((1.5, 1.5))
    # Flat over the first decade, quadratic over the second: the line through (0, 0), (1, 0), (2, 2) has slope 1.
    assert exponents([1, 10, 100], [1, 1, 100]) == pytest.approx((1.0, 2.0))


def test_a_curve_that_bends_at_its_end_does_not_hold():
    assert Curve("", "", [1, 10, 100], [1, 1, 10], 1.0).holds
    assert not Curve("", "", [1, 10, 100], [1, 1, 20], 1.0).holds


BOUND = Bound(weights=100, cached=1, products=10, attention=1, memory=10, matrix=100)


@pytest.mark.parametrize(
    ("rows", "past", "seconds"),
    [(1, 0, 10.0), (2, 10, 11.0), (200, 0, 20.0), (200, 50, 20.5)],
    ids=["weights", "and caches", "products", "and attention"],
)
def test_a_step_is_bound_by_memory_or_by_products(rows, past, seconds):
    assert BOUND.step(rows, past) == seconds


def test_rows_that_have_ended_cost_nothing():
    # After prompts of 4: a step of two rows that hold 5 tokens each, then one of the longer row, which holds 6.
    assert BOUND.seconds([3, 2], 4, 2) == pytest.approx(11.0 + 10.6)
    assert BOUND.seconds([1, 1], 4, 2) == 0  # the prompt gives the first token


def test_the_window_of_a_stream_is_always_full():
    # Four rows of two steps each, 5 and then 6 tokens behind them: four steps of two rows and 11 tokens.
    assert BOUND.seconds([3, 3, 3, 3], 4, 2) == pytest.approx(4 * 11.1)


def test_frequent_tokens_stop_rows_as_long_as_the_mean_stays_up():
    rows = [[5, 6, 7, 8], [6, 5, 7, 7, 7, 8]]
    # 7 comes four times and leaves lengths 3 and 3. With 5 or 6 as well they would be 1 and 2, or 2 and 1.
    assert frequent_stops(rows, 3.0) == [7]
    # A mean of 4 has no room for 7, nor for 6 or 5; 8 takes nothing away.
    assert frequent_stops(rows, 4.0) == [8]
    assert [ended(row, {7}) for row in rows] == [3, 3]
    assert ended([1, 2], {7}) == 2
