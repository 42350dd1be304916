"""What is drawn: the charts of one or several runs as data, and each as an SVG that needs no script.

The page's script (page.js) draws the same data again, at the width of the window and over the axis that is asked for.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from regpt.evals.names import HEADLINES
from regpt.report.baselines import Baseline, loss_baselines, task_baselines
from regpt.report.history import SMALLEST, History, Series
from regpt.report.thin import OF_BUCKET, means, thin

BUCKETS, SMALL_BUCKETS = 800, 400  # about one for each column of pixels of a wide chart and of a small one
POINTS_IN_ALL = 60_000  # of all runs together; more runs get fewer points each, but never under
LEAST_BUCKETS = 50
WHOLE = 2**53  # below, a whole number stays as it is
DIGITS = 7  # of a value in the page: single precision has no more
GIB = 2**30
WIDTH, HEIGHT, SMALL_WIDTH, SMALL_HEIGHT = 960, 380, 470, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 44
LABEL_HEIGHT = 14
TICK_WIDTH = 95  # pixels for one label under the horizontal axis
FLAT = 1e-9  # a range so small beside its values is none
COLOURS = 8  # that page.css has
SECOND_COLOUR = 2  # where one run has two curves of a task
SHAPES = (None, "M-3,-3h6v6h-6z", "M0,-4L4,3H-4z", "M0,-4.4L4.4,0L0,4.4L-4.4,0z")  # None: a circle
BESIDE = {"hellaswag": "acc_norm_tokens"}
"""A second figure of a task, drawn where published ones of that kind, of build-nanogpt, llm.c and GPT-3, stand beside it."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    run: int
    """Index of its run."""
    name: str
    kind: str
    """`noisy`: one value a step, smoothed on demand. `sparse`: measured now and then, drawn with points."""
    colour: int
    series: Series
    error: Series | None = None
    """Standard errors of the same values."""
    scale: float = 1.0
    part: str = ""
    """Which of the curves that one run has in this chart, where it has several."""
    second: bool = False
    """Dotted: of the task's second figure."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture."""

    id: str
    title: str
    unit: str
    lines: list[Line]
    baselines: list[Baseline] = field(default_factory=list)
    wide: bool = False
    log: bool = False
    """Whether a logarithmic axis makes sense: values are above 0 as a rule; those that are not are left out there."""


def charts(histories: Sequence[History]) -> list[Chart]:
    """Every chart that the logs have numbers for."""
    several = len(histories) > 1
    loss = [
        Line(
            run=i,
            name=f"{h.label}: {what}" if several else what,
            kind=kind,
            colour=i % COLOURS if several else colour,
            series=h.series[name],
            part=what,
        )
        for i, h in enumerate(histories)
        for colour, (name, what, kind) in enumerate(
            (("loss", "training", "noisy"), ("val_loss", "validation", "sparse"))
        )
        if name in h.series
    ]
    made = [
        Chart(
            id="loss",
            title="Loss",
            unit="nats per token",
            lines=loss,
            baselines=loss_baselines(histories),
            wide=True,
            log=True,
        )
    ]
    if several:
        made.append(_one(histories, "val_bits_per_byte", "Validation", "bits per byte of text", "sparse"))
    made += [
        _one(histories, "lr", "Learning rate", "", "plain", log=True),
        _one(histories, "grad_norm", "Gradient norm", "before clipping", "noisy", log=True),
        _one(histories, "tokens_per_second", "Speed", "tokens a second", "noisy"),
        _one(histories, "mfu", "Model FLOPs utilisation", "% of the data sheet's", "noisy", scale=100.0),
        _one(histories, "memory_bytes", "Peak memory", "GiB", "plain", scale=1 / GIB),
    ]
    return [c for c in [*made, *_task_charts(histories)] if c.lines]


