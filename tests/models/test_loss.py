"""The loss by chunks against PyTorch's cross-entropy and autograd on all logits."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.config import ModelConfig
from regpt.errors import ConfigError
from regpt.models import build_model, loss
from regpt.models.loss import CHUNK_BYTES, CHUNKED_FROM, chunk_rows, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, WIDTH, CHANNELS = 120, 128, 32


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 6, 6 and 5 of 17 positions."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * WIDTH * 7)
    assert chunk_rows(17, WIDTH) == 6


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One row of 17 positions, three of them without a target; logits of a spread of six."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 17, CHANNELS, generator=random, dtype=torch.float64)
    matrix = torch.randn(WIDTH, CHANNELS, generator=random, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (1, 17), generator=random)
    targets[0, [0, 7, 16]] = -1
    return hidden.to(dtype).requires_grad_(), matrix.to(dtype).requires_grad_(), targets


def on_all_logits(
    hidden: Tensor, matrix: Tensor, targets: Tensor, softcap: float | None, reduction: str
) -> Tensor:
    """PyTorch's own, padding ids aside."""
    logits = F.linear(hidden, matrix[:VOCAB]).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    value = F.cross_entropy(wide, targets.flatten(), ignore_index=-1, reduction=reduction)
    return value.view_as(targets) if reduction == "none" else value


def both(
    dtype: torch.dtype, softcap: float | None, reduction: str, targets: Tensor | None = None
) -> list[list[Tensor]]:
    """Value and both gradients, ours and PyTorch's; the incoming gradients differ from position to position."""
    found = []
    for ours in (True, False):
        hidden, matrix, some = inputs(dtype)
        y = some if targets is None else targets
        if ours:
            value = linear_cross_entropy(
                hidden, matrix, y, vocab_size=VOCAB, softcap=softcap, reduction=reduction
            )
        else:
            value = on_all_logits(hidden, matrix, y, softcap, reduction)
        incoming = torch.linspace(0.5, 2.5, value.numel()).view_as(value).to(value.dtype)
        found.append([value.detach(), *torch.autograd.grad(value, (hidden, matrix), incoming)])
    return found


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)], ids=str)
def test_value_and_gradients_are_pytorchs(
    dtype: torch.dtype, bound: float, softcap: float | None, reduction: str
) -> None:
    for ours, theirs in zip(*both(dtype, softcap, reduction), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound * float(theirs.abs().max()))


@pytest.mark.usefixtures("few_rows")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_under_autocast_it_is_as_near_to_float32_as_pytorch_is(softcap: float | None, reduction: str) -> None:
    """Errors within 1.5 times those of the plain form in bfloat16; gradients are of the parameters' own dtype."""
    exact = both(torch.float32, softcap, reduction)[1]
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = both(torch.float32, softcap, reduction)
    for a, b, truth in zip(ours, plain, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - truth).norm() <= 1.5 * (b - truth).norm() + 1e-6 * truth.norm()
        assert (a - truth).norm() < 0.02 * truth.norm()


@pytest.mark.usefixtures("few_rows")
def test_where_no_target_counts() -> None:
    """The mean is NaN, as PyTorch's; sum and gradients are zero."""
    nothing = torch.full((1, 17), -1)
    for reduction in ("mean", "sum", "none"):
        ours, theirs = both(torch.float32, None, reduction, nothing)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.0, atol=0.0, equal_nan=True)
        assert not ours[1].any() and not ours[2].any()


@pytest.mark.usefixtures("few_rows")
def test_without_gradients_it_is_the_same_to_the_bit() -> None:
    hidden, matrix, targets = inputs(torch.float32)
    for reduction in ("mean", "sum", "none"):
        trained = linear_cross_entropy(hidden, matrix, targets, vocab_size=VOCAB, reduction=reduction)
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, matrix, targets, vocab_size=VOCAB, reduction=reduction)
        assert torch.equal(trained, alone) and not alone.requires_grad


