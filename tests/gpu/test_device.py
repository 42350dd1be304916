"""What a device must compute as the CPU does: both models, the loss in chunks, the cache, Muon, training and its resuming.

Each test runs on the CPU, where it proves itself, and on CUDA where there is one. `benchmarks/gpu.py` runs this file first:
a speed says nothing of a step that is wrong.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.config import Config, ModelConfig, ModernConfig
from regpt.infer.engine import complete
from regpt.infer.settings import SamplingSettings
from regpt.models import build_model
from regpt.models.gpt2 import GPT2
from regpt.models.loss import linear_cross_entropy
from regpt.models.modern import Modern
from regpt.optim.muon import orthogonalize
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train.machine import peak_memory_bytes, probe
from regpt.train.session import train
from tiny import TINY_TEXT, tiny_config

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)]
pytestmark = pytest.mark.parametrize("device", DEVICES)

VOCABULARY = 257
SHAPES = {
    "gpt2": ModelConfig(n_layer=2, n_head=2, n_embd=128, block_size=64),
    "modern": ModelConfig(
        arch="modern",
        n_layer=3,
        n_head=2,
        n_embd=128,
        block_size=64,
        modern=ModernConfig(),
    ),
}


def made(arch: str) -> GPT2 | Modern:
    """A model whose every weight has been stirred, so that no part is zero at the beginning."""
    torch.manual_seed(0)
    model = build_model(SHAPES[arch], VOCABULARY)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return model.eval()


def batch(seed: int = 1, rows: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCABULARY, (rows, 65), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


@pytest.mark.parametrize("arch", SHAPES)
def test_losses_and_gradients_equal_those_in_float64(arch: str, device: str) -> None:
    """Float32 on the device beside float64 on the CPU, TF32 off."""
    x, y = batch()
    exact, model = made(arch).double(), made(arch).to(device)
    torch.set_float32_matmul_precision("highest")
    expected, got = exact(x, y), model(x.to(device), y.to(device))
    expected.backward(), got.backward()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), b in zip(exact.named_parameters(), model.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None, name
        torch.testing.assert_close(
            b.grad.cpu().double(), a.grad, rtol=1e-3, atol=1e-5 * float(a.grad.abs().max())
        )


@pytest.mark.parametrize("arch", SHAPES)
def test_bfloat16_stays_near_float32(arch: str, device: str) -> None:
    """The loss within a hundredth, every large gradient in nearly the same direction."""
    x, y = (t.to(device) for t in batch())
    one, other = made(arch).to(device), made(arch).to(device)
    loss = one(x, y)
    with torch.autocast(device, dtype=torch.bfloat16):
        near = other(x, y)
    loss.backward(), near.backward()
    assert near.item() == pytest.approx(loss.item(), rel=0.01)
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        if a.dim() == 2 and a.grad is not None and b.grad is not None and float(a.grad.norm()) > 1e-4:
            assert float(F.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)) > 0.98, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_chunks_equals_the_plain_one(device: str, dtype: torch.dtype) -> None:
    """At GPT-2's vocabulary: loss and both gradients, also of targets that do not count."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    hidden = torch.randn(2, 96, 64, device=device, requires_grad=True)
    head = (torch.randn(50304, 64, device=device) * 0.05).requires_grad_()
    y = torch.randint(50257, (2, 96), device=device)
    y[0, :7] = -1
    results = []
    for chunked in (True, False):
        hidden.grad = head.grad = None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            if chunked:
                loss = linear_cross_entropy(hidden, head, y, vocab_size=50257)
            else:
                logits = F.linear(hidden, head)[..., :50257].float()
                loss = F.cross_entropy(logits.reshape(-1, 50257), y.reshape(-1), ignore_index=-1)
        loss.backward()
        assert hidden.grad is not None and head.grad is not None
        results.append((loss.item(), hidden.grad.clone(), head.grad.clone()))
    (a, da, dwa), (b, db, dwb) = results
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert a == pytest.approx(b, rel=tolerance)
    for g, h in ((da, db), (dwa, dwb)):
        assert float((g - h).norm() / h.norm()) < 10 * tolerance


@pytest.mark.parametrize("arch", SHAPES)
def test_the_cache_changes_no_text(arch: str, device: str) -> None:
    torch.set_float32_matmul_precision("highest")
    model, settings = made(arch).to(device), SamplingSettings(max_new_tokens=90, temperature=0.0)
    first, second = (
        complete(model, ByteTokenizer(), "To be, or", settings, cached=cached)[0].tokens
        for cached in (True, False)
    )
    assert first == second and len(first) > 40


def test_matrices_are_made_orthogonal_as_on_the_cpu(device: str) -> None:
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    matrices = torch.randn(3, 96, 160)
    torch.testing.assert_close(
        orthogonalize(matrices.to(device)).cpu(), orthogonalize(matrices), rtol=1e-3, atol=1e-4
    )


def run(folder: Path, device: str, change: Callable[[Config], Config] = lambda c: c) -> list[float]:
    """The losses of each step of a run in `folder`."""
    config = tiny_config()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=str(folder.parent / "text.txt")),
        train=dataclasses.replace(config.train, device=device, dtype="auto"),
        optim=dataclasses.replace(config.optim, schedule="constant"),
    )
    train(change(config), folder)
    lines = (json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines())
    return [e["loss"] for e in lines if e["event"] == "step"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text(TINY_TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def longer(steps: int) -> Callable[[Config], Config]:
    return lambda c: dataclasses.replace(c, train=dataclasses.replace(c.train, steps=steps))


def test_a_run_that_goes_on_learns_what_an_uninterrupted_one_does(place: Path, device: str) -> None:
    """To the bit on a CPU; on CUDA sums of attention's backward pass have no fixed order."""
    whole = run(place / "whole", device, longer(12))
    run(place / "parts", device, longer(6))
    parts = run(place / "parts", device, longer(12))
    assert len(whole) == 12 and whole[-1] < whole[0] - 0.5
    if device == "cpu":
        assert parts == whole
    else:
        assert parts == pytest.approx(whole, rel=2e-2)


def test_compiled_steps_learn_the_same(place: Path, device: str) -> None:
    if device == "cpu":
        pytest.skip("tests/train/test_compile.py compiles on the CPU")

    def compiled(c: Config) -> Config:
        return dataclasses.replace(c, train=dataclasses.replace(c.train, compile="on"))

    assert run(place / "compiled", device, compiled) == pytest.approx(run(place / "plain", device), rel=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_dtype_learns(place: Path, device: str, dtype: str) -> None:
    if device == "cpu" and dtype == "float16":
        pytest.skip("float16 needs a GPU")

    def typed(c: Config) -> Config:
        return dataclasses.replace(c, train=dataclasses.replace(c.train, dtype=dtype))

    losses = run(place / dtype, device, typed)
    assert losses[-1] < losses[0] - 0.5


def test_muon_learns(place: Path, device: str) -> None:
    def muon(c: Config) -> Config:
        return dataclasses.replace(
            c,
            model=dataclasses.replace(c.model, arch="modern"),
            optim=dataclasses.replace(c.optim, name="muon", decay="linear", clip_norm=None),
        )

    losses = run(place / "muon", device, muon)
    assert losses[-1] < losses[0] - 0.5


def test_the_peak_is_what_this_device_used(device: str) -> None:
    machine = probe(device)
    before = peak_memory_bytes(machine)
    kept = torch.ones(64 << 20, device=machine.device)
    assert float(kept[-1]) == 1 and peak_memory_bytes(machine) >= max(before, kept.nbytes)
