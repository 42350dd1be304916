"""Curves in a terminal: dots of braille in its cells, or plain ASCII, never wider or higher than asked for.

On `rich`, which the bar is made of already, and no plotting library: plotext, the widest kept one, draws one figure that its
module holds, from all points again each time. Here a curve is thinned while it grows, so that a frame of a long run costs
no more than one of a short run, and whoever draws says how large it is.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

LEAST_WIDTH, LEAST_HEIGHT = 32, 7  # cells: below, a plot says nothing
MOST_POINTS = 512  # of a growing curve: more than the dots in the width of a terminal
ABOVE_SHARE = (
    0.05  # of a curve's points may lie above the frame: the first losses would flatten all later ones
)
LARGEST = 1e300  # sums of such values are still finite
LIVE_HEIGHT = 14
LIVE_SHARE = 0.5  # of a terminal's height at most: the rest is for what is said meanwhile
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # of a braille cell, by column and row
BRAILLE = 0x2800


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve. Points that are not finite are left out."""

    name: str
    x: Sequence[float]
    """Rising."""
    y: Sequence[float]
    marked: bool = False
    """Each point is a mark over all lines, instead of a line through them: for few points."""


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """What part of the plane is seen, in how many cells."""

    low: float
    high: float
    left: float
    right: float
    columns: int
    rows: int

    def across(self, x: float, cells: int) -> int:
        """The place of x among `cells` places from left to right."""
        return _place((x - self.left) / (self.right - self.left), cells)

    def down(self, y: float, cells: int) -> int:
        """The place of y among `cells` places from the top; what is outside is at the edge."""
        return cells - 1 - _place((y - self.low) / (self.high - self.low), cells)


