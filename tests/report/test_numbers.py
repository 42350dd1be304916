"""What a report says in figures is what the logs say."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from logs import TOKENS, evaluation, steps, write_run

from regpt.config import Config, flat, setting_names
from regpt.report.history import read_histories
from regpt.report.numbers import (
    NEUTRAL,
    cautions,
    differing,
    flat_settings,
    groups,
    report_values,
    summary,
)


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


def test_a_run_for_a_time_is_finished_at_the_total_that_it_came_to(tmp_path: Path) -> None:
    """The plan has the steps that were guessed, each line of the log those that the measured speed allows."""
    lines = steps(12)
    for line in lines:
        line["total_steps"] = 12 if line["step"] > 6 else 30
    changes = {"train": {"minutes": 1.0}, "total_steps": 40}
    (whole,) = read_histories([write_run(tmp_path / "a", lines, **changes)])
    assert summary(whole)["total_steps"] == 12 and summary(whole)["finished"]
    (part,) = read_histories([write_run(tmp_path / "b", lines[:6], **changes)])
    assert summary(part)["total_steps"] == 30 and not summary(part)["finished"]
    longer = [line | {"total_steps": 20} for line in steps(12)]  # than was planned
    (slow,) = read_histories([write_run(tmp_path / "c", longer, total_steps=10)])
    assert not summary(slow)["finished"]


def test_runs_of_which_none_is_finished_have_no_mean(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / str(n), [*steps(n), evaluation(n, 3.0 + n)], seed=n) for n in (5, 7)]
    (group,) = groups(read_histories(paths))
    assert (group["n"], group["unfinished"], group["figures"]) == (0, 2, {})


def test_a_seed_counts_once_and_its_last_run_does(tmp_path: Path) -> None:
    values = {"first": 9.0, "again": 3.0, "other": 3.5}
    paths = [run(tmp_path / name, v, seed=int(name == "other")) for name, v in values.items()]
    paths.append(write_run(tmp_path / "begun", [*steps(5), evaluation(5, 20.0)], seed=0))
    (group,) = groups(read_histories(paths))
    assert (group["n"], group["repeated"], group["unfinished"]) == (2, 1, 1)
    assert group["figures"]["val_loss"] == {
        "mean": pytest.approx(3.25),
        "spread": pytest.approx(statistics.stdev([3.0, 3.5])),
    }


def test_equal_values_have_a_spread_of_nothing(tmp_path: Path) -> None:
    (group,) = groups(read_histories([run(tmp_path / str(i), 3.0, seed=i) for i in range(2)]))
    assert group["figures"]["val_loss"] == {"mean": 3.0, "spread": 0.0}


def test_scores_of_other_rows_have_no_mean(tmp_path: Path) -> None:
    """eval.tasks_rows does not part a group, so its scores may be of unlike rows."""
    paths = []
    for rows in (100, 200):
        scored = {
            "event": "tasks",
            "step": 10,
            "hellaswag": {"acc": 0.25, "rows": rows},
            "piqa": {"acc": 0.5},
        }
        lines = [*steps(10), evaluation(10, 3.0), scored]
        paths.append(write_run(tmp_path / str(rows), lines, seed=rows, eval={"tasks_rows": rows}))
    (group,) = groups(read_histories(paths))
    assert "hellaswag.acc" not in group["figures"] and group["figures"]["piqa.acc"]["mean"] == 0.5


# Where a seed alone makes another run, and where the value says how or where it is done, not what is learned.
ALIKE = (
    {"eval": {"every": 7, "tasks": "piqa", "tasks_rows": 10, "micro_rows": 4}},
    {"train": {"device": "cuda", "micro_rows": 4, "threads": 9, "compile": "on"}},
    {"train": {"strategy": "fsdp", "shard_group": 2, "reduction": "exact", "checkpoint_activations": True}},
    {"sample": {"every": 3, "prompt": "x"}},
    {"save": {"every": 3, "keep": 9}},
    {"track": {"log_every": 1, "wandb": "x"}},
    {"data": {"dir": "elsewhere", "workers": 3, "verify": False, "keep_downloads": False}},
)
UNLIKE = (
    {"optim": {"lr": 0.5}},
    {"train": {"batch_tokens": 1}},
    {"train": {"steps": 7}},
    {"model": {"n_layer": 1}},
    {"data": {"order": "replacement"}},
    {"tokenizer": {"name": "chars"}},
)


@pytest.mark.parametrize("changes", ALIKE, ids=str)
def test_what_does_not_change_what_is_learned_parts_no_seeds(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    paths = [run(tmp_path / "a", 3.0, seed=1), run(tmp_path / "b", 3.5, seed=2, **changes)]
    (group,) = groups(read_histories(paths))
    assert group["n"] == 2


@pytest.mark.parametrize("changes", UNLIKE, ids=str)
def test_what_does_change_it_parts_them(tmp_path: Path, changes: dict[str, object]) -> None:
    paths = [run(tmp_path / "a", 3.0, seed=1), run(tmp_path / "b", 3.5, seed=2, **changes)]
    assert [g["n"] for g in groups(read_histories(paths))] == [1, 1]


def test_neutral_settings_are_settings_and_none_that_a_run_may_not_change() -> None:
    from regpt.train.session import FIXED

    names = list(setting_names())
    assert [part for part in NEUTRAL if not any(n.startswith(part) for n in names)] == []
    assert [n for n in names if n.startswith(NEUTRAL) and n.startswith(FIXED)] == []


def test_the_settings_of_a_record_are_those_of_the_run(tmp_path: Path) -> None:
    config = Config(seed=3)
    (history,) = read_histories([write_run(tmp_path / "a", steps(2), config=config)])
    assert flat_settings(history) == flat(config) and list(flat_settings(history)) == list(setting_names())
