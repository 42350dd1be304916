"""A log read back: what is damaged is passed over and counted, what is no run is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from logs import TOKENS, evaluation, steps, write_run

from regpt.config import Config
from regpt.errors import CheckpointError, UsageError
from regpt.report.history import read_histories
from regpt.train.run import JsonLines


def test_series_are_the_numbers_of_the_log(tmp_path: Path) -> None:
    (history,) = read_histories([write_run(tmp_path / "a", [*steps(6), evaluation(4, 3.5)])])
    loss = history.series["loss"]
    assert loss.step.tolist() == [1, 2, 3, 4, 5, 6]
    assert loss.value.tolist() == [6.0 / s**0.5 for s in range(1, 7)]
    assert loss.tokens.tolist() == [s * TOKENS for s in range(1, 7)]
    val = history.series["val_loss"]
    assert (val.step[0], val.tokens[0], val.time_s[0], val.last) == (4, 4 * TOKENS, 8.0, 3.5)
    assert history.elapsed_s == 18.0 and history.last_step == 6


def test_an_evaluation_between_two_logged_steps_lies_between_them(tmp_path: Path) -> None:
    (history,) = read_histories([write_run(tmp_path / "a", [*steps(3, every=10), evaluation(15, 3.5)])])
    assert history.series["val_loss"].tokens.tolist() == [15 * TOKENS]
    assert history.series["val_loss"].time_s.tolist() == [30.0]


def test_of_two_lines_of_one_step_the_later_counts(tmp_path: Path) -> None:
    again = steps(4)[2] | {"loss": 1.25}
    (history,) = read_histories([write_run(tmp_path / "a", [*steps(4), again])])
    assert history.series["loss"].value.tolist() == [6.0, 6 / 2**0.5, 1.25, 3.0]


def test_scores_of_tasks_are_series_of_their_own(tmp_path: Path) -> None:
    scored = {"event": "tasks", "step": 5, "hellaswag": {"acc": 0.25, "rows": 100}, "tasks_s": 1.5}
    (history,) = read_histories([write_run(tmp_path / "a", [*steps(5), scored])])
    assert history.series["hellaswag.acc"].value.tolist() == [0.25]
    assert not [name for name in history.series if "rows" in name or "tasks_s" in name]
    assert history.rows == {"hellaswag": 100}


def test_an_evaluation_that_says_how_far_training_had_come_is_believed(tmp_path: Path) -> None:
    line = evaluation(15, 3.5) | {"tokens": 77, "time_s": 7.5, "elapsed_s": 99.0}
    (history,) = read_histories([write_run(tmp_path / "a", [*steps(3, every=10), line])])
    val = history.series["val_loss"]
    assert (val.tokens[0], val.time_s[0], history.elapsed_s) == (77, 7.5, 99.0)


def test_what_cannot_be_read_is_passed_over_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(3))
    with (run / "log.jsonl").open("ab") as log:
        log.write(b'\xff\xfe\n[1, 2]\n{"event": "step", "step": "4"}\n{"event": "step", "step": -1}\n')
        log.write(b'{"event": "step", "step": true}\n' + b"[" * 100_000 + b"\n")
        log.write(b'{"event": "step", "step": 4, "loss": "low", "lr": 1e999, "grad_norm": true}\n')
        log.write(b'{"event": "step", "step": 5, "loss": 1e301, "lr": 1e-300, "memory_bytes": -1e300}\n')
        log.write(b'{"event": "step", "step": 6, "loss')  # being written
    (history,) = read_histories([run])
    assert history.damaged_lines == 6
    assert history.series["loss"].step.tolist() == [1, 2, 3, 4, 5]
    assert np.isnan(history.series["loss"].value[3:]).all() and history.series["loss"].last is None
    assert history.series["lr"].last == 0.0 and history.series["memory_bytes"].last == -1e300


def test_it_reads_what_the_run_directory_reads(tmp_path: Path) -> None:
    """A second path: the reader that training itself goes by."""
    run = write_run(tmp_path / "a", [*steps(50), evaluation(50, 3.0)])
    with (run / "log.jsonl").open("ab") as log:
        log.write(b"not json\n")
    ours = read_histories([run])[0].series["loss"].value.tolist()
    assert ours == [e["loss"] for e in JsonLines(run / "log.jsonl").entries() if e["event"] == "step"]


def test_a_trained_run_has_its_numbers(tiny_run: Config) -> None:
    from regpt.train.session import train

    result = train(tiny_run, "run")
    (history,) = read_histories([Path("run")])
    assert history.series["val_loss"].last == result.val_loss
    assert history.series["loss"].step.tolist() == list(range(1, 13))
    assert history.series["loss"].tokens[-1] == result.tokens
    assert history.series["loss"].time_s[-1] == result.seconds
    assert np.all(np.diff(history.series["loss"].time_s) > 0)
    assert history.part("facts")["tokens"]["train"] > 0


def test_labels_tell_runs_of_one_name_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / p, steps(2)) for p in ("x/run", "y/run", "other")]
    assert [h.label for h in read_histories(runs)] == ["x/run", "y/run", "other"]


def test_one_run_twice_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", steps(2))
    with pytest.raises(UsageError, match="is given twice"):
        read_histories([run, tmp_path / "b" / ".." / "a"])


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no run at .*nothing\.\n  expected: a folder"):
        read_histories([tmp_path / "nothing"])
    with pytest.raises(CheckpointError, match=r"is not a run: it has no run\.json\."):
        read_histories([tmp_path])


def test_an_empty_log_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    with pytest.raises(CheckpointError, match=r"has logged nothing yet\.\n  try: regpt report .* --watch"):
        read_histories([run])
    assert read_histories([run], may_be_empty=True)[0].series == {}
    (run / "log.jsonl").unlink()
    with pytest.raises(CheckpointError, match="has logged nothing yet"):
        read_histories([run])


def test_a_log_without_a_number_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [{"event": "note", "step": 0, "text": "hello"}])
    with pytest.raises(CheckpointError, match="has no step and no evaluation"):
        read_histories([run])
    (run / "log.jsonl").write_text("{}\n{}\n")
    with pytest.raises(CheckpointError, match=r"no line of .* can be read\.\n  got: 2 damaged lines"):
        read_histories([run])


def test_a_log_that_is_a_folder_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", [])
    (run / "log.jsonl").unlink()
    (run / "log.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"log\.jsonl cannot be read: Is a directory"):
        read_histories([run])
