"""The page in a real browser: it draws, answers, fits, prints, and asks for nothing."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from logs import evaluation, extreme_run, steps, write_run

from regpt.config import load_preset
from regpt.report.history import read_histories
from regpt.report.page import page
from regpt.report.serve import Server

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOSS = '[data-plot="loss"]'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if executable is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=executable, args=["--no-sandbox"] if as_root else [])
        yield chromium
        chromium.close()


@dataclass
class Shown:
    """A page in the browser, and what it complained of or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def d(self, selector: str = f"{LOSS} path.line") -> str:
        """The first curve's path."""
        return str(self.page.get_attribute(selector, "d"))

    def tick_texts(self) -> list[str]:
        return [t.strip() for t in self.page.locator(f"{LOSS} .tick").all_text_contents()]

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened = []

    def open_page(*runs: Path, url: str | None = None, **options: Any) -> Shown:
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 900}, **options})
        opened.append(context)
        shown = Shown(context.new_page())
        shown.page.on("console", lambda m: shown.complaints.append(m.text))
        shown.page.on("pageerror", lambda e: shown.complaints.append(str(e)))
        shown.page.on("request", lambda r: shown.requests.append(r.url))
        if url is None:
            file = tmp_path / "shown.html"
            file.write_text(page(read_histories(runs, may_be_empty=True)), encoding="utf-8")
            url = file.as_uri()
        shown.page.goto(url)
        return shown

    yield open_page
    for context in opened:
        context.close()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sample = {"event": "sample", "step": 20, "prompt": "To be", "text": ", or\nnot </pre><b>to be</b>"}
    lines = [*steps(40), *(evaluation(s, 7 / s**0.5) for s in (10, 20, 30, 40))]
    lines[7]["loss"] = 9.0  # for smoothing to smooth
    return write_run(tmp_path / "a", lines, samples=[sample], total_steps=40)


def test_it_draws_without_a_complaint_or_a_request(show: Any, run: Path) -> None:
    shown = show(run)
    assert shown.complaints == [] and [u.partition(":")[0] for u in shown.requests] == ["file"]
    assert shown.page.locator(f"{LOSS} path.line").count() == 2
    assert shown.page.locator(f"{LOSS} circle").count() == 4
    assert shown.d().count("L") == 39
    assert shown.page.inner_text(".sample pre") == "To be, or\nnot </pre><b>to be</b>"
    assert shown.page.title() == "a · regpt"


def test_without_scripts_the_curves_stand(show: Any, run: Path) -> None:
    shown = show(run, java_script_enabled=False)
    assert shown.page.locator(f"{LOSS} path.line").count() == 2
    assert not shown.page.locator("#controls").is_visible()


def test_with_and_without_scripts_the_scales_say_the_same(show: Any, tmp_path: Path) -> None:
    """Two programs draw the same charts, so they are held against each other, at the width that has no script."""
    lines = [*steps(70), *(evaluation(s, 7 / s**0.5) for s in (35, 70))]
    for i, line in enumerate(lines[:70]):
        line |= {
            "lr": 6e-5 * i,
            "grad_norm": 1e5 / (i + 1),
            "tokens_per_second": 123_456.0 + i,
            "mfu": 0.3 + i / 1e6,
        }
    scored = {
        "event": "tasks",
        "step": 70,
        "hellaswag": {"acc_norm": 0.3, "acc_norm_tokens": 0.29, "rows": 10_042},
    }
    scored["hellaswag"] |= {"acc_norm_stderr": 0.02, "acc_norm_tokens_stderr": 0.01}
    lines.append(evaluation(83, 0.5))  # the charts end together, where the longest of all curves does
    run = write_run(
        tmp_path / "a", [*lines, scored], total_steps=83, config=load_preset("gpt2-124m-fineweb-edu").config
    )
    viewport = {"width": 1026, "height": 900}
    scripted, plain = (show(run, viewport=viewport, java_script_enabled=on) for on in (True, False))
    assert scripted.page.locator(LOSS).bounding_box()["width"] == 960
    plots = [p.get_attribute("data-plot") for p in scripted.page.locator(".plot").all()]
    assert len(plots) >= 6
    for plot in plots:
        theirs, ours = (s.page.locator(f'[data-plot="{plot}"]') for s in (scripted, plain))
        for what in (".tick", ".baseline-label"):
            said = sorted(theirs.locator(what).all_text_contents())
            assert said == sorted(ours.locator(what).all_text_contents()), plot
        for drawn in ("path.line", "line.error", "circle"):
            assert theirs.locator(drawn).count() == ours.locator(drawn).count(), (plot, drawn)


