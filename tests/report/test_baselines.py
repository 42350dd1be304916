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


def test_hellaswag_by_the_same_rule(tmp_path: Path) -> None:
    runs = read_histories([write_run(tmp_path / "a", steps(2))])
    by_tokens = {b.label: b.value for b in task_baselines(runs, "hellaswag", "acc_norm_tokens")}
    assert by_tokens["GPT-2 124M"] == 0.294463 and by_tokens["GPT-3 125M"] == 0.337
    assert not any("Addi" in label for label in by_tokens)  # nothing stands behind it
    assert {b.label: b.value for b in task_baselines(runs, "hellaswag", "acc_norm")} == {"GPT-2 124M": 0.3114}
