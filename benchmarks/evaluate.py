"""HellaSwag's rows a second, beside build-nanogpt's way and lm-eval's, and a whole split's loss beside its forward passes.

    python benchmarks/evaluate.py --data hellaswag_val.jsonl --tokenizer DIR [--rows 100] [--rounds 3] [--threads N]
        [--shape 124m|tiny] [--batch 16] [--tokens 16384] [--ways regpt,nanogpt,…] [--json FILE]

Each figure is of a process of its own; processes follow one another in turn, as often as --rounds says, and medians are shown.
All have the same random weights of GPT-2's shape (no weights are downloaded: time does not depend on them) and score the same
rows, spread evenly over the file; encoding is timed, loading is not. --tokenizer is a folder with GPT-2's encoder.json and
vocab.bpe.

regpt         the task `hellaswag` on lm-eval's prompts: acc, acc_norm, acc_bytes
regpt-both    the same and acc_norm_tokens, which has prompts of its own: all that `regpt eval --tasks hellaswag` does
nanogpt       build-nanogpt's way, written anew: row by row, four endings padded to the longest, logits of all positions, then
              the cross-entropy of all positions, masked; this repository's model, float32 products as PyTorch has them
nanogpt-ours  the same with float32 products as regpt chooses them for the machine (oneDNN's on some AMD processors): what of
              the ratio is not the products
lm-eval       lm_eval's HFLM with transformers' GPT2LMHeadModel, --batch requests at a time
loss          `split_loss` over --tokens random ids
passes        the same windows through the model and its loss, in a loop that does nothing else
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

SHAPES = {
    "124m": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024},
    "tiny": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 256},
}
TASK_WAYS, LOSS_WAYS = ("nanogpt", "nanogpt-ours", "lm-eval", "regpt-both", "regpt"), ("passes", "loss")
PEERS = ("nanogpt", "nanogpt-ours", "lm-eval")
SEED, VOCAB_SIZE = 1337, 50257


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shape", choices=SHAPES, default="124m")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--ways", default=",".join((*TASK_WAYS, *LOSS_WAYS)))
    parser.add_argument("--json")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args)))
        return
    found: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways.split(",")}
    for number in range(args.rounds):
        for way in found:
            print(f"round {number + 1} of {args.rounds}: {way}", file=sys.stderr, flush=True)
            found[way].append(in_a_process(way))
    medians = {
        way: {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        for way, rounds in found.items()
    }
    if args.json:
        Path(args.json).write_text(json.dumps({"arguments": vars(args), "medians": medians, "rounds": found}))
    print("\n".join(table(medians)))


def in_a_process(way: str) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return values


def table(medians: dict[str, dict[str, float]]) -> list[str]:
    """Rates, each over that of build-nanogpt's way, and of the loss its time over that of its passes."""
    lines = []
    tasks = {way: values for way, values in medians.items() if way in TASK_WAYS}
    if tasks:
        least = tasks.get("nanogpt", next(iter(tasks.values())))["rate"]
        lines += ["| HellaSwag | rows/s | ratio | peak memory, MiB |", "| --- | --- | --- | --- |"]
        for way, values in tasks.items():
            lines.append(
                f"| {way} | {values['rate']:.2f} | {values['rate'] / least:.2f} | {values['mib']:.0f} |"
            )
    if losses := {way: values for way, values in medians.items() if way in LOSS_WAYS}:
        base = losses.get("passes", next(iter(losses.values())))["seconds"]
        lines += ["", "| loss of a split | seconds | ratio | peak memory, MiB |", "| --- | --- | --- | --- |"]
        for way, values in losses.items():
            lines.append(
                f"| {way} | {values['seconds']:.2f} | {values['seconds'] / base:.3f} | {values['mib']:.0f} |"
            )
    return lines


# --- in a process of its own ------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace) -> dict[str, float]:
    """One way, once."""
    import torch

    from regpt.train.allocator import keep_memory
    from regpt.train.machine import peak_memory_bytes, probe, using

    if args.one not in PEERS:
        keep_memory()  # as `regpt eval` does
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    machine = probe("cpu", args.threads)
    way: str = args.one
    work = {
        "nanogpt": nanogpt,
        "nanogpt-ours": nanogpt,
        "lm-eval": lm_eval,
        "loss": loss,
        "passes": passes,
    }.get(way, regpt)
    # The peers have float32 products as PyTorch makes them, but for the one that is there to tell them apart.
    with contextlib.nullcontext() if way in ("nanogpt", "lm-eval") else using(machine):
        seconds, rows = work(args)
    return {"seconds": seconds, "rate": rows / seconds, "mib": peak_memory_bytes(machine) / 2**20}


def model_of(args: argparse.Namespace) -> Any:
    from regpt.config import ModelConfig
    from regpt.models.gpt2 import GPT2

    shape = SHAPES[args.shape]
    config = ModelConfig(
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["n_embd"],
        block_size=shape["block_size"],
        dropout=0.0,
    )
    return GPT2(config, VOCAB_SIZE).eval()


