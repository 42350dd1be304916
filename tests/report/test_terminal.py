"""Plots in a terminal: what they show, and that nothing makes them wider, higher or wrong."""

from __future__ import annotations

import math
import re
import sys
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from regpt.report.terminal import (
    LEAST_HEIGHT,
    LEAST_WIDTH,
    MOST_POINTS,
    LossPlot,
    Series,
    Thinned,
    terminal_plot,
)

FALLING = [3.0, 2.5, 2.0, 1.5, 1.0]
ANY_FLOATS = st.lists(st.floats(), max_size=40)


def plot(y: Sequence[float], width: int = LEAST_WIDTH, height: int = LEAST_HEIGHT) -> str:
    return terminal_plot([Series(name="loss", x=range(len(y)), y=y)], width, height)


def test_a_falling_line() -> None:
    """Sixteen rows of dots, and every one of the 50 columns has its dot."""
    assert plot(FALLING).splitlines() == [
        "       ⠒ loss 1",
        "    3 │⠉⠒⠢⠤⣀⡀",
        "      │     ⠈⠉⠑⠒⠤⠤⢄⣀",
        "1.667 │             ⠉⠑⠒⠢⠤⣀⡀",
        "    1 │                   ⠈⠉⠒⠢⠤⣀",
        "      └─────────────────────────",
        "       0          step         4",
    ]


def test_without_unicode_and_with_marks() -> None:
    series = [
        Series(name="loss", x=range(5), y=FALLING),
        Series(name="val", x=[0, 4], y=[3.0, 1.0], marked=True),
    ]
    assert terminal_plot(series, LEAST_WIDTH, LEAST_HEIGHT, ascii_only=True).splitlines() == [
        "       . loss 1   o val 1",
        "    3 |o...",
        "      |    ............",
        "1.667 |                ......",
        "    1 |                      ..o",
        "      +-------------------------",
        "       0          step         4",
    ]


@pytest.mark.parametrize("y", [[], [math.nan], [math.inf, -math.inf, math.nan]])
def test_nothing_finite_is_nothing(y: list[float]) -> None:
    assert plot(y) == ""


@pytest.mark.parametrize(
    ("width", "height"), [(LEAST_WIDTH - 1, 20), (80, LEAST_HEIGHT - 1), (0, 0), (-5, 9)]
)
def test_no_room_is_nothing(width: int, height: int) -> None:
    assert plot(FALLING, width, height) == ""


