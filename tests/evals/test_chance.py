"""Intervals against the tables of the papers that they are from."""

from __future__ import annotations

import math

import pytest

from regpt.evals.chance import ratio_interval, share_difference, share_interval


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_one_share_is_newcombes_table(right: int, n: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, method 3."""
    assert share_interval(right / n, n) == pytest.approx((low, high), abs=6e-5)
    other = share_interval(1 - right / n, n)
    assert other == pytest.approx((1 - high, 1 - low), abs=6e-5)


@pytest.mark.parametrize(
    ("a", "n_a", "b", "n_b", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_two_shares_are_newcombes_table(a: int, n_a: int, b: int, n_b: int, low: float, high: float) -> None:
    """Newcombe 1998, table II, method 10."""
    assert share_difference(a / n_a, n_a, b / n_b, n_b) == pytest.approx((low, high), abs=6e-5)


def test_perplexities_are_compared_by_their_logarithms() -> None:
    """A wide error of a huge perplexity explains no small one."""
    low, high = ratio_interval(211_385.6, 186_163.5, 40.06, 1.48)
    assert 1 < 900 < low < high
    low, high = ratio_interval(42.0, 1.5, 40.0, 1.5)
    assert low < 1 < high
    middle = math.sqrt(low * high)
    assert middle == pytest.approx(42 / 40)
    assert ratio_interval(42.0, 4.2, 40.0, None) == pytest.approx(ratio_interval(42.0, 4.2, 40.0, 4.0))