def _one(
    histories: Sequence[History],
    name: str,
    title: str,
    unit: str,
    kind: str,
    *,
    scale: float = 1.0,
    log: bool = False,
) -> Chart:
    """The chart of one number of every run."""
    several = len(histories) > 1
    lines = [
        Line(
            run=i,
            name=h.label if several else title.lower(),
            kind=kind,
            colour=i % COLOURS if several else int(kind == "sparse"),
            series=h.series[name],
            error=_error(h, name),
            scale=scale,
        )
        for i, h in enumerate(histories)
        if name in h.series
    ]
    return Chart(id=name, title=title, unit=unit, lines=lines, log=log)


def _error(history: History, name: str) -> Series | None:
    """The standard errors of a task's figure, where each of its values has one."""
    error = history.series.get(f"{name}_stderr")
    of_same_steps = error is not None and np.array_equal(error.step, history.series[name].step)
    return error if of_same_steps else None


def headline(task: str, figures: Iterable[str]) -> str | None:
    """Of a task's figures the one by which it is told; of a task that we do not know the first. None where there is none."""
    there = [f for f in figures if not f.endswith("_stderr")]
    usual = HEADLINES.get(task)
    return usual if usual in there else next(iter(there), None)


def _task_charts(histories: Sequence[History]) -> list[Chart]:
    """One chart a task, of the figure by which it is told, and of a second one that others have published."""
    figures: dict[str, dict[str, None]] = {}
    for name in (name for h in histories for name in h.series if "." in name):
        task, _, of_task = name.partition(".")
        figures.setdefault(task, {})[of_task] = None
    made = []
    for task, there in figures.items():
        if (figure := headline(task, there)) is None:
            continue
        rows = [h.rows[task] for h in histories if task in h.rows]
        counted = f", {min(rows):,} rows" if rows else ""
        chart = _one(histories, f"{task}.{figure}", task, f"{figure}{counted}", "sparse")
        chart.baselines.extend(task_baselines(histories, task, figure))
        second = BESIDE.get(task)
        if second in there and second != figure and (published := task_baselines(histories, task, second)):
            other = _one(histories, f"{task}.{second}", task, f"{figure} and {second}{counted}", "sparse")
            other.baselines.extend(published)
            chart = _both(chart, other, figure, second, histories)
        made.append(chart)
    return made


def _both(chart: Chart, other: Chart, figure: str, second: str, histories: Sequence[History]) -> Chart:
    """Two figures of a task in one chart, where every curve and every published figure says which it is."""
    lines = [_part(line, figure, histories) for line in chart.lines]
    for line in (_part(line, second, histories) for line in other.lines):
        lines.append(replace(line, second=True, colour=line.colour if len(histories) > 1 else SECOND_COLOUR))
    baselines = [replace(b, label=f"{b.label} {figure}") for b in chart.baselines]
    baselines += [replace(b, label=f"{b.label} {second}") for b in other.baselines]
    return replace(chart, unit=other.unit, lines=lines, baselines=baselines)


def _part(line: Line, figure: str, histories: Sequence[History]) -> Line:
    """The curve under its figure's name, where a chart has those of two figures."""
    label = histories[line.run].label
    return replace(line, part=figure, name=f"{label}: {figure}" if len(histories) > 1 else figure)


# --- as data -----------------------------------------------------------------------------------------------------------