def test_published_figures_are_drawn(show: Any, tmp_path: Path) -> None:
    config = load_preset("gpt2-124m-fineweb-edu").config
    run = write_run(tmp_path / "a", [*steps(3), evaluation(3, 4.0)], config=config)
    for scripts in (True, False):
        shown = show(run, java_script_enabled=scripts)
        assert shown.page.locator(f"{LOSS} line.baseline").count() >= 1
        assert "GPT-2 124M 3.292" in shown.page.locator(f"{LOSS} .baseline-label").all_text_contents()


def test_a_second_figure_can_be_told_apart_and_hidden(show: Any, tmp_path: Path) -> None:
    scored = {
        "event": "tasks",
        "step": 3,
        "hellaswag": {"acc_norm": 0.3, "acc_norm_tokens": 0.29, "rows": 10_042},
    }
    shown = show(write_run(tmp_path / "a", [*steps(3), scored]))
    chart = '[data-plot="hellaswag.acc_norm"]'
    assert shown.page.locator(f"{chart} path.line").count() == 2
    assert shown.page.locator(f"{chart} path.second").count() == 1
    shown.page.click('[data-toggle="line:hellaswag.acc_norm:acc_norm_tokens"]')
    assert shown.page.locator(f"{chart} path.second").count() == 0
    assert shown.page.locator(f"{chart} path.line").count() == 1 and shown.complaints == []


def test_the_axis_changes_what_is_drawn(show: Any, run: Path) -> None:
    shown = show(run)
    at_y = ["2", "4", "6", "8"]
    assert shown.tick_texts() == [*at_y, "0", "5", "10", "15", "20", "25", "30", "35", "40", "steps"]
    whole = shown.d()
    for axis, name, at_x in (
        ("tokens", "tokens", ["0", "10K", "20K", "30K", "40K", "50K", "60K", "70K", "80K"]),
        ("time_s", "training time, seconds", ["0", "10", "20", "30", "40", "50", "60", "70", "80"]),
        ("flops", "FLOPs", ["0", "1e7", "2e7", "3e7", "4e7", "5e7", "6e7", "7e7", "8e7"]),
    ):
        shown.page.click(f"[data-axis={axis}]")
        assert shown.tick_texts() == [*at_y, *at_x, name]
        assert shown.d() == whole  # of these logs every axis is a multiple of the steps
        assert shown.page.get_attribute(f"[data-axis={axis}]", "aria-pressed") == "true"
    assert shown.complaints == []


def test_smoothing_and_the_logarithm_change_the_path(show: Any, run: Path) -> None:
    shown = show(run)
    plain = shown.d()
    shown.page.check("#log")
    assert shown.d() != plain
    shown.page.uncheck("#log")
    assert shown.d() == plain
    shown.page.locator("#smooth").fill("40")
    assert shown.page.inner_text("#smooth-said") == "half-life 4 %"
    smooth = shown.d(f"{LOSS} path.smooth")
    assert shown.d(f"{LOSS} path.raw") == plain and smooth != plain and smooth.count("L") == 39
    assert shown.complaints == []
    shown.page.locator("#smooth").fill("0")
    assert shown.page.locator(f"{LOSS} path.smooth").count() == 0


def test_the_smoothed_curve_is_the_average_that_it_says(show: Any, tmp_path: Path) -> None:
    """A second path: the explicit sum over all points, each weighing as much as the steps that it stands for."""
    lines = [line for line in steps(3000) if line["step"] % 10 == 0 or line["step"] < 40]  # closer at first
    for line in lines:
        line["loss"] = 3 + 8 / (1 + line["step"] / 50)
    lines[20]["loss"] = None
    shown = show(write_run(tmp_path / "a", lines))
    shown.page.locator("#smooth").fill("100")
    half_life = 0.25 * 3000
    known = [(line["step"], line["loss"]) for line in lines if line["loss"] is not None]
    at, values = [s for s, _ in known], [y for _, y in known]
    spacing = [at[1] - at[0], *(b - a for a, b in itertools.pairwise(at))]
    box = shown.page.locator(LOSS).bounding_box()
    for step in (1, 10, 750, 3000):
        upto = at.index(step) + 1
        weights = [
            0.5 ** ((step - s) / half_life) * (1 - 0.5 ** (d / half_life))
            for s, d in zip(at[:upto], spacing, strict=False)
        ]
        expected = sum(w * y for w, y in zip(weights, values, strict=False)) / sum(weights)
        x = 58 + (box["width"] - 58 - 14) * step / 3000
        shown.page.mouse.move(box["x"] + x, box["y"] + 60)
        tip = shown.page.inner_text(f"{LOSS} .tip")
        assert f"training {float(f'{expected:.4g}'):g}" in tip, (step, tip)


