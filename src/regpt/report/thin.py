"""Fewer points that draw the same picture: of each bucket the first, the last, the lowest and the highest.

After M4 of Jugel, Jerzak, Hackenbroich and Markl, "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 7(10),
2014. Its buckets are equally wide in x; with one for each column of pixels the line that is drawn is, to the pixel, the line
through every point. Here they hold equally many points, so that one choice serves every axis. Over steps, which are logged
at equal distances, that is the same; over another axis no extreme is lost, but a line may run differently inside a column.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OF_BUCKET = 4  # points that one bucket keeps: first, last, lowest, highest


def _rows(y: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
    """`y` as one row a bucket, the last ones filled with NaN."""
    width = -(-len(y) // buckets)
    padded = np.full(buckets * width, np.nan)
    padded[: len(y)] = y
    return padded.reshape(buckets, width)


def thin(y: NDArray[np.float64], buckets: int) -> NDArray[np.intp]:
    """Which points to draw, in order: all of them where they are few.

    Args:
        y: [n] float64, NaN where there is a gap; one NaN of each bucket stays, so a gap stays a gap.
        buckets: groups of neighbours; at most five points of each are kept.
    """
    if len(y) <= OF_BUCKET * buckets:
        return np.arange(len(y))
    rows = _rows(y, buckets)
    width = rows.shape[1]
    start = np.arange(buckets) * width
    gap = np.isnan(rows)
    kept = [
        start,
        np.minimum(start + width, len(y)) - 1,
        start + np.where(gap, np.inf, rows).argmin(axis=1),
        start + np.where(gap, -np.inf, rows).argmax(axis=1),
        (start + gap.argmax(axis=1))[gap.any(axis=1)],
    ]
    indices = np.unique(np.concatenate(kept))
    return indices[indices < len(y)]


def means(y: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
    """[buckets] the mean of each bucket, NaN where it has no number: what a smoothed line is drawn from."""
    rows = _rows(y, buckets)
    there = ~np.isnan(rows)
    count = there.sum(axis=1)
    found = np.full(buckets, np.nan)
    np.divide(np.where(there, rows, 0.0).sum(axis=1), count, out=found, where=count > 0)
    return found
