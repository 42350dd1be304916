"""`regpt eval`: published figures beside a run's, and any task of lm-eval with --harness."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from regpt.cli import main
from regpt.config import ModelConfig
from regpt.errors import DeviceError
from regpt.models.gpt2 import GPT2
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train.checkpoint import save_checkpoint
from regpt.train.named import model_tensors

TASK = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/rows.jsonl}, cache_dir: FOLDER/cache}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
Evaluate = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def no_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it answers; what lm-eval is told then holds for the whole process."""
    monkeypatch.setattr("regpt.cli.beside.reachable", lambda: True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights that knows bytes."""
    folder, tokenizer = tmp_path_factory.mktemp("runs") / "r", ByteTokenizer()
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=256)
    torch.manual_seed(1)
    state = {
        "model_config": dataclasses.asdict(config),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    model = model_tensors(GPT2(config, tokenizer.vocab_size))
    save_checkpoint(folder / "checkpoints", step=1, model=model, optimizer=None, state=state)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of lm-eval's with its rows."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"{n}?", "choices": ["a cat", "a dog", "two"], "answer": n % 3} for n in range(9)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "animals.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    return folder


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str], run: Path, one_thread: None) -> Evaluate:
    def call(*words: str) -> tuple[int, str, str]:
        status = main(["eval", str(run), *words, "--device", "cpu"])
        got = capfd.readouterr()
        return status, got.out, got.err

    return call


def test_published_figures_stand_beside_the_runs(evaluate: Evaluate, test_data: Path) -> None:
    words = ("--tasks", "hellaswag", "--rows", "5", "--data", str(test_data / "eval"))
    status, out, err = evaluate(*words)
    assert status == 0, err
    assert "GPT-2 124M" in out and "0.3114" in out and "0.2945" in out and "build-nanogpt" in out
    values = json.loads(evaluate(*words, "--json")[1])
    assert {(p["model"], p["figure"]) for p in values["published"]} == {
        ("GPT-2 124M", figure) for figure in ("acc", "acc_norm", "acc_norm_tokens")
    }
    assert all(p["ours"] == values["hellaswag"][p["figure"]] and p["source"] for p in values["published"])
    every = json.loads(evaluate(*words, "--json", "--published", "all")[1])["published"]
    assert {"GPT-3 125M", "GPT-2 1558M", "Addi-11/build-nanogpt"} <= {p["model"] for p in every}
    assert "(unsupported)" in evaluate(*words, "--published", "all")[1]
    status, out, _ = evaluate(*words, "--published", "none")
    assert status == 0 and "published" not in out and "GPT-2" not in out


def test_tasks_of_lm_eval_on_a_run(evaluate: Evaluate, tasks: Path) -> None:
    """One object of JSON, one table; nothing of lm-eval's on standard output; without --tasks nothing else is measured."""
    words = ("--harness", "animals", "--harness-tasks", str(tasks), "--rows", "6", "--num-fewshot", "1")
    status, out, err = evaluate(*words, "--json")
    values = json.loads(out)
    assert status == 0, err
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "rows", "num_fewshot"} == set(
        values["harness"]["animals"]
    )
    assert values["harness"]["animals"]["rows"] == 6 and "loss" not in values
    assert "lm-eval reads its tasks: animals" in err
    status, out, _ = evaluate(*words, "--quiet")
    assert [line.split()[:2] for line in out.splitlines()[1:3]] == [
        ["animals", "acc"],
        ["animals", "acc_norm"],
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--num-fewshot", "3"], "--num-fewshot belongs to --harness, which was not given."),
        (["--harness-tasks", "x"], "--harness-tasks belongs to --harness, which was not given."),
        (["--harness", " , "], "--harness names no task."),
        (["--harness", "animals", "--num-fewshot", "-1"], "--num-fewshot is out of range."),
        (["--harness", "animals", "--harness-tasks", "nowhere"], "--harness-tasks nowhere is not a folder."),
        (["--published", "some"], "--published cannot take this value."),
    ],
)
def test_mistakes_are_told(evaluate: Evaluate, words: list[str], said: str) -> None:
    status, out, err = evaluate(*words)
    assert (status, out) == (2, "") and said in err


def test_a_run_that_does_not_say_its_text_asks_for_one(evaluate: Evaluate, run: Path) -> None:
    status, out, err = evaluate()
    assert (status, out) == (2, "") and "Errno" not in err
    assert err.startswith(
        f"DataError: {run} does not say what it was trained on: run.json is not there.\n  try: --split"
    )


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "regpt.adapters.lm_eval", raising=False)
    with pytest.raises(
        DeviceError, match="--harness needs the package lm-eval, which is not installed"
    ) as caught:
        importlib.import_module("regpt.adapters.lm_eval")
    assert "[eval]" in str(caught.value)


@pytest.mark.slow
def test_a_task_whose_rows_cannot_be_had_says_what_to_do(evaluate: Evaluate) -> None:
    """Reading lm-eval's own task files takes a quarter of a minute."""
    status, out, err = evaluate("--harness", "piqa")
    assert (status, out) == (2, "") and "lm-eval cannot load the task piqa: ConnectionError" in err
    assert "--harness-tasks DIR" in err
    assert "Did you mean piqa?" in evaluate("--harness", "piqqa")[2]