def task_of(args: argparse.Namespace) -> tuple[Any, Any]:
    """The task, its rows spread over the file, and GPT-2's tokenizer."""
    from regpt.evals.tasks import open_task
    from regpt.tokenizers import open_tokenizer

    task: Any = open_task("hellaswag", Path(args.data))
    step = max(len(task.questions) // args.rows, 1)
    return dataclasses.replace(task, questions=task.questions[::step][: args.rows]), open_tokenizer(
        "gpt2", files=args.tokenizer
    )


def regpt(args: argparse.Namespace) -> tuple[float, int]:
    task, tokenizer = task_of(args)
    model = model_of(args)
    if args.one == "regpt":
        task = dataclasses.replace(
            task, questions=[dataclasses.replace(q, plain=None) for q in task.questions]
        )
    begun = time.perf_counter()
    task.evaluate(model, tokenizer)
    return time.perf_counter() - begun, task.rows


def nanogpt(args: argparse.Namespace) -> tuple[float, int]:
    import torch
    import torch.nn.functional as F

    task, tokenizer = task_of(args)
    model = model_of(args)
    if args.one == "nanogpt":
        torch.set_float32_matmul_precision("high")  # as its train_gpt2.py has it
    begun = time.perf_counter()
    for question in task.questions:
        context, endings = question.plain
        before = tokenizer.encode(context)
        rows = [tokenizer.encode(" " + ending) for ending in endings]
        length = len(before) + max(map(len, rows))
        ids = torch.zeros((len(rows), length), dtype=torch.long)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(before) + len(row)] = torch.tensor(before + row)
            mask[i, len(before) : len(before) + len(row)] = 1
        with torch.no_grad():
            logits = model(ids)
            shifted = logits[..., :-1, :].contiguous()
            losses = F.cross_entropy(
                shifted.view(-1, shifted.size(-1)), ids[..., 1:].contiguous().view(-1), reduction="none"
            ).view(len(rows), -1)
            counted = mask[..., 1:].contiguous()
            means = (losses * counted).sum(dim=1) / counted.sum(dim=1)
        means.argmin().item()
    return time.perf_counter() - begun, task.rows


def lm_eval(args: argparse.Namespace) -> tuple[float, int]:
    warnings.simplefilter("ignore")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

    task, _ = task_of(args)
    shape = SHAPES[args.shape]
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=shape["block_size"],
        n_embd=shape["n_embd"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
    )
    folder = Path(args.tokenizer)
    theirs = HFLM(
        pretrained=GPT2LMHeadModel(config).eval(),
        tokenizer=GPT2TokenizerFast(str(folder / "encoder.json"), str(folder / "vocab.bpe")),
        batch_size=args.batch,
        device="cpu",
    )
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(q.query, f" {choice}"), idx=i)
        for q in task.questions
        for i, choice in enumerate(q.choices)
    ]
    begun = time.perf_counter()
    theirs.loglikelihood(requests, disable_tqdm=True)
    return time.perf_counter() - begun, task.rows


def split_of(args: argparse.Namespace, folder: Path) -> Any:
    import numpy as np

    from regpt.data.split import IdsFile, TokenSplit

    ids = np.random.default_rng(SEED).integers(0, VOCAB_SIZE, args.tokens + 1).astype("<u2")
    (folder / "ids.bin").write_bytes(ids.tobytes())
    return TokenSplit(
        "random",
        [IdsFile(folder / "ids.bin", 0, len(ids), np.dtype("<u2"))],
        document_ends=lambda: np.array([len(ids)]),
        source_bytes=lambda: len(ids),
    )


def rows_of(args: argparse.Namespace) -> int:
    from regpt.evals.likelihood import tokens_of

    return max(tokens_of("cpu") // SHAPES[args.shape]["block_size"], 1)


def loss(args: argparse.Namespace) -> tuple[float, int]:
    from regpt.evals.loss import split_loss

    model = model_of(args)
    with tempfile.TemporaryDirectory() as folder:
        split = split_of(args, Path(folder))
        begun = time.perf_counter()
        split_loss(model, split, rows=rows_of(args))
        return time.perf_counter() - begun, args.tokens


def passes(args: argparse.Namespace) -> tuple[float, int]:
    import torch

    from regpt.data.loader import eval_batches

    model = model_of(args)
    with tempfile.TemporaryDirectory() as folder:
        split = split_of(args, Path(folder))
        batches = list(eval_batches(split, SHAPES[args.shape]["block_size"], rows_of(args)))
        begun = time.perf_counter()
        with torch.no_grad():
            for x, y in batches:
                model(x, y, reduction="sum")
        return time.perf_counter() - begun, args.tokens


if __name__ == "__main__":
    main()
