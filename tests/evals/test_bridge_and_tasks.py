"""Two ways of ours to the same figures: lm-eval's tasks through the bridge, and our own tasks, on the same rows and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import THEIRS
from test_against_lm_eval import rows_of

from regpt.evals.tasks import open_task
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = 20
NAMES = {
    "lambada": ["acc", "perplexity"],
    "wikitext": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
}


def local_task(task: str, rows: list[dict[str, Any]], folder: Path) -> None:
    """lm-eval's own definition of a task, on these rows."""
    import lm_eval

    definition, split = THEIRS[task]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local: dict[str, Any] = {
        "include": str(Path(lm_eval.__file__).parent / "tasks" / definition),
        "task": f"local_{task}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        **dict.fromkeys({"training_split", "validation_split", "test_split"} - {f"{split}_split"}),
    }
    (folder / "local.yaml").write_text(json.dumps(local), encoding="utf-8")


@pytest.mark.filterwarnings("default")  # lm-eval's own
@pytest.mark.parametrize("task", THEIRS)
def test_the_bridge_and_our_own_task_agree(
    task: str, trained_model: GPT2, tokenizer: Tokenizer, test_data: Path, tmp_path: Path
) -> None:
    """Accuracies exactly, perplexities to rounding, standard errors where lm-eval has a formula."""
    from regpt.adapters.lm_eval import evaluate, open_tasks

    rows = rows_of(task, test_data / "eval", ROWS)
    local_task(task, rows, tmp_path)
    bridged = evaluate(open_tasks([f"local_{task}"], tmp_path), trained_model, tokenizer)[f"local_{task}"]
    ours = open_task(task, tmp_path / "rows.jsonl").evaluate(trained_model, tokenizer)
    assert bridged["rows"] == ours.rows == len(rows)
    for name in NAMES.get(task, ["acc", "acc_norm"]):
        own = ours.figures[name]
        if name.startswith("acc"):
            assert bridged[name] == own.value and bridged[f"{name}_stderr"] == pytest.approx(own.stderr)
        else:
            assert bridged[name] == pytest.approx(own.value, rel=1e-5)