def terminal_plot(
    series: Sequence[Series], width: int, height: int, *, x_name: str = "step", ascii_only: bool = False
) -> str:
    """The curves with a legend and the ends of both axes, as at most `height` lines of at most `width` cells.

    The highest points of a curve, a twentieth of them, may lie above the frame, and are drawn at its edge.

    Args:
        x_name: what is counted from left to right.
        ascii_only: no other characters.

    Returns:
        Lines without colours; "" where there is nothing to show, or no room for it.
    """
    curves = [(s, _finite(s)) for s in series]
    curves = [(s, points) for s, points in curves if points]
    if not curves or width < LEAST_WIDTH or height < LEAST_HEIGHT:
        return ""
    low, high = _range([[y for _, y in points] for _, points in curves])
    xs = [x for _, points in curves for x, _ in points]
    left, right = min(xs), max(xs)
    at = (0, (height - 3) // 2, height - 4)  # rows that have a label
    labels = [_short(high - (high - low) * (row / at[-1])) for row in at]
    margin = max(len(label) for label in labels)
    frame = _Frame(
        low=low,
        high=high,
        left=left,
        right=right if right > left else left + max(1.0, abs(left) / 2),
        columns=width - margin - 2,
        rows=height - 3,
    )
    cells = [[" "] * frame.columns for _ in range(frame.rows)]
    _draw_lines([p for s, p in curves if not s.marked], frame, cells, ascii_only=ascii_only)
    line, mark = _signs(ascii_only)
    for s, points in curves:
        for x, y in points if s.marked else []:
            cells[frame.down(y, frame.rows)][frame.across(x, frame.columns)] = mark
    beside = dict(zip(at, labels, strict=True))
    bar, corner, floor = "|+-" if ascii_only else "│└─"
    legend = "   ".join(f"{mark if s.marked else line} {s.name} {_short(p[-1][1])}" for s, p in curves)
    lines = [_fitted(" " * (margin + 2) + legend, width)]
    lines += [f"{beside.get(i, ''):>{margin}} {bar}{''.join(row)}".rstrip() for i, row in enumerate(cells)]
    lines.append(" " * (margin + 1) + corner + floor * frame.columns)
    lines.append(" " * (margin + 2) + _ends(_whole(left), x_name, _whole(right), frame.columns))
    return "\n".join(lines)


class Thinned:
    """A curve that grows, in at most MOST_POINTS points: when it is full, every two neighbours become their mean."""

    def __init__(self) -> None:
        self.x: list[float] = []
        self.y: list[float] = []
        self._each = 1  # points given for one that is kept
        self._begun: list[tuple[float, float]] = []  # given, and not kept yet

    def cut(self, x: float) -> None:
        """Forget what lies at x and beyond."""
        if self.x and x <= self.x[-1]:
            kept = next(i for i, old in enumerate(self.x) if old >= x)
            del self.x[kept:], self.y[kept:]
            self._begun = []
        self._begun = [point for point in self._begun if point[0] < x]

    def add(self, x: float, y: object) -> None:
        """One point. One that lies before others takes their place: a run that was rolled back makes them again.

        What is no number, of a log that somebody edited, is passed over.
        """
        if not is_number(y):
            return
        self.cut(x)
        self._begun.append((x, max(-LARGEST, min(y, LARGEST))))
        if len(self._begun) < self._each:
            return
        self.x.append(sum(a for a, _ in self._begun) / len(self._begun))
        self.y.append(sum(b for _, b in self._begun) / len(self._begun))
        self._begun = []
        if len(self.x) >= MOST_POINTS:
            self.x, self.y = _halved(self.x), _halved(self.y)
            self._each *= 2

    def points(self) -> tuple[list[float], list[float]]:
        """x and y, of the last points too."""
        last = [(sum(p) / len(p)) for p in zip(*self._begun, strict=True)]
        return (self.x + last[:1], self.y + last[1:])


class LossPlot:
    """The training loss as a line and each validation loss as a mark: what `rich` draws over the bar of a run.

    A frame is made anew only where the curves or the terminal have changed. Events come from one thread, frames are asked for
    by another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._training, self._validation = Thinned(), Thinned()
        self._changes = 0
        self._last: tuple[object, str] = (None, "")

    def hear(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One event of a run, as it happens or from its log."""
        with self._lock:
            if event == "step":
                self._training.add(step, values.get("loss"))
                self._validation.cut(step)  # of a run that was rolled back: evaluated again
            elif event == "eval":
                self._validation.add(step, values.get("val_loss"))
            else:
                return
            self._changes += 1

    def read(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """The lines of a run's log."""
        for entry in entries:
            if is_number(entry.get("step")):
                self.hear(str(entry.get("event")), entry["step"], entry)

    def text(self, width: int, height: int, *, ascii_only: bool = False) -> str:
        """As `terminal_plot`."""
        with self._lock:
            asked = (width, height, ascii_only, self._changes)
            both = (("training loss", self._training, False), ("validation loss", self._validation, True))
            points = [(name, *curve.points(), marked) for name, curve, marked in both]
        if self._last[0] != asked:
            series = [Series(name=name, x=x, y=y, marked=marked) for name, x, y, marked in points]
            self._last = (asked, terminal_plot(series, width, height, ascii_only=ascii_only))
        return self._last[1]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The plot in the size that the terminal has now; the line is faint, marks and their legend are not."""
        from rich.text import Text

        height = min(LIVE_HEIGHT, int(console.height * LIVE_SHARE))
        plain = self.text(options.max_width, height, ascii_only=options.ascii_only)
        if plain:
            text = Text(plain, no_wrap=True, overflow="crop")
            text.highlight_regex("[\u2801-\u28ff]+", "dim cyan")
            text.highlight_regex("◆( [a-z ]*[0-9.e+-]+)?", "bold green")
            yield text


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one that can be drawn."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value))
    )


def _finite(s: Series) -> list[tuple[float, float]]:
    """Its points, within what can be added up."""
    return [
        (max(-LARGEST, min(float(x), LARGEST)), max(-LARGEST, min(float(y), LARGEST)))
        for x, y in zip(s.x, s.y, strict=True)
        if math.isfinite(x) and math.isfinite(y)
    ]


def _range(curves: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The frame's lower and upper end: of all curves, but for the highest points of each."""
    low = min(min(ys) for ys in curves)
    high = max(sorted(ys)[-1 - int(ABOVE_SHARE * len(ys))] for ys in curves)
    if high > low:
        return low, high
    around = abs(low) / 20 or 1.0
    return low - around, high + around


def _draw_lines(
    lines: Iterable[Sequence[tuple[float, float]]], frame: _Frame, cells: list[list[str]], *, ascii_only: bool
) -> None:
    """Each line through the means of its points in one column of dots."""
    across, down = (1, 1) if ascii_only else (2, 4)
    columns, rows = frame.columns * across, frame.rows * down
    dots: dict[tuple[int, int], int] = {}
    for points in lines:
        sums: dict[int, tuple[float, int]] = {}
        for x, y in points:
            column = frame.across(x, columns)
            total, n = sums.get(column, (0.0, 0))
            sums[column] = total + y, n + 1
        path = [(column, frame.down(total / n, rows)) for column, (total, n) in sorted(sums.items())]
        for column, row in _joined(path):
            cell = (row // down, column // across)
            dots[cell] = dots.get(cell, 0) | DOTS[column % across][row % down]
    for (row, column), bits in dots.items():
        cells[row][column] = _signs(ascii_only)[0] if ascii_only else chr(BRAILLE + bits)


def _joined(path: Sequence[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Every dot of the straight lines from each to the next."""
    yield from path[:1]
    for (a, b), (c, d) in itertools.pairwise(path):
        n = max(c - a, abs(d - b))
        yield from ((a + round(i * (c - a) / n), b + round(i * (d - b) / n)) for i in range(1, n + 1))


def _signs(ascii_only: bool) -> tuple[str, str]:
    """Of a line and of a mark."""
    return (".", "o") if ascii_only else ("⠒", "◆")


def _place(share: float, cells: int) -> int:
    return max(0, min(round(share * (cells - 1)), cells - 1))


def _halved(values: Sequence[float]) -> list[float]:
    return [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]


def _short(value: float) -> str:
    """A number in few characters: 3.281, 0.0006, 1.2e+08."""
    return f"{value:.4g}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3g}"


def _ends(left: str, middle: str, right: str, width: int) -> str:
    """Three words at the beginning, middle and end of a line; the middle one only where there is room."""
    space = width - len(left) - len(right)
    if space < len(middle) + 2:
        return f"{left} {right}"[:width]
    return left + middle.center(space) + right


def _fitted(text: str, width: int) -> str:
    """The text in at most `width` cells: a name may hold characters that take two."""
    from rich.cells import cell_len, set_cell_size

    return text if cell_len(text) <= width else set_cell_size(text, width)
