"""Every task beside lm-eval: the same weights, the same rows; log-probabilities within 1e-4, accuracies equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness import Harness, lm_eval, packed_rows

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


def rows_of(task: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows with the fields that the task is published with, from the shared texts."""
    if task == "lambada":
        return packed_rows(folder / "lambada_openai_test.jsonl.xz", count)
    if task == "wikitext":
        text = (folder / "wiki.test.raw").read_text(encoding="utf-8")
        return [{"page": page} for page in sorted(pages(text), key=len)[count // 7 :][: count // 10]]
    found = packed_rows(folder / "hellaswag_val.jsonl.xz", count)
    if task == "hellaswag":
        return [_in_two(row, number) for number, row in enumerate(found)]
    if task == "piqa":
        return [
            {"goal": r["ctx"], "sol1": r["endings"][0], "sol2": r["endings"][r["label"]], "label": n % 2}
            for n, r in enumerate(found)
        ]
    return [  # questions with three to four choices, named by letters or digits
        {
            "id": str(n),
            "question": r["ctx"],
            "choices": {"text": r["endings"][n % 2 :], "label": list("1234" if n % 3 else "ABCD")[n % 2 :]},
            "answerKey": list("1234" if n % 3 else "ABCD")[max(r["label"], n % 2)],
        }
        for n, r in enumerate(found)
    ]


def _in_two(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The context parted at its last sentence, some with WikiHow's marks, as in the published file."""
    first, stop, second = row["ctx"].rpartition(". ")
    marks = {"ctx_a": f"[header] {first}{stop.strip()} [title] Then [step] on.", "ctx_b": second}
    plain = {"ctx_a": first + stop.strip(), "ctx_b": second}
    return {**row, **(marks if number % 4 == 0 else plain), "label": str(row["label"])}


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
    result, answers, theirs = both(task, model, tokenizer, gpt2_files, rows, tmp_path)
    assert [len(row) for row in answers] == [len(row) for row in theirs.logprobs]
    for ours, harness in zip(answers, theirs.logprobs, strict=True):
        for (logprob, greedy), (expected, best) in zip(ours, harness, strict=True):
            assert logprob == pytest.approx(expected, abs=1e-4) and greedy == best
    values = result.as_dict()
    assert values["rows"] == count
    for name in ("acc", "acc_norm", "acc_bytes"):
        if name != "acc" and task == "lambada":
            continue
        assert values[name] == theirs.figures[f"{name},none"]
        if task != "lambada":
            stderr = theirs.figures[f"{name}_stderr,none"]
            assert values[f"{name}_stderr"] == pytest.approx(stderr, rel=1e-12)
    if task == "lambada":
        assert values["perplexity"] == pytest.approx(theirs.figures["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("count", [20, pytest.param(620, marks=pytest.mark.slow)])
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
