"""Fewer points, the same picture: no extreme and no gap is lost."""

from __future__ import annotations

import numpy as np
import pytest

from regpt.report.thin import means, thin


def test_few_points_all_stay() -> None:
    assert thin(np.arange(40.0), 10).tolist() == list(range(40))


@pytest.mark.parametrize("n", [41, 99, 1000, 100_000])
def test_each_bucket_keeps_first_last_lowest_and_highest(n: int) -> None:
    y = np.random.default_rng(n).normal(size=n)
    kept, width = set(thin(y, 10).tolist()), -(-n // 10)
    assert len(kept) <= 40
    for start in range(0, n, width):
        bucket = y[start : start + width]
        wanted = {0, len(bucket) - 1, int(bucket.argmin()), int(bucket.argmax())}
        assert {start + i for i in wanted} <= kept


def test_a_line_through_the_kept_points_covers_the_same_pixels() -> None:
    """M4's theorem, for points at equal distances: in each column of pixels the same lowest, highest, first and last row."""
    y = np.cumsum(np.random.default_rng(0).normal(size=8000))
    kept = thin(y, 400)
    column, kept_column = np.arange(8000) // 20, kept // 20
    for c in range(400):
        whole, few = y[column == c], y[kept[kept_column == c]]
        assert (whole.min(), whole.max(), whole[0], whole[-1]) == (few.min(), few.max(), few[0], few[-1])


def test_a_gap_stays_a_gap() -> None:
    y = np.ones(1000)
    y[503] = np.nan
    y[700:800] = np.nan
    kept = thin(y, 10)
    assert 503 in kept and np.isnan(y[kept]).sum() > 1 and (np.diff(kept) > 0).all()


def test_means_of_buckets() -> None:
    y = np.arange(100.0)
    y[15] = np.nan
    y[90:] = np.nan
    ours = means(y, 10)
    assert ours[:9].tolist() == pytest.approx([np.nanmean(y[i * 10 : i * 10 + 10]) for i in range(9)])
    assert np.isnan(ours[9])
