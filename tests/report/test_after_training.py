"""`regpt train` leaves a report in the run, however it ends, and never fails for it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from regpt.cli import main
from regpt.cli import train as command
from regpt.config import Config
from regpt.errors import Interrupted
from regpt.report import write

OPTIONS = {
    "data.source": "text.txt",
    "data.workers": 1,
    "tokenizer.name": "bytes",
    "model.n-layer": 1,
    "model.n-head": 2,
    "model.n-embd": 16,
    "model.block-size": 16,
    "train.batch-tokens": 64,
    "train.steps": 4,
    "train.device": "cpu",
    "optim.warmup-steps": 1,
    "eval.every": 2,
    "sample.tokens": 4,
    "track.log-every": 1,
}
WORDS = ["train", "demo", "--out", "run", "--json", *(f"--{k}={v}" for k, v in OPTIONS.items())]


def test_a_finished_run_has_its_report_and_its_preset(
    tiny_run: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(WORDS) == 0
    result = json.loads(capsys.readouterr().out)
    text = Path("run/report.html").read_text()
    assert f"{result['val_loss']:.4f}" in text and "What differs from the preset demo" in text
    preset = json.loads(Path("run/run.json").read_text())["preset"]
    assert preset["name"] == "demo" and preset["differs"]["train.steps"] == [1500, 4]
    assert main(WORDS) == 0  # goes on in the same run, whose report is ours to replace


def test_a_stopped_run_has_one_too(tiny_run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(WORDS) == 0
    Path("run/report.html").unlink()

    def stopped(*words: Any, **named: Any) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr("regpt.train.session.train", stopped)
    assert main(WORDS) == 130
    assert Path("run/report.html").exists()


def test_a_report_that_fails_is_a_note(
    tiny_run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*words: Any, **named: Any) -> str:
        raise ZeroDivisionError("no such thing")

    monkeypatch.setattr(write, "page", broken)
    assert main(WORDS) == 0
    assert "warning: the run has no report: no such thing" in capsys.readouterr().err
    assert not Path("run/report.html").exists()


def test_a_file_of_the_users_is_left_alone(tiny_run: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(WORDS) == 0
    Path("run/report.html").write_text("mine")
    assert main(WORDS) == 0
    assert "is not a report, so it is left alone" in capsys.readouterr().err
    assert Path("run/report.html").read_text() == "mine"


def test_a_run_that_never_began_has_none(tmp_path: Path) -> None:
    from regpt.cli.parse import CommonArgs, Output

    assert command.write_run_report(tmp_path, Output(dataclasses.replace(CommonArgs(), quiet=True))) is None
