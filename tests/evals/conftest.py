"""lm-eval beside us: the same weights in a Hugging Face model, the same rows in task files of its own."""

from __future__ import annotations

import json
import logging
import lzma
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regpt.config import ModelConfig
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer, open_tokenizer

TASKS = Path(__file__).parent / "lm_eval_tasks"


@pytest.fixture(scope="session")
def gpt2_files(test_data: Path) -> Path:
    return test_data / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(gpt2_files: Path) -> Tokenizer:
    """GPT-2's."""
    return open_tokenizer("gpt2", files=str(gpt2_files))


def small_model(n_embd: int = 64, n_layer: int = 2, block_size: int = 256) -> GPT2:
    torch.manual_seed(3)
    shape = ModelConfig(n_layer=n_layer, n_head=2, n_embd=n_embd, block_size=block_size, dropout=0.0)
    return GPT2(shape, 50257).eval()


@pytest.fixture(scope="session")
def random_model() -> GPT2:
    """Random weights, spread so wide that it has opinions."""
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    return model


@pytest.fixture(scope="session")
def trained_model(test_data: Path, tokenizer: Tokenizer) -> GPT2:
    """Some dozen steps on web text: it knows which tokens are frequent and which follow one another."""
    text = (test_data / "small" / "fineweb_sample_1MB.txt").read_text(encoding="utf-8")[:200_000]
    ids = torch.tensor(tokenizer.encode(text))
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        at = torch.randint(len(ids) - 65, (8,), generator=draw)
        rows = torch.stack([ids[i : i + 65] for i in at.tolist()])
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 8.0  # ln 50257 = 10.8
    return model.eval()


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
    missing = theirs.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
    return theirs.eval()


@dataclass(frozen=True)
class Harness:
    """lm-eval's answers to one task."""

    figures: dict[str, Any]
    logprobs: list[list[tuple[float, bool]]]
    """Of each row, of each of its requests."""


def lm_eval(model: GPT2, files: Path, task: str, rows: Sequence[dict[str, Any]], folder: Path) -> Harness:
    """lm-eval's own definition of `task` on `rows`, with its own Hugging Face model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries, about themselves
        import datasets
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
        from transformers import GPT2TokenizerFast

        datasets.disable_progress_bars()
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / f"{task}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        for template in TASKS.iterdir():
            text = (
                template.read_text(encoding="utf-8").replace("DATA", str(data)).replace("CACHE", str(folder))
            )
            (folder / template.name).write_text(text, encoding="utf-8")
        theirs = GPT2TokenizerFast(str(files / "encoder.json"), str(files / "vocab.bpe"))
        found = simple_evaluate(
            HFLM(pretrained=as_hugging_face(model), tokenizer=theirs, batch_size=4, device="cpu"),
            tasks=[f"local_{task}"],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            random_seed=0,
        )
    samples = sorted(found["samples"][f"local_{task}"], key=lambda s: s["doc_id"])
    logprobs = [
        [(r[0], r[1]) if isinstance(r, tuple | list) else (r, False) for r in s["filtered_resps"]]
        for s in samples
    ]
    return Harness(found["results"][f"local_{task}"], logprobs)


def packed_rows(path: Path, count: int) -> list[dict[str, Any]]:
    """The first rows of a packed file of JSON lines."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(count), lines, strict=False)]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