def test_a_value_can_be_read_by_mouse_and_by_keys(show: Any, run: Path) -> None:
    shown = show(run)
    box = shown.page.locator(LOSS).bounding_box()
    shown.page.mouse.move(box["x"] + box["width"] - 16, box["y"] + 100)
    tip = shown.page.inner_text(f"{LOSS} .tip")
    assert "steps" in tip and "training 0.9487" in tip and "validation 1.107 at step 40" in tip
    shown.page.mouse.move(1, 1)
    assert not shown.page.locator(f"{LOSS} .tip").is_visible()
    shown.page.focus(LOSS)
    shown.page.keyboard.press("ArrowRight")
    assert "training" in shown.page.inner_text(f"{LOSS} .tip")


def test_a_part_can_be_enlarged(show: Any, run: Path) -> None:
    shown = show(run)
    whole = shown.d()
    box = shown.page.locator(LOSS).bounding_box()
    shown.page.mouse.move(box["x"] + 300, box["y"] + 100)
    shown.page.mouse.down()
    shown.page.mouse.move(box["x"] + 500, box["y"] + 100)
    shown.page.mouse.up()
    assert shown.d() != whole and shown.d().count("L") < 20 and "40" not in shown.tick_texts()
    shown.page.click("#zoom-out")
    assert shown.d() == whole and not shown.page.locator("#zoom-out").is_visible()
    assert shown.complaints == []


def test_a_score_has_its_standard_error(show: Any, tmp_path: Path) -> None:
    scored = {"event": "tasks", "step": 3, "hellaswag": {"acc": 0.25, "acc_stderr": 0.01, "rows": 1875}}
    shown = show(write_run(tmp_path / "a", [*steps(3), scored]))
    plot = shown.page.locator('[data-plot="hellaswag.acc"]')
    assert plot.locator(".error").count() == 1
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    shown.page.mouse.move(box["x"] + 200, box["y"] + 60)
    assert "hellaswag 0.25 ± 0.01 at step 3" in plot.inner_text()
    assert "acc, 1,875 rows" in shown.page.inner_text("#charts")
    assert shown.complaints == []


def test_the_legend_hides_curves(show: Any, tmp_path: Path, run: Path) -> None:
    other = write_run(tmp_path / "b", [*steps(30, loss=5.0), evaluation(30, 3.0)])
    shown = show(run, other)
    assert shown.page.locator(f"{LOSS} path.line").count() == 4
    shown.page.click('[data-toggle="run:1"]')
    assert shown.page.locator(f"{LOSS} path.line").count() == 2
    shown.page.click('[data-toggle="line:loss:training"]')
    assert shown.page.locator(f"{LOSS} path.line").count() == 1
    shown.page.click('[data-toggle="run:1"]')
    assert shown.page.locator(f"{LOSS} path.line").count() == 2
    assert shown.complaints == []


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_it_fits_the_window(show: Any, tmp_path: Path, run: Path, width: int) -> None:
    long = write_run(tmp_path / ("a-very-long-name" * 8), steps(10), data={"source": "x" * 300})
    viewport = {"width": width, "height": 740}
    assert show(run, viewport=viewport).overflow() <= 0
    assert show(run, long, viewport=viewport).overflow() <= 0
    assert show(long, viewport=viewport).overflow() <= 0


def test_dark_is_dark_and_light_is_light(show: Any, run: Path) -> None:
    def brightness(shown: Shown) -> tuple[int, int]:
        script = "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        return tuple(sum(map(int, c.strip("rgb()").split(","))) for c in shown.page.evaluate(script))  # type: ignore[return-value]

    light_page, light_ink = brightness(show(run, color_scheme="light"))
    dark_page, dark_ink = brightness(show(run, color_scheme="dark"))
    assert light_page > 700 and light_ink < 150 and dark_page < 150 and dark_ink > 600