@pytest.mark.parametrize("y", [[2.5], [2.5] * 300, [0.0, 0.0]])
def test_one_point_and_a_constant_stand_in_the_middle(y: list[float]) -> None:
    rows = plot(y, 40, 11).splitlines()[1:-2]
    drawn = [i for i, row in enumerate(rows) if re.search("[\u2801-\u28ff]", row)]
    assert len(drawn) == 1 and drawn[0] in (len(rows) // 2 - 1, len(rows) // 2)


def test_what_is_not_finite_is_left_out() -> None:
    with_gaps = Series(name="loss", x=range(7), y=[3.0, math.nan, 2.0, math.inf, 1.0, -math.inf, 0.5])
    without = Series(name="loss", x=[0, 2, 4, 6], y=[3.0, 2.0, 1.0, 0.5])
    assert terminal_plot([with_gaps], 60, 12) == terminal_plot([without], 60, 12)


def test_the_first_losses_do_not_flatten_the_rest() -> None:
    """A twentieth of the points may lie above the frame: here 5 of 100."""
    later = [3.0 - i / 100 for i in range(95)]
    top = plot([11.0, 9.0, 8.0, 6.0, 5.0, *later], 60, 12).splitlines()[1]
    assert top.split()[0] == "3"


@given(
    y=ANY_FLOATS,
    marks=ANY_FLOATS,
    width=st.integers(-1, 130),
    height=st.integers(-1, 40),
    ascii_only=st.booleans(),
)
def test_the_size_is_kept_whatever_is_drawn(
    y: list[float], marks: list[float], width: int, height: int, ascii_only: bool
) -> None:
    series = [
        Series(name="损失 loss", x=range(len(y)), y=y),
        Series(name="validation", x=[i * 1e307 for i in range(len(marks))], y=marks, marked=True),
    ]
    drawn = terminal_plot(series, width, height, ascii_only=ascii_only)
    lines = drawn.splitlines()
    assert all(cell_len(line) <= width for line in lines)
    seen = width >= LEAST_WIDTH and height >= LEAST_HEIGHT and any(map(math.isfinite, [*y, *marks]))
    assert len(lines) == (height if seen else 0)
    assert not ascii_only or drawn.replace("损失", "").isascii()


def test_a_thinned_curve_stays_small_and_true() -> None:
    """100,000 points of a line: the means of neighbours lie on it, and its ends are near."""
    curve = Thinned()
    for i in range(100_000):
        curve.add(i, 5 - i / 25_000)
    x, y = curve.points()
    assert MOST_POINTS / 2 <= len(x) <= MOST_POINTS + 1
    assert y == pytest.approx([5 - a / 25_000 for a in x])
    assert x[0] < 200 and x[-1] > 99_800
    assert x == sorted(x)


def test_few_points_are_not_thinned() -> None:
    curve = Thinned()
    for i in range(100):
        curve.add(i, math.nan if i % 2 else i)
    assert curve.points() == (list(range(0, 100, 2)), list(range(0, 100, 2)))


def test_a_run_that_was_rolled_back_makes_its_points_again() -> None:
    rolled_back, straight = Thinned(), Thinned()
    for i in range(10):
        rolled_back.add(i, 9.0)
    for curve in (rolled_back, straight):
        for i in range(4 if curve is rolled_back else 0, 12):
            curve.add(i, 1.0)
    assert rolled_back.points() == (list(range(12)), [9.0] * 4 + [1.0] * 8)


def test_a_frame_is_made_anew_only_where_something_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: object, **more: object) -> str:
        made.append(args)
        return "plot"

    monkeypatch.setattr("regpt.report.terminal.terminal_plot", counted)
    shown = LossPlot()
    shown.hear("step", 1, {"loss": 3.0})
    for width in (80, 80, 60, 60):
        assert shown.text(width, 12) == "plot"
    shown.hear("save", 1, {"path": "step-000001"})
    shown.text(60, 12)
    assert len(made) == 2
    shown.hear("eval", 1, {"val_loss": 3.0})
    shown.text(60, 12)
    assert len(made) == 3


def test_the_log_of_a_run_is_the_run_as_it_was_heard() -> None:
    heard, read = LossPlot(), LossPlot()
    events = [("step", i, {"loss": 4 - i / 50}) for i in range(1, 100)]
    events += [("eval", 50, {"val_loss": None}), ("eval", 99, {"val_loss": 2.5})]
    for event in events:
        heard.hear(*event)
    read.read({"event": event, "step": step, **values} for event, step, values in events)
    assert read.text(80, 12) == heard.text(80, 12) != ""


def test_frames_may_be_drawn_while_events_come() -> None:
    """rich asks from a thread of its own: what it meets is never half of a point."""
    plot, wrong = LossPlot(), []
    done = threading.Event()

    def draw() -> None:
        try:
            while not done.is_set():
                plot.text(60, 12)
        except Exception as e:
            wrong.append(e)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        drawing = threading.Thread(target=draw)
        drawing.start()
        for step in range(1, 20_000):
            plot.hear("step", step, {"loss": 3.0 + 1 / step})
        done.set()
        drawing.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


@pytest.mark.parametrize("loss", ["low", True, None, 10**400, float("nan"), [1.0]])
def test_what_is_no_number_is_passed_over(loss: object) -> None:
    plot = LossPlot()
    plot.read([{"event": "step", "step": 1, "loss": 2.0}, {"event": "step", "step": 2, "loss": loss}])
    plot.read([{"event": "step", "step": "3", "loss": 1.0}, {"event": "step", "loss": 1.0}])
    assert "training loss 2" in plot.text(60, 12)


def test_what_is_made_again_takes_the_place_of_what_was() -> None:
    """A run that was rolled back: evaluations of undone steps go with them."""
    plot = LossPlot()
    for step in (20, 40, 60):
        plot.hear("step", step, {"loss": 5.0})
        plot.hear("eval", step, {"val_loss": float(step)})
    assert "validation loss 60" in plot.text(80, 12)
    plot.hear("step", 41, {"loss": 4.0})
    assert "validation loss 40" in plot.text(80, 12) and "training loss 4" in plot.text(80, 12)
