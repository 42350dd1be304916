"""Figures with how far they can be trusted: a value, its standard error, and the interval that follows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from regpt.evals.chance import NORMAL_95, Interval, share_interval


@dataclass(frozen=True)
class Figure:
    """One number of an evaluation."""

    value: float
    stderr: float | None = None
    """Its standard error; None where none is known."""
    interval: Interval | None = None
    """Where it lies with 95 % confidence; None: nobody knows."""


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """What one task says of one model."""

    task: str
    figures: dict[str, Figure]
    headline: str
    """The figure that stands for the task."""
    rows: int
    """Questions, passages or pages that were scored; of a loss, its tokens."""
    seconds: float
    counted: str = "rows"
    """What `rows` are; the key in JSON."""
    cut: int = 0
    """Rows that did not fit into the model's context: the end of them was scored."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every figure, its standard error as NAME_stderr, that of the headline also as stderr."""
        values: dict[str, Any] = {name: figure.value for name, figure in self.figures.items()}
        values |= {f"{n}_stderr": f.stderr for n, f in self.figures.items() if f.stderr is not None}
        if (stderr := self.figures[self.headline].stderr) is not None:
            values["stderr"] = stderr
        values |= {self.counted: self.rows, "seconds": self.seconds}
        return values | ({"cut": self.cut} if self.cut else {})


def mean(values: Sequence[float]) -> Figure:
    """The mean; its standard error is the sample's standard deviation over the root of the count, as lm-eval's."""
    n = len(values)
    value = math.fsum(values) / n
    if n < 2:
        return Figure(value)
    stderr = math.sqrt(math.fsum((v - value) ** 2 for v in values) / (n - 1) / n)
    return with_interval(value, stderr)


def share(right: Sequence[float]) -> Figure:
    """The share of right answers (1; wrong ones are 0); `mean`'s standard error, and an interval that holds at 0 and 1 too."""
    figure = mean(right)
    return Figure(figure.value, figure.stderr, share_interval(figure.value, len(right)))


def ratio(above: Sequence[float], below: Sequence[float]) -> Figure:
    """sum(above) / sum(below) over rows that are drawn one by one; the standard error is that of a ratio estimator.

    Linearised (Cochran 1977, "Sampling Techniques", section 6.4): of what each row's share is off by.
    """
    n, total = len(above), math.fsum(below)
    value = math.fsum(above) / total
    if n < 2:
        return Figure(value)
    off = math.fsum((a - value * b) ** 2 for a, b in zip(above, below, strict=True))
    return with_interval(value, math.sqrt(off * n / (n - 1)) / total)


def with_interval(value: float, stderr: float) -> Figure:
    """A figure that is about normally distributed."""
    return Figure(value, stderr, (value - NORMAL_95 * stderr, value + NORMAL_95 * stderr))


def exponential(figure: Figure) -> Figure:
    """exp of a figure, such as a perplexity of a loss: its interval is exp of the interval, its standard error that of
    the straight line through it (delta method; lm-eval draws bootstrap samples instead)."""
    value = _exp(figure.value)
    if figure.stderr is None or figure.interval is None:
        return Figure(value)
    low, high = figure.interval
    return Figure(value, value * figure.stderr, (_exp(low), _exp(high)))


def scaled(figure: Figure, factor: float) -> Figure:
    """A positive multiple of a figure: other units."""
    if figure.stderr is None or figure.interval is None:
        return Figure(figure.value * factor)
    low, high = figure.interval
    return Figure(figure.value * factor, figure.stderr * factor, (low * factor, high * factor))


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond that no float