def chart_data(histories: Sequence[History], drawn: Sequence[Chart]) -> dict[str, Any]:
    """What page.js draws, ready for JSON: a value that is not finite is null."""
    n_lines = sum(len(c.lines) for c in drawn)
    buckets = max(LEAST_BUCKETS, POINTS_IN_ALL // max(n_lines * OF_BUCKET, 1))
    return {
        "runs": [{"label": h.label, "flops_per_token": h.flops_per_token} for h in histories],
        "charts": [
            {
                "id": c.id,
                "title": c.title,
                "unit": c.unit,
                "wide": c.wide,
                "log": c.log,
                "baselines": [{"label": b.label, "value": b.value} for b in c.baselines],
                "lines": [
                    _line_data(line, min(buckets, BUCKETS if c.wide else SMALL_BUCKETS)) for line in c.lines
                ],
            }
            for c in drawn
        ],
    }


def _line_data(line: Line, buckets: int) -> dict[str, Any]:
    s, kept = line.series, thin(line.series.value, buckets)
    names = ("run", "name", "kind", "colour", "part", "second")
    data: dict[str, Any] = {name: getattr(line, name) for name in names}
    data |= {k: _rounded(getattr(s, k)[kept]) for k in ("step", "tokens", "time_s")}
    data["y"] = _rounded(s.value[kept] * line.scale)
    if line.error is not None:
        data["error"] = _rounded(line.error.value[kept] * line.scale)
    if len(kept) < len(s.value) and line.kind == "noisy":  # the mean of extremes is not the mean
        data["mean"] = {k: _rounded(means(getattr(s, k), buckets)) for k in ("step", "tokens", "time_s")}
        data["mean"]["y"] = _rounded(means(s.value, buckets) * line.scale)
    return data


def _rounded(values: np.typing.NDArray[np.float64]) -> list[float | int | None]:
    """Whole numbers as such, others to seven digits, None where not finite."""
    return [
        None
        if not math.isfinite(v)
        else int(v)
        if abs(v) < WHOLE and v == int(v)
        else float(f"{v:.{DIGITS}g}")
        for v in values.tolist()
    ]


# --- as SVG ------------------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from `low` to `high`, steps of 1, 2 or 5 times a power of ten: ticks(0, 60) = [0, 10, …, 60]."""
    span = high - low
    if _flat(low, high):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= about)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) if abs(step) > 1e-9 else i * step for i in range(first, last + 1)]


def _flat(low: float, high: float) -> bool:
    """Whether two numbers differ by nothing but rounding, or by too little to be divided."""
    return not high - low > max(FLAT * max(abs(low), abs(high)), SMALLEST)


def exponent(value: float) -> str:
    """A number with its power of ten: 3e15, 1.53e12."""
    mantissa, _, power = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}" if value else "0"


def said(value: float) -> str:
    """A number in few characters: 0.003, 4.26, 12K, 1.5M, 3e+15."""
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-3:
        return exponent(value)
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if size >= (unit if unit > 1e3 else 1e4):
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"


def labels(at: Sequence[float]) -> list[str]:
    """Ticks as one scale has them, all in the same unit and with the same digits: 0.0, 0.5, 1.0 or 0, 5K, 10K."""
    size = max((abs(t) for t in at), default=0.0)
    if len(at) < 2 or size >= 1e12 or size < 1e-3:
        return [said(t) for t in at]
    unit, letter = next((u for u in ((1e9, "B"), (1e6, "M"), (1e4, "K")) if size >= u[0]), (1.0, ""))
    unit = 1e3 if letter == "K" else unit
    digits = max(0, -math.floor(math.log10((at[1] - at[0]) / unit) + 1e-9))
    return [f"{t / unit:.{digits}f}{letter}" if t else "0" for t in at]


