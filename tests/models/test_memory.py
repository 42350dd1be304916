"""Memory by arithmetic, against processes that train and against what autograd really keeps."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regpt.config import ModelConfig, OptimConfig
from regpt.models import build_model
from regpt.models.attention import by_products
from regpt.models.count import SIZES, count_parameters
from regpt.models.memory import Memory, memory_estimate, saved_bytes_per_token
from regpt.models.modern import Modern
from regpt.optim.groups import make_optimizer

SMALL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64}
MIDDLE = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}
LARGE = {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 512}
DROPOUT = {"dropout": 0.2}


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver() >= ("glibc", "2.38") or torch.version.cuda is not None,
    reason="measured with glibc before 2.38, whose allocation of aligned blocks changed then, and PyTorch's CPU build",
)
@pytest.mark.parametrize(
    ("shape", "tokenizer", "rows", "dtype", "n_micro", "steps"),
    [
        (SMALL, "chars", 12, "float32", 1, 40),
        (SMALL | {"n_embd": 192, "block_size": 128}, "chars", 16, "bfloat16", 1, 40),
        (SMALL, "chars", 12, "bfloat16", 4, 40),
        (MIDDLE, "chars", 16, "float32", 1, 4),
        (MIDDLE, "chars", 16, "bfloat16", 1, 4),
        (MIDDLE, "chars", 64, "bfloat16", 1, 4),
        (MIDDLE, "chars", 16, "float32", 4, 4),
        (MIDDLE | DROPOUT, "chars", 16, "float32", 1, 4),
        (MIDDLE | DROPOUT, "chars", 64, "bfloat16", 1, 4),
        (LARGE, "gpt2", 2, "float32", 1, 4),
        (LARGE, "gpt2", 2, "bfloat16", 1, 4),
        (LARGE, "gpt2", 2, "bfloat16", 2, 4),
    ],
    ids=str,
)
def test_peak_of_a_run(
    shape: dict[str, Any],
    tokenizer: str,
    rows: int,
    dtype: str,
    n_micro: int,
    steps: int,
    tmp_path: Path,
    test_data: Path,
) -> None:
    """The resident set of `regpt train`, with its preparation, evaluation, sample and saves, within 15 % of its plan."""
    flags = {f"model.{k}": v for k, v in shape.items()} | {
        "data.source": test_data / "small/tinyshakespeare.txt",
        "tokenizer.name": tokenizer,
        "train.steps": steps,
        "train.batch_tokens": rows * n_micro * shape["block_size"],
        "train.micro_rows": rows,
        "train.dtype": dtype,
        "optim.warmup_steps": 1,
        "eval.every": steps // 2,
    }
    if tokenizer == "gpt2":
        flags["tokenizer.files"] = test_data / "tokenizer"
    command = [sys.executable, "-m", "regpt", "train", "demo", "--out", str(tmp_path / "run"), "--json"]
    for name, value in flags.items():
        command += [f"--{name}", str(value)]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
    assert status == 0, (tmp_path / "log").read_text()
    planned = json.loads((tmp_path / "run/run.json").read_text())["plan"]["memory"]["total"]
    assert planned == pytest.approx(usage.ru_maxrss * 1024, rel=0.15)


def kept_by_autograd(
    layers: int, dtype: str, dropout: float, arch: str = "gpt2", *, recompute: bool = False
) -> int:
    """Bytes of all storages that the backward pass holds, parameters aside, of 4 rows of 128 tokens."""
    torch.manual_seed(0)
    shape = {"n_head": 4, "n_embd": 64, "block_size": 128, "dropout": dropout}
    model = build_model(ModelConfig(arch=arch, n_layer=layers, **shape), 65)  # type: ignore[arg-type]
    model.checkpoint_activations = recompute
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # holding every tensor keeps addresses from being used twice

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        return tensor

    ids = torch.zeros(4, 128, dtype=torch.int64)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
        model(ids, ids)
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in alive)}
    return sum(size for address, size in storages.items() if address not in own)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_those_that_autograd_keeps(dtype: str, dropout: float) -> None:
    """Of one more layer, within 1.5 %: what is not counted are sums and means of rows."""
    layer = kept_by_autograd(3, dtype, dropout) - kept_by_autograd(2, dtype, dropout)
    casts = 2 * 12 * 64 * 64 if dtype == "bfloat16" else 0  # weights in 16 bits, counted apart
    config = ModelConfig(n_layer=3, n_head=4, n_embd=64, block_size=128, dropout=dropout)
    width = 2 if by_products("cpu", getattr(torch, dtype), 128) and dtype == "bfloat16" else 4
    passing = width * 4 * 128 if dropout else 0  # one matrix of attention weights in passing
    counted = saved_bytes_per_token(config, dtype, "cpu") - passing
    assert counted == pytest.approx((layer - casts) / (4 * 128), rel=0.015)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_modern_models_activations_are_near_what_autograd_keeps(dtype: str, dropout: float) -> None:
    """Of two more layers, one of them with value embeddings, within 8 %."""
    two = kept_by_autograd(4, dtype, dropout, arch="modern") - kept_by_autograd(
        2, dtype, dropout, arch="modern"
    )
    casts = 2 * 2 * 12 * 64 * 64 if dtype == "bfloat16" else 0
    config = ModelConfig(arch="modern", n_layer=4, n_head=4, n_embd=64, block_size=128, dropout=dropout)
    width = 2 if by_products("cpu", getattr(torch, dtype), 128) and dtype == "bfloat16" else 4
    passing = width * 4 * 128 if dropout else 0
    counted = saved_bytes_per_token(config, dtype, "cpu") - passing
    assert counted == pytest.approx((two - casts) / (2 * 4 * 128), rel=0.08)


def test_muon_keeps_one_moment_of_a_matrix() -> None:
    """The optimizer's state, as it is after a step."""
    config = ModelConfig(arch="modern", n_layer=2, n_head=2, n_embd=32, block_size=16)
    model = Modern(config, 65)
    optimizer = make_optimizer(model, OptimConfig(name="muon"), "cpu")
    ids = torch.zeros(1, 16, dtype=torch.int64)
    model(ids, ids).backward()
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for key, t in state.items() if key != "step")
    memory = memory_estimate(config, 65, micro_rows=1, dtype="float32", device_type="cuda", optimizer="muon")
    assert (memory.optimizer, memory.weights) == (held, sum(p.nbytes for p in model.parameters()))


