"""What chance explains: where a share of right answers lies, and whether two figures differ by more than it.

At 95 % throughout. A share has Wilson's interval, which holds where no answer is right, or all are (Wilson 1927; Newcombe
1998, "Two-sided confidence intervals for the single proportion", method 3), and two shares are told apart by the interval of
their difference that is made of both (Newcombe 1998, "Interval estimation for the difference between independent
proportions", method 10). Perplexities are compared by their logarithms, which are means over rows. No torch here.
"""

from __future__ import annotations

import math

NORMAL_95 = 1.96  # standard errors on either side that hold 95 % of a normal distribution
Interval = tuple[float, float]


def share_interval(share: float, n: int) -> Interval:
    """Where the share of right answers lies of which `n` gave `share`."""
    z2 = NORMAL_95**2
    middle, reach = (
        2 * n * share + z2,
        NORMAL_95 * math.sqrt(z2 + 4 * n * share * (1 - share)),
    )
    low, high = (middle - reach) / (2 * (n + z2)), (middle + reach) / (2 * (n + z2))
    return (0.0 if share == 0 else max(low, 0.0), 1.0 if share == 1 else min(high, 1.0))


def share_difference(a: float, n_a: int, b: float, n_b: int) -> Interval:
    """Where the difference a - b lies of two shares, of n_a and of n_b answers."""
    (low_a, high_a), (low_b, high_b) = share_interval(a, n_a), share_interval(b, n_b)
    return (a - b - math.hypot(a - low_a, high_b - b), a - b + math.hypot(high_a - a, b - low_b))


def ratio_interval(a: float, error_a: float, b: float, error_b: float | None) -> Interval:
    """Where a / b lies of two perplexities with their standard errors; None: as large a part of b as error_a is of a."""
    of_log = math.hypot(error_a / a, error_a / a if error_b is None else error_b / b)
    middle = math.log(a / b)
    return math.exp(middle - NORMAL_95 * of_log), math.exp(min(middle + NORMAL_95 * of_log, 700.0))