@pytest.mark.usefixtures("few_rows")
def test_gradients_are_the_same_bits_each_time() -> None:
    first, again = (both(torch.float32, None, "mean")[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_second_backward_pass_is_refused() -> None:
    """The gradients were multiplied in place: silently they would be wrong."""
    hidden, matrix, targets = inputs(torch.float32)
    value = linear_cross_entropy(hidden, matrix, targets, vocab_size=VOCAB)
    torch.autograd.grad(value, matrix, torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(value, matrix, torch.tensor(0.5))


def test_an_unknown_reduction_is_refused() -> None:
    hidden, matrix, targets = inputs(torch.float32)
    with pytest.raises(ConfigError) as caught:
        linear_cross_entropy(hidden, matrix, targets, vocab_size=VOCAB, reduction="max")
    assert str(caught.value) == (
        "the reduction of a loss is unknown.\n  got: 'max'\n  expected: mean, sum or none"
    )


@pytest.mark.parametrize(
    ("positions", "width", "rows"), [(1, 128, 1), (0, 128, 0), (1024, 50304, 512), (4096, 50304, 586)]
)
def test_chunks_are_few_and_equal(positions: int, width: int, rows: int) -> None:
    assert chunk_rows(positions, width) == rows
    assert rows * width * 4 <= CHUNK_BYTES


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("recompute", [False, True])
def test_models_with_large_vocabularies_learn_the_same(
    arch: str, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss and every gradient, the tied matrix's both parts among them, beside the model's own logits."""
    torch.manual_seed(0)
    config = ModelConfig(arch=arch, n_layer=2, n_head=2, n_embd=16, block_size=24)  # type: ignore[arg-type]
    model = build_model(config, CHUNKED_FROM - 28)
    model.checkpoint_activations = recompute
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # what begins at zero hides what stands before it
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * CHUNKED_FROM * 7)
    ids = torch.randint(0, CHUNKED_FROM - 28, (2, 24))
    targets = torch.where(torch.rand(2, 24) < 0.2, -1, ids.roll(-1, 1))
    value = model(ids, targets)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    logits = model(ids).flatten(0, 1)
    plain = F.cross_entropy(logits, targets.flatten(), ignore_index=-1)
    torch.testing.assert_close(value, plain)
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("vocabulary", [65, CHUNKED_FROM])
def test_only_large_vocabularies_are_in_chunks(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And none while torch.compile traces."""
    model = build_model(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=4), vocabulary)
    used = []
    monkeypatch.setattr(
        "regpt.models.gpt2.linear_cross_entropy", lambda *a, **k: used.append(1) or torch.zeros(())
    )
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model(ids, ids)
    assert bool(used) == (vocabulary >= CHUNKED_FROM)
    used.clear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, ids), F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()))
    assert not used


PEAK = """
import resource, sys, torch
import torch.nn.functional as F
from regpt.models.loss import linear_cross_entropy
torch.set_num_threads(1)
positions, width, channels, chunked = 4096, 32768, 16, sys.argv[1] == "chunked"
hidden = torch.randn(1, positions, channels, requires_grad=True)
matrix = torch.randn(width, channels, requires_grad=True)
targets = torch.zeros(1, positions, dtype=torch.int64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if chunked:
    value = linear_cross_entropy(hidden, matrix, targets, vocab_size=width)
else:
    value = F.cross_entropy(F.linear(hidden, matrix).flatten(0, 1), targets.flatten())
value.backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kibibytes there")
def test_a_process_does_not_hold_all_logits() -> None:
    """512 MiB of logits: the plain form holds them more than twice, ours a quarter of them and little else."""

    def peak(form: str) -> int:
        run = subprocess.run([sys.executable, "-c", PEAK, form], capture_output=True, text=True, check=True)
        return int(run.stdout)

    logits = 4096 * 32768 * 4
    assert peak("chunked") < 0.5 * logits
    assert peak("plain") > 2 * logits