def svg(chart: Chart, data: dict[str, Any], end: float) -> str:
    """The chart over steps up to `end`, on a linear axis: what is seen where no script runs."""
    width, height = (WIDTH, HEIGHT) if chart.wide else (SMALL_WIDTH, SMALL_HEIGHT)
    lines = data["lines"]
    values = [
        v
        for line in lines
        for y, error in _with_errors(line)
        if y is not None
        for v in (y - error, y + error)
    ]
    values += [b.value for b in chart.baselines]
    low, high = min(values, default=0.0), max(values, default=1.0)
    # As in page.js.
    pad = (abs(high) * 0.05 if abs(high) > SMALLEST else 1.0) if _flat(low, high) else (high - low) * 0.05
    low, high = low - pad, high + pad

    def x_of(step: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * step / end

    def y_of(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(_aria(chart))}">',
        f'<text class="tick" x="{(LEFT + width - RIGHT) / 2}" y="{height - 6}" text-anchor="middle">steps</text>',
        *(_grid_y(y_of(t), width, text) for t, text in _labelled(ticks(low, high, 6))),
        *(
            _label_x(x_of(t), height, text)
            for t, text in _labelled(ticks(0, end, max(2, width // TICK_WIDTH)))
        ),
    ]
    for line in lines:
        points = [
            (x_of(s), y_of(y)) if y is not None else None
            for s, y in zip(line["step"], line["y"], strict=True)
        ]
        parts.append(_path(points, line))
        strokes = zip(line["step"], _with_errors(line), strict=True)
        parts += [
            _stroke(x_of(s), y_of(y - e), y_of(y + e), line) for s, (y, e) in strokes if y is not None and e
        ]
    of_baselines = [(b, y_of(b.value)) for b in sorted(chart.baselines, key=lambda b: b.value)]
    parts += [_baseline(y, width) for _, y in of_baselines]
    above = math.inf
    for b, y in of_baselines:  # the lowest first, each label over the one before
        above = min(y - 5, above - LABEL_HEIGHT)
        parts.append(_baseline_label(b, above))
    return "".join([*parts, "</svg>"])


def last_step(data: dict[str, Any]) -> float:
    """Where the horizontal axis of all charts ends."""
    return max((v for c in data["charts"] for line in c["lines"] for v in line["step"]), default=1) or 1


def _with_errors(line: dict[str, Any]) -> list[tuple[float | None, float]]:
    """Each value with its standard error, 0 where it has none."""
    errors = line.get("error") or [None] * len(line["y"])
    return [(y, error or 0.0) for y, error in zip(line["y"], errors, strict=True)]


def _stroke(x: float, low: float, high: float, line: dict[str, Any]) -> str:
    """One standard error to either side of a point."""
    style = f'style="stroke:var(--c{line["colour"]})"'
    return f'<line class="error" {style} x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def _labelled(at: list[float]) -> list[tuple[float, str]]:
    return list(zip(at, labels(at), strict=True))


def _aria(chart: Chart) -> str:
    names = ", ".join(line.name for line in chart.lines)
    return (
        f"{chart.title} ({chart.unit}) over steps: {names}"
        if chart.unit
        else f"{chart.title} over steps: {names}"
    )


def _grid_y(y: float, width: int, text: str) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _label_x(x: float, height: int, text: str) -> str:
    return f'<text class="tick" x="{x:.1f}" y="{height - 25}" text-anchor="middle">{text}</text>'


def _baseline(y: float, width: int) -> str:
    return f'<line class="baseline" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _baseline_label(b: Baseline, y: float) -> str:
    """At the left: losses come from above, scores from below, so it is free there."""
    return f'<text class="baseline-label" x="{LEFT + 6}" y="{y:.1f}">{html.escape(b.label)} {said(b.value)}</text>'


def marker(run: int, x: float, y: float) -> str:
    """A point of a curve: a shape for each run, so that not colour alone tells them apart."""
    shape = SHAPES[run % len(SHAPES)]
    if shape is None:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>'
    return f'<path class="marker" d="{shape}" transform="translate({x:.1f},{y:.1f})"/>'


def _path(points: Sequence[tuple[float, float] | None], line: dict[str, Any]) -> str:
    """A line through the points, broken where one is missing; sparse ones as dots too."""
    words, pen = [], "M"
    for p in points:
        if p is None:
            pen = "M"
        else:
            words.append(f"{pen}{p[0]:.1f},{p[1]:.1f}")
            pen = "L"
    style = f'style="stroke:var(--c{line["colour"]})"'
    dotted = " second" if line["second"] else ""
    drawn = f'<path class="line {line["kind"]}{dotted}" {style} d="{"".join(words)}"/>'
    if line["kind"] == "sparse":
        dots = "".join(marker(line["run"], *p) for p in points if p)
        drawn += f'<g style="fill:var(--c{line["colour"]})">{dots}</g>'
    return drawn
