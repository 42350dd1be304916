"""The page: its numbers are the log's, nothing in it runs but our own script, no file of another is overwritten."""

from __future__ import annotations

import html.parser
import json
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from logs import evaluation, extreme_run, steps, write_run

from regpt.cli import main
from regpt.config import load_preset
from regpt.errors import UsageError
from regpt.report.charts import BUCKETS, OF_BUCKET, labels, said, ticks
from regpt.report.history import read_histories
from regpt.report.page import ALONE, MARK, page, update
from regpt.report.write import report_place, write_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'& ]]> <!-- \u2028 \x00 \ud800"


class Reader(html.parser.HTMLParser):
    """What a browser would see: elements with their attributes, and all text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._raw = "", "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = (dict(attrs).get("id") or tag) if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "data":
            self.data += data
        elif not self._raw:
            self.text += data


def charts_of(text: str) -> dict[str, Any]:
    return {c["id"]: c for c in json.loads(Reader(text).data)["charts"]}


def test_the_numbers_in_the_page_are_those_of_the_log(tmp_path: Path) -> None:
    lines = steps(30)
    text = page(read_histories([write_run(tmp_path / "a", [*lines, evaluation(30, 3.25)])]), price=4.0)
    loss = charts_of(text)["loss"]
    training, validation = loss["lines"]
    assert training["step"] == list(range(1, 31))
    assert training["y"] == pytest.approx([e["loss"] for e in lines], rel=1e-6)
    assert training["tokens"] == [e["tokens"] for e in lines]
    assert (validation["step"], validation["y"], validation["time_s"]) == ([30], [3.25], [60])
    shown = Reader(text).text
    for said_there in (
        "3.2500",
        "1.6250",
        "0.10",
        "at 4 an hour",
        "124,000,000",
        "a machine",
        "0.002 → 0.001",
        "12,345",
    ):
        assert said_there in shown


def test_a_hostile_run_is_only_text(tmp_path: Path) -> None:
    sample = {"event": "sample", "step": 3, "prompt": HOSTILE, "text": HOSTILE}
    note = {"event": "note", "step": 1, "text": HOSTILE}
    scores = {"event": "tasks", "step": 3, HOSTILE: {"acc": 0.5, HOSTILE: 0.5}}
    runs = [
        write_run(
            tmp_path / name,
            [*steps(3), note, scores],
            samples=[sample],
            data={"source": HOSTILE, HOSTILE: HOSTILE},
        )
        for name in ("<script>alert(3)<!--", "b")
    ]
    for histories in (read_histories(runs), read_histories(runs[:1])):
        seen = Reader(page(histories).encode().decode())
        names = [tag for tag, _ in seen.elements]
        assert names.count("script") == 2 and "img" not in names
        assert not [a for _, attributes in seen.elements for a in attributes if a.startswith("on")]
        assert "<script>alert(1)</script><img src=x onerror=alert(2)>" in seen.text
        assert json.loads(seen.data)["runs"][0]["label"] == "<script>alert(3)<!--"


def test_the_page_can_load_nothing(tmp_path: Path) -> None:
    text = page(read_histories([write_run(tmp_path / "a", steps(3))]))
    policy = [
        a["content"] for tag, a in Reader(text).elements if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy == [ALONE] and "default-src 'none'" in ALONE and "connect-src" not in ALONE
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", text)


def test_a_log_of_a_hundred_thousand_steps_makes_a_small_page(tmp_path: Path) -> None:
    lines = steps(100_000)
    lines[50_000]["loss"] = 99.0  # one spike
    lines[60_000]["loss"] = None
    text = page(read_histories([write_run(tmp_path / "a", lines)]))
    (loss,) = charts_of(text)["loss"]["lines"]
    assert len(loss["y"]) <= (OF_BUCKET + 1) * BUCKETS and 99 in loss["y"] and None in loss["y"]
    assert len(loss["mean"]["y"]) == BUCKETS
    assert len(text) < 1_500_000


def test_twenty_runs_share_the_points(tmp_path: Path) -> None:
    lines = steps(5000)
    runs = [write_run(tmp_path / str(i), lines) for i in range(20)]
    assert len(page(read_histories(runs))) < 6_000_000


def test_without_a_script_the_curves_are_there(tmp_path: Path) -> None:
    text = page(read_histories([write_run(tmp_path / "a", [*steps(3), evaluation(3, 4.0)])]))
    paths = [a["d"] for tag, a in Reader(text).elements if tag == "path"]
    assert paths and all(re.fullmatch(r"(M[\d.]+,[\d.]+)(L[\d.]+,[\d.]+)*", str(d)) for d in paths)


def test_a_gap_breaks_the_line(tmp_path: Path) -> None:
    lines = steps(5)
    lines[2]["loss"] = None
    text = page(read_histories([write_run(tmp_path / "a", lines)]))
    first = next(str(a["d"]) for tag, a in Reader(text).elements if tag == "path")
    assert (first.count("M"), first.count("L")) == (2, 2)


def test_gpt2_stands_in_the_picture_of_a_run_on_its_text(tmp_path: Path) -> None:
    config = load_preset("gpt2-124m-fineweb-edu").config
    text = page(read_histories([write_run(tmp_path / "a", [*steps(3), evaluation(3, 4.0)], config=config)]))
    drawn = Reader(text[: text.index("</figure>")])
    assert [
        a["class"] for _, a in drawn.elements if a.get("class") == "baseline"
    ] and "GPT-2 124M 3.292" in drawn.text


def scored_run(folder: Path, **figures: float) -> Path:
    scores = {"event": "tasks", "step": 3, "hellaswag": {**figures, "rows": 10_042, "stderr": 0.005}}
    return write_run(folder, [*steps(3), scores])


def test_hellaswag_is_told_by_the_figure_of_regpt_eval_and_beside_the_published_one(tmp_path: Path) -> None:
    run = scored_run(tmp_path / "a", acc=0.27, acc_norm=0.29, acc_norm_stderr=0.004, acc_norm_tokens=0.28)
    text = page(read_histories([run]))
    (chart,) = [c for name, c in charts_of(text).items() if name.startswith("hellaswag")]
    assert (
        chart["id"] == "hellaswag.acc_norm" and chart["unit"] == "acc_norm and acc_norm_tokens, 10,042 rows"
    )
    assert [(line["name"], line["y"]) for line in chart["lines"]] == [
        ("acc_norm", [0.29]),
        ("acc_norm_tokens", [0.28]),
    ]
    baselines = {b["label"]: b["value"] for b in chart["baselines"]}
    assert baselines["GPT-2 124M acc_norm"] == 0.3114 and baselines["GPT-2 124M acc_norm_tokens"] == 0.294463
    assert "hellaswag0.2900acc_norm" in Reader(text).text
    assert [a["data-toggle"] for _, a in Reader(text).elements if "data-toggle" in a][2:] == [
        "line:hellaswag.acc_norm:acc_norm",
        "line:hellaswag.acc_norm:acc_norm_tokens",
    ]


def test_a_second_figure_stands_only_beside_published_ones(tmp_path: Path) -> None:
    scores = {
        "event": "tasks",
        "step": 3,
        "hellaswag": {"acc_norm": 0.29, "acc_norm_tokens": 0.28, "rows": 500},
    }
    (chart,) = [
        c
        for name, c in charts_of(
            page(read_histories([write_run(tmp_path / "a", [*steps(3), scores])]))
        ).items()
        if name.startswith("hellaswag")
    ]
    assert [line["y"] for line in chart["lines"]] == [[0.29]] and chart["unit"] == "acc_norm, 500 rows"


def test_a_comparison_says_means_settings_and_cautions(tmp_path: Path) -> None:
    values = [3.0, 3.1, 3.3]
    runs = [
        write_run(tmp_path / str(i), [*steps(10), evaluation(10, v)], seed=i) for i, v in enumerate(values)
    ]
    runs += [
        write_run(
            tmp_path / name, [*steps(10), evaluation(10, 2.5)], optim={"lr": 0.25}, seed=9, fingerprint="bb"
        )
        for name in ("x", "y")
    ]
    runs += [write_run(tmp_path / n, steps(5), optim={"lr": 0.125}, seed=i) for i, n in enumerate("uv")]
    runs.append(write_run(tmp_path / "w", [*steps(5), evaluation(5, 7.75)], optim={"lr": 0.0625}))
    seen = Reader(page(read_histories(runs))).text
    assert "mean ± sample standard deviation" in seen
    assert "n = 3, seeds 0, 1, 2" in seen and f"3.1333 ± {statistics.stdev(values):.4f}" in seen
    assert "n = 1 of 2; 1 of a seed that is there again, seeds 9, 9" in seen
    assert "none of 2 is finished, so there is no mean" in seen
    assert "not finished: so far" in seen and "7.7500" in seen
    assert "Settings that differ" in seen
    assert "optim.lr" + "0.0006" * 3 + "0.25" * 2 + "0.125" * 2 + "0.0625" in seen
    assert "These runs have different tokenizers" in seen


def test_equal_values_are_said_to_have_no_spread(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i), [*steps(10), evaluation(10, 3.0)], seed=i) for i in range(2)]
    assert "3.0000 ± 0.0000" in Reader(page(read_histories(runs))).text


@pytest.mark.parametrize("seed", range(10))
def test_no_number_in_a_log_is_too_much(tmp_path: Path, seed: int) -> None:
    """Thirty logs a seed, each by itself, and all compared."""
    rng = random.Random(seed)
    paths = [extreme_run(tmp_path / str(n), rng) for n in range(30)]
    for path in paths:
        runs = read_histories([path], may_be_empty=True)
        seen = Reader(page(runs, price=1e308))
        drawn = [a.get(name) or "" for _, a in seen.elements for name in ("d", "y", "y1", "y2")]
        assert [d for d in drawn if re.search("nan|inf", d)] == []
        assert json.loads(update(runs))["data"]["charts"] == json.loads(seen.data)["charts"]
    assert "30 runs compared" in page(read_histories(paths, may_be_empty=True), price=2.0)


def test_equal_runs_make_equal_pages(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(9))
    assert page(read_histories([run])) == page(read_histories([run]))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 10, 20, 30, 40, 50, 60]),
        (0.13, 0.31, [0.15, 0.2, 0.25, 0.3]),
        (5, 5, [5]),
        (1, 1 + 2e-16, [1]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 5e-324, [0]),
        (-1e300, 1e300, [-1e300, -5e299, 0, 5e299, 1e300]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6) == pytest.approx(expected)


def test_ticks_of_one_axis_look_alike() -> None:
    assert labels([0, 5000, 10000]) == ["0", "5K", "10K"]
    assert labels([0.5, 1.0, 1.5]) == ["0.5", "1.0", "1.5"]
    assert labels([2e-4, 4e-4]) == ["2e-4", "4e-4"]
    assert [said(x) for x in (0, 4.26011, 123456, 1.5e6, 6.5e17)] == ["0", "4.26", "123.5K", "1.5M", "6.5e17"]


# --- its file ----------------------------------------------------------------------------------------------------------


def test_one_run_has_its_report_in_it_several_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [write_run(Path(name), steps(2)) for name in "ab"]
    assert report_place(runs[:1], None) == Path("a/report.html")
    assert report_place(runs, None) == Path("comparison.html")
    assert report_place(runs, Path("a")) == Path("a/comparison.html")
    assert report_place(runs[:1], Path("b")) == Path("b/report.html")


def test_a_comparison_made_inside_of_a_run_leaves_its_report_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, steps(2)) for name in "ab"]
    monkeypatch.chdir(runs[0])
    assert main(["report", "."]) == 0
    before = Path("report.html").read_bytes()
    assert main(["report", ".", "../b"]) == 0
    assert (
        Path("report.html").read_bytes() == before
        and b"2 runs compared" in Path("comparison.html").read_bytes()
    )


def test_only_a_report_is_overwritten(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "a", steps(2)), tmp_path / "mine.html"
    other.write_text("<html>my page</html>")
    with pytest.raises(UsageError, match=r"mine\.html is there and is not a report, so it is left alone"):
        report_place([run], other)
    place = report_place([run], None)
    for _ in range(2):
        write_report(read_histories([run]), place)
        assert report_place([run], None) == place and MARK in place.read_text()
    with pytest.raises(UsageError, match=r"there is no folder .*nowhere to write x\.html in"):
        report_place([run], tmp_path / "nowhere" / "x.html")


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(2))
    with pytest.raises(UsageError, match=r"report\.html cannot be written: No such file"):
        write_report(read_histories([run]), tmp_path / "gone" / "report.html")


# --- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_says_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / n, [*steps(10), evaluation(10, v)], seed=v) for n, v in (("a", 3), ("b", 4))]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "x.html"), "--json", "--price", "2"]) == 0
    said_json = json.loads(capsys.readouterr().out)
    assert said_json["report"] == str(tmp_path / "x.html") and (tmp_path / "x.html").exists()
    assert [r["val_loss"] for r in said_json["runs"]] == [3, 4]
    assert said_json["groups"][0]["figures"]["val_loss"]["mean"] == 3.5
    assert main(["report", str(runs[0])]) == 0
    out = capsys.readouterr().out
    assert "a: step 10, validation loss 3.0000, 1.5000 bits per byte" in out and "the report lies in" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report"], "no run is named"),
        (["report", "nothing-here"], "there is no folder nothing-here"),
        (["report", ".", "--out", "x.html"], ". is not a run: it has no run.json."),
        (["report", ".", "--price", "-1"], "--price is not an amount of money"),
        (["report", ".", "--price", "nan"], "--price is not an amount of money"),
    ],
)
def test_mistakes_get_one_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