def test_parts_follow_from_the_parameters() -> None:
    """Weights, two moments, and, where micro-batches accumulate, all gradients, in float32."""
    config, n = SIZES["gpt2"], count_parameters(SIZES["gpt2"], 50257).stored
    memory = memory_estimate(config, 50257, micro_rows=4, dtype="bfloat16", device_type="cuda", n_micro=8)
    assert (memory.weights, memory.optimizer) == (4 * n, 8 * n)
    assert memory.gradients == 4 * n + 4 * 50304 * 768
    assert (
        memory.logits == 6 * 586 * 50304 + 2 * 50304 * 768
    )  # a chunk of 586 positions; part of the head's gradient
    compiled = memory_estimate(
        config, 50257, micro_rows=4, dtype="bfloat16", device_type="cuda", n_micro=8, compiled=True
    )
    assert compiled.logits == 12 * 4 * 1024 * 50304
    assert memory.total == sum(
        (
            memory.process,
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.activations,
            memory.logits,
        )
    )


def test_memory_grows_with_rows_and_shrinks_with_16_bits() -> None:
    config = ModelConfig(**MIDDLE)

    def total(rows: int, dtype: str, n_micro: int = 1) -> int:
        return memory_estimate(
            config, 4096, micro_rows=rows, dtype=dtype, device_type="cuda", n_micro=n_micro
        ).total

    assert total(8, "float32") < total(16, "float32") < total(16, "float32", n_micro=2)
    assert total(16, "float16") == total(16, "bfloat16") < total(16, "float32")


def test_shards_levels_of_sums_and_recomputation_have_their_price() -> None:
    """FSDP2 divides what is kept and gathers two layers and the embedding; the exact sum keeps a list for each level."""
    config, n = SIZES["gpt2"], count_parameters(SIZES["gpt2"], 50257)

    def memory(**more: Any) -> Memory:
        settings = {"micro_rows": 4, "dtype": "bfloat16", "device_type": "cuda", "n_micro": 8} | more
        return memory_estimate(config, 50257, **settings)

    plain, sharded = memory(), memory(shards=8)
    assert (sharded.optimizer, sharded.gradients) == (plain.optimizer // 8, plain.gradients // 8)
    assert sharded.weights == n.stored // 2 + 4 * (n.stored - n.blocks) + 8 * n.blocks // 12
    assert memory(exact_sums=True).gradients - plain.gradients == 3 * 4 * n.stored
    less = memory(checkpoint_activations=True)
    assert less.activations < plain.activations / 3 and less.total < plain.total


@pytest.mark.parametrize("several", [False, True])
def test_recomputed_activations_are_those_that_autograd_keeps(several: bool) -> None:
    """Of one more layer: the stream, and nothing else."""
    dtype = "bfloat16" if several else "float32"
    layer = kept_by_autograd(3, dtype, 0.0, recompute=True) - kept_by_autograd(2, dtype, 0.0, recompute=True)
    assert layer == 4 * 64 * 4 * 128
