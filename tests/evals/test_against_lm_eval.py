"""Every task beside lm-eval: the same weights, the same rows; log-probabilities within 1e-4, accuracies equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness import Harness, completed, lm_eval, packed_rows, rows_of
from regpt.evals.likelihood import score
from regpt.evals.tasks import TaskResult, open_task
from regpt.evals.wikitext import detokenized, pages
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["random_model", "trained_model"])
def model(request: pytest.FixtureRequest) -> GPT2:
    found: GPT2 = request.getfixturevalue(request.param)
    return found


def both(
    task: str, model: GPT2, tokenizer: Tokenizer, files: Path, rows: list[dict[str, Any]], folder: Path
) -> tuple[TaskResult, list[list[tuple[float, bool]]], Harness]:
    """Our figures, our answers to the requests that lm-eval makes too, and lm-eval's."""
    theirs = lm_eval(model, files, task, rows, folder)
    ours = open_task(task, folder / f"{task}.jsonl")
    part = next(iter(ours.requests(tokenizer, model.config.block_size).values()))
    answers = [[(s.logprob, s.greedy) for s in score(model, row)] for row in part]
    return ours.evaluate(model, tokenizer, batch_tokens=700), answers, theirs


@pytest.mark.parametrize("task", ["hellaswag", "arc_easy", "piqa", "lambada"])
@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_answers_and_accuracies_equal_lm_eval(
    task: str,
    count: int,
    model: GPT2,
    tokenizer: Tokenizer,
    gpt2_files: Path,
    test_data: Path,
    tmp_path: Path,
) -> None:
    rows = rows_of(task, test_data / "eval", count)
    if task == "lambada":  # so small a model guesses no word but its own
        rows = completed(rows, model, tokenizer)
    result, answers, theirs = both(task, model, tokenizer, gpt2_files, rows, tmp_path)
    assert [len(row) for row in answers] == [len(row) for row in theirs.logprobs]
    for ours, harness in zip(answers, theirs.logprobs, strict=True):
        for (logprob, greedy), (expected, best) in zip(ours, harness, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-4) and greedy == best
    values = result.as_dict()
    assert values["rows"] == count
    assert values["acc"] > 0
    for name in ("acc", "acc_norm", "acc_bytes"):
        if name != "acc" and task == "lambada":
            continue
        assert values[name] == theirs.figures[f"{name},none"]
        if task != "lambada":
            stderr = theirs.figures[f"{name}_stderr,none"]
            assert values[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-12)
    if task == "lambada":
        assert values["perplexity"] == pytest.approx(theirs.figures["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_wikitext_equals_lm_eval(
    count: int, model: GPT2, tokenizer: Tokenizer, gpt2_files: Path, test_data: Path, tmp_path: Path
) -> None:
    """Page by page, in windows of 256: most pages have several."""
    rows = rows_of("wikitext", test_data / "eval", count)
    result, answers, theirs = both("wikitext", model, tokenizer, gpt2_files, rows, tmp_path)
    assert any(len(row) > 2 for row in answers)
    for ours, harness in zip(answers, theirs.logprobs, strict=True):
        assert sum(a for a, _ in ours) == pytest.approx(harness[0][0], rel=1e-5)
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert result.figures[name].value == pytest.approx(theirs.figures[f"{name},none"], rel=1e-4)


def test_the_detokeniser_is_lm_evals(test_data: Path) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    found = list(pages((test_data / "eval" / "wiki.test.raw").read_text(encoding="utf-8")))
    found.append("a : ; b ' 5/ @.@ @,@ { x } \" y \" N N 's ' q ' = = = = = ( ( z ) ) s ' 20 ° ° C")
    assert len(found) == 63  # the hub's EleutherAI/wikitext_document_level has 62
    assert [detokenized(page) for page in found] == [wikitext_detokenizer({"page": page}) for page in found]


def test_the_shared_rows_are_scored_as_they_lie(
    trained_model: GPT2, tokenizer: Tokenizer, gpt2_files: Path, test_data: Path, tmp_path: Path
) -> None:
    """Rows of `ctx` alone are rows whose second part is empty; ready-made queries are lm-eval's own."""
    folder = test_data / "eval"
    ours = open_task("hellaswag", folder, 16).evaluate(trained_model, tokenizer)
    rows = [{**r, "ctx_a": r["ctx"], "ctx_b": ""} for r in packed_rows(folder / "hellaswag_val.jsonl.xz", 16)]
    theirs = lm_eval(trained_model, gpt2_files, "hellaswag", rows, tmp_path)
    assert ours.figures["acc_norm"].value == theirs.figures["acc_norm,none"]
    ready = open_task("hellaswag", folder / "hellaswag_val_olmes1000.jsonl.xz", 16)
    values = ready.evaluate(trained_model, tokenizer).as_dict()
    assert values["rows"] == 16 and "acc_norm_tokens" not in values


def test_tokens_are_normalised_as_build_nanogpt_does(
    trained_model: GPT2, tokenizer: Tokenizer, test_data: Path
) -> None:
    """Its way, written anew: four padded rows, all logits, the mean loss over the ending's tokens; the least wins."""
    import torch
    import torch.nn.functional as F

    right = 0
    rows = packed_rows(test_data / "eval" / "hellaswag_val.jsonl.xz", 60)
    for row in rows:
        context = tokenizer.encode(row["ctx"])
        losses = []
        for ending in row["endings"]:
            ids = torch.tensor([context + tokenizer.encode(" " + ending)])
            with torch.no_grad():
                logits = trained_model(ids)[0, len(context) - 1 : -1, : trained_model.vocab_size]
            losses.append(float(F.cross_entropy(logits, ids[0, len(context) :])))
        right += losses.index(min(losses)) == row["label"]
    ours = open_task("hellaswag", test_data / "eval", 60).evaluate(trained_model, tokenizer)
    assert ours.figures["acc_norm_tokens"].value == right / 60
    assert json.loads(json.dumps(ours.as_dict()))["acc_norm_tokens"] == right / 60
