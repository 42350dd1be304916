"""Two ways of ours to the same figures: lm-eval's tasks through the bridge, and our own tasks, on the same rows and weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import THEIRS, local_task, rows_of
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
    ours = open_task(task, tmp_path / f"{task}.jsonl").evaluate(trained_model, tokenizer)
    assert bridged["rows"] == ours.rows == len(rows)
    for name in NAMES.get(task, ["acc", "acc_norm"]):
        own = ours.figures[name]
        if name.startswith("acc"):
            assert bridged[name] == own.value and bridged[f"{name}_stderr"] == pytest.approx(own.stderr)
        else:
            assert bridged[name] == pytest.approx(own.value, rel=1e-5)
