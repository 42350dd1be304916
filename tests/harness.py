"""lm-eval beside us: the same weights in a Hugging Face model, the same rows in a task file of its own."""

from __future__ import annotations

import json
import logging
import lzma
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regpt.evals.wikitext import pages
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer

# Where lm-eval keeps the tasks, and which split of theirs is scored.
THEIRS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "lambada": ("lambada/lambada_openai.yaml", "test"),
    "wikitext": ("wikitext/wikitext.yaml", "test"),
}


def as_hugging_face(ours: GPT2) -> Any:
    """The same weights in transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel

    c = ours.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=ours.vocab_size,
            n_positions=c.block_size,
            n_embd=c.n_embd,
            n_layer=c.n_layer,
            n_head=c.n_head,
        )
    )
    weights = {}
    for name, p in ours.named_parameters():
        linear = name.endswith("weight") and ".c_" in name
        weights["transformer." + name] = (
            p[: ours.vocab_size] if name == "wte.weight" else p.T if linear else p
        )
    found = theirs.load_state_dict(weights, strict=False)
    missing = set(found.missing_keys) - {"lm_head.weight"}  # tied
    assert not found.unexpected_keys and all(name.endswith(".bias") for name in missing)
    with torch.no_grad():
        for name in missing:  # of a model of ours without biases
            theirs.get_parameter(name).zero_()
    return theirs.eval()


CHOICES = ("hellaswag", "arc_easy", "piqa")


@dataclass(frozen=True)
class Harness:
    """lm-eval's answers to one task."""

    figures: dict[str, Any]
    logprobs: list[list[tuple[float, bool]]]
    """Of each row, of each of its requests."""


def local_task(task: str, rows: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """lm-eval's own definition of `task` on `rows`, which are written beside the task file, as local_TASK."""
    import lm_eval as package

    definition, split = THEIRS[task]
    data = folder / f"{task}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    local: dict[str, Any] = {
        "include": str(Path(package.__file__).parent / "tasks" / definition),
        "task": f"local_{task}",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        **dict.fromkeys({"training_split", "validation_split", "test_split"} - {f"{split}_split"}),
    }
    (folder / "local.yaml").write_text(json.dumps(local), encoding="utf-8")
    return local


def lm_eval(
    model: GPT2, files: Path, task: str, rows: Sequence[dict[str, Any]], folder: Path, batch_size: int = 4
) -> Harness:
    """lm-eval's own definition of `task` on `rows`, with its own Hugging Face model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries, about themselves
        import datasets
        import lm_eval as package
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import GPT2TokenizerFast

        datasets.disable_progress_bars()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        local = local_task(task, rows, folder)
        if task in CHOICES:
            names = ("acc", "acc_norm", "acc_bytes")
            local["metric_list"] = [
                {"metric": n, "aggregation": "mean", "higher_is_better": True} for n in names
            ]
        (folder / "local.yaml").write_text(json.dumps(local), encoding="utf-8")
        theirs = GPT2TokenizerFast(str(files / "encoder.json"), str(files / "vocab.bpe"))
        found = package.simple_evaluate(
            HFLM(pretrained=as_hugging_face(model), tokenizer=theirs, batch_size=batch_size, device="cpu"),
            tasks=[f"local_{task}"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=1 if task in CHOICES else 0,  # of a mean it draws none; with 0 it tells no error
        )
    samples = sorted(found["samples"][f"local_{task}"], key=lambda s: s["doc_id"])
    answers = [s["filtered_resps"] for s in samples]
    logprobs = [[tuple(a) if isinstance(a, tuple | list) else (a, False) for a in row] for row in answers]
    return Harness(found["results"][f"local_{task}"], logprobs)


def packed_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a packed file of JSON lines."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def rows_of(task: str, folder: Path, count: int) -> list[dict[str, Any]]:
    """Rows with the fields that the task is published with, from the shared texts."""
    if task == "lambada":
        return packed_rows(folder / "lambada_openai_test.jsonl.xz", count)
    if task == "wikitext":
        text = (folder / "wiki.test.raw").read_text(encoding="utf-8")
        by_length = sorted(pages(text), key=len)  # of pages, a tenth of the number: they are long
        skip = max(min(2, len(by_length) - count // 10), 0)
        return [{"page": page} for page in by_length[skip:][: count // 10]]
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


def completed(
    rows: Sequence[dict[str, Any]], model: GPT2, tokenizer: Tokenizer, every: int = 2
) -> list[dict[str, Any]]:
    """LAMBADA's rows, every so many with the model's own likeliest word at its end, where that is a word."""
    made = []
    for number, row in enumerate(rows):
        context = row["text"].rpartition(" ")[0]
        ids = tokenizer.encode(context)
        with torch.no_grad():
            logits = model(torch.tensor([ids[-model.config.block_size :]]))[0, -1, : model.vocab_size]
        likeliest = [int(logits.argmax())]
        word = tokenizer.decode(likeliest)
        fits = (
            word[0] == " "
            and word.strip() == word[1:]
            and tokenizer.encode(context + word) == ids + likeliest
        )
        made.append({"text": context + word} if fits and number % every == 0 else row)
    return made