def test_it_prints(show: Any, run: Path) -> None:
    shown = show(run, color_scheme="dark")
    on_screen = shown.page.locator(".plot svg").count()
    pdf = shown.page.pdf(width="210mm", height="297mm")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert pdf.startswith(b"%PDF") and 2 <= pages <= 4  # charts and tables fill two or three
    shown.page.emulate_media(media="print", color_scheme="dark")
    assert not shown.page.locator("#controls").is_visible()
    assert not shown.page.locator(".tip").first.is_visible()
    assert shown.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    ink = shown.page.evaluate("getComputedStyle(document.querySelector('h1')).color")
    assert sum(map(int, ink.strip("rgb()").split(","))) < 150  # dark on white, though the screen is dark
    assert shown.page.locator(".plot svg").count() == on_screen and shown.page.locator(LOSS).is_visible()
    assert shown.page.evaluate("getComputedStyle(document.querySelector('.chart')).breakInside") == "avoid"


def test_a_hundred_thousand_points_stay_small(show: Any, tmp_path: Path) -> None:
    shown = show(write_run(tmp_path / "a", steps(100_000), total_steps=100_000))
    shown.page.locator("#smooth").fill("30")
    shown.page.click("[data-axis=time_s]")
    raw, smooth = (shown.d(f"{LOSS} path.{name}") for name in ("raw", "smooth"))
    assert 800 <= smooth.count("L") + 1 <= raw.count("L") + 1 <= 4000
    assert shown.page.evaluate("document.querySelectorAll('*').length") < 1500
    assert shown.complaints == []


def test_no_number_in_a_log_is_too_much_to_draw(show: Any, tmp_path: Path) -> None:
    rng = random.Random(7)
    runs = [extreme_run(tmp_path / str(n), rng) for n in range(24)]
    for some in (*([run] for run in runs[:6]), runs):
        shown = show(*some)
        shown.page.check("#log")
        shown.page.locator("#smooth").fill("50")
        for axis in ("tokens", "time_s", "flops", "step"):
            shown.page.click(f"[data-axis={axis}]")
            assert shown.complaints == [], (some, axis)
        shown.page.uncheck("#log")
        assert shown.complaints == []


def test_nothing_in_a_run_can_run(show: Any, tmp_path: Path) -> None:
    evil = "</script><script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>"
    sample = {"event": "sample", "step": 1, "prompt": evil, "text": evil}
    scores = {"event": "tasks", "step": 2, evil: {"acc": 0.5}}
    runs = [
        write_run(tmp_path / n, [*steps(3), scores], samples=[sample], data={"source": evil})
        for n in ("<img src=x onerror=alert(1)>", "b")
    ]
    for shown in (show(*runs), show(runs[0])):
        box = shown.page.locator(LOSS).bounding_box()
        shown.page.mouse.move(box["x"] + 200, box["y"] + 100)
        assert shown.page.evaluate("window.pwned === undefined")
        assert shown.page.locator("img").count() == 0 and len(shown.requests) == 1
        assert shown.complaints == []


def test_a_page_that_is_live_follows_the_run(show: Any, run: Path) -> None:
    with Server([run], 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            shown = show(url=server.url)
            shown.page.click("[data-axis=tokens]")
            shown.page.locator("#smooth").fill("20")
            with (run / "log.jsonl").open("a") as log:
                log.write("".join(json.dumps(e) + "\n" for e in [*steps(60)[40:], evaluation(60, 0.125)]))
                log.write(json.dumps({"event": "tasks", "step": 60, "hellaswag": {"acc": 0.25}}) + "\n")
            shown.page.locator("#headline", has_text="0.1250").wait_for()
            assert shown.d(f"{LOSS} path.raw").count("L") == 59
            assert shown.page.locator('[data-plot="hellaswag.acc"] circle').count() == 1
            # What was chosen is still chosen.
            assert "tokens" in shown.tick_texts() and shown.page.locator(f"{LOSS} path.smooth").count() == 1
            assert shown.page.inner_text("#live") == "live"
            run.rename(run.with_name("moved"))  # what is wrong is the server's to say, as long as it is there
            shown.page.locator("#live.lost", has_text=f"there is no run at {run}").wait_for()
            run.with_name("moved").rename(run)
            shown.page.locator("#live:not(.lost)", has_text="live").wait_for()
        finally:
            server.shutdown()
            thread.join()
    shown.page.locator("#live.lost", has_text="regpt report --watch has ended").wait_for()
    assert shown.page.locator(f"{LOSS} path.raw").count() == 1
