"""What a report says in figures is what the logs say."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from logs import TOKENS, evaluation, steps, write_run

from regpt.report.history import read_histories
from regpt.report.numbers import cautions, differing, groups, report_values, summary


def run(folder: Path, val: float, **changes: object) -> Path:
    return write_run(folder, [*steps(10), evaluation(5, val - 0.5), evaluation(10, val)], **changes)  # type: ignore[arg-type]


def test_the_summary_of_a_run(tmp_path: Path) -> None:
    s = summary(read_histories([run(tmp_path / "a", 3.0)])[0], price=2.0)
    assert (s["val_loss"], s["best_val_loss"], s["best_step"], s["val_bits_per_byte"]) == (3.0, 2.5, 5, 1.5)
    assert (s["step"], s["total_steps"], s["finished"]) == (10, 10, True)
    assert (s["tokens"], s["flops"]) == (10 * TOKENS, 10 * TOKENS * 1000)
    assert (s["time_s"], s["elapsed_s"], s["cost"]) == (20.0, 30.0, 2.0 * 30 / 3600)
    assert (s["tokens_per_second"], s["mfu"], s["memory_bytes"]) == (1000.0, None, 2**30)
    assert s["train_loss"] == 6.0 / 10**0.5


def test_runs_that_differ_in_the_seed_are_one_group(tmp_path: Path) -> None:
    values = [3.0, 3.1, 3.3]
    paths = [run(tmp_path / str(i), v, seed=i, train={"threads": i}) for i, v in enumerate(values)]
    paths.append(run(tmp_path / "other", 2.0, optim={"lr": 0.5}))
    seeds, other = groups(read_histories(paths))
    assert (seeds["runs"], seeds["seeds"], seeds["n"]) == (["0", "1", "2"], [0, 1, 2], 3)
    assert seeds["figures"]["val_loss"] == {
        "mean": pytest.approx(3.1333333, abs=1e-6),
        "spread": pytest.approx(statistics.stdev(values)),
    }
    assert other["figures"]["val_loss"] == {"mean": 2.0, "spread": None}


def test_an_unfinished_run_is_not_in_the_mean(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / "a", 3.0, seed=1),
        write_run(tmp_path / "b", [*steps(5), evaluation(5, 9.0)], seed=2),
    ]
    (group,) = groups(read_histories(paths))
    assert (group["n"], group["unfinished"], len(group["runs"])) == (1, 1, 2)
    assert group["figures"]["val_loss"] == {"mean": 3.0, "spread": None}


def test_settings_that_differ(tmp_path: Path) -> None:
    paths = [run(tmp_path / "a", 3.0), run(tmp_path / "b", 3.0, optim={"lr": 0.5}, seed=7)]
    assert differing(read_histories(paths)) == {"seed": [1337, 7], "optim.lr": [0.0006, 0.5]}


def test_losses_of_other_tokens_are_not_compared_in_silence(tmp_path: Path) -> None:
    same = [run(tmp_path / "a", 3.0), run(tmp_path / "b", 3.0)]
    assert cautions(read_histories(same)) == []
    other = run(tmp_path / "c", 3.0, fingerprint="bb")
    (said,) = cautions(read_histories([same[0], other]))
    assert "different tokenizers" in said and "Bits per byte can." in said


def test_damaged_lines_are_said(tmp_path: Path) -> None:
    path = run(tmp_path / "a", 3.0)
    with (path / "log.jsonl").open("a") as log:
        log.write("?\n")
    assert report_values(read_histories([path]))["cautions"] == [
        "a: 1 damaged lines of its log were passed over."
    ]


def test_a_record_with_nothing_in_it_is_still_reported(tmp_path: Path) -> None:
    path = run(tmp_path / "a", 3.0)
    (path / "run.json").write_text('{"format": 1, "config": 5, "plan": null}')
    s = summary(read_histories([path])[0])
    assert (s["val_loss"], s["flops"], s["total_steps"], s["finished"]) == (3.0, None, None, False)
