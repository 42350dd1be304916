"""Published figures stand only beside runs that they can be compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from logs import steps, write_run

from regpt.config import load_preset
from regpt.report.baselines import loss_baselines, task_baselines
from regpt.report.history import read_histories


def values(tmp_path: Path, preset: str, **changes: Any) -> dict[str, float]:
    run = write_run(tmp_path / "a", steps(2), config=load_preset(preset).config, **changes)
    return {b.label: b.value for b in loss_baselines(read_histories([run]))}


def test_gpt2_stands_beside_a_run_on_its_text(tmp_path: Path) -> None:
    assert values(tmp_path, "gpt2-124m-fineweb-edu")["GPT-2 124M"] == 3.2924
    assert values(tmp_path, "gpt2-124m-openwebtext")["GPT-2 124M"] == 3.12


def test_of_other_text_or_tokens_nothing_does(tmp_path: Path) -> None:
    assert values(tmp_path, "gpt2-124m-openwebtext", data={"source": "my.txt"}) == {}
    assert values(tmp_path, "gpt2-124m-openwebtext", tokenizer={"name": "bytes"}) == {}


def scored(tmp_path: Path, figure: str, rows: int) -> dict[str, float]:
    line = {"event": "tasks", "step": 2, "hellaswag": {figure: 0.25, "rows": rows}}
    runs = read_histories([write_run(tmp_path / "a", [*steps(2), line])])
    return {b.label: b.value for b in task_baselines(runs, "hellaswag", figure)}


def test_hellaswag_by_the_same_rule(tmp_path: Path) -> None:
    by_tokens = scored(tmp_path, "acc_norm_tokens", 10_042)
    assert by_tokens["GPT-2 124M"] == 0.294463 and by_tokens["GPT-3 125M"] == 0.337
    assert not any("Addi" in label for label in by_tokens)  # nothing stands behind it
    assert scored(tmp_path, "acc_norm", 10_042) == {"GPT-2 124M": 0.3114}


def test_a_score_of_some_rows_is_held_against_none_of_all(tmp_path: Path) -> None:
    assert scored(tmp_path, "acc_norm_tokens", 10_041) == {}
