"""What GPT-2 promises beside equality with Hugging Face, which tests/reference proves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from regpt.config import ModelConfig
from regpt.errors import ConfigError
from regpt.models import IGNORE
from regpt.models.gpt2 import GPT2

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 211


def built(vocab: int = VOCAB, *, seed: int = 0, **shape: Any) -> GPT2:
    """A small model as training would start it."""
    torch.manual_seed(seed)
    return GPT2(ModelConfig(**{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16} | shape), vocab)


def some_ids(rows: int = 3, positions: int = 16, vocab: int = VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (rows, positions), generator=torch.Generator().manual_seed(seed))


# --- the start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_layer", [1, 2, 8])
def test_every_kind_of_parameter_starts_as_gpt2s(n_layer: int) -> None:
    """0.02; 0.02 / sqrt(2 layers) for what writes into the stream; norms 1, biases 0, padding 0. To 5 % and 5 sigma."""
    model = built(n_layer=n_layer, n_embd=64, block_size=128, vocab=1000)
    for name, p in model.named_parameters():
        if name.endswith(".bias"):
            assert not p.any(), name
        elif "ln_" in name:
            assert (p == 1.0).all(), name
        else:
            std = 0.02 / math.sqrt(2 * n_layer) if "c_proj" in name else 0.02
            own = p[:1000] if name == "wte.weight" else p
            assert own.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(own.mean().item()) < 5 * std / math.sqrt(own.numel()), name
    assert not model.wte.weight[1000:].any()


def test_biases_can_be_left_out() -> None:
    """In norms as well; everything else stays."""
    with_bias, without = built().state_dict(), built(bias=False).state_dict()
    assert not any(name.endswith(".bias") for name in without)
    assert set(with_bias) - set(without) == {name for name in with_bias if name.endswith(".bias")}


@pytest.mark.parametrize("vocab", [65, VOCAB, 4096, 50257])
def test_first_loss_is_that_of_knowing_nothing(vocab: int) -> None:
    """ln(V), not that of the padded vocabulary."""
    model, ids = built(vocab), some_ids(4, 17, vocab)
    with torch.no_grad():
        loss = model(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(vocab), abs=0.05)


def test_weights_follow_the_seed() -> None:
    one, same, other = built(seed=5).state_dict(), built(seed=5).state_dict(), built(seed=6).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["wte.weight"], other["wte.weight"])


# --- vocabulary -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "padded"), [(65, 128), (128, 128), (129, 256), (VOCAB, 256)])
def test_padding_ids_can_never_be_sampled(vocab: int, padded: int) -> None:
    """Their logits are -inf, others finite."""
    logits = built(vocab)(some_ids(vocab=vocab))
    assert logits.shape == (3, 16, padded)
    assert torch.isneginf(logits[..., vocab:]).all() and logits[..., :vocab].isfinite().all()


def test_padding_rows_never_move() -> None:
    """Gradients exactly zero, so AdamW with weight decay leaves them at zero too."""
    model, ids = built(), some_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, ids).backward()
        assert model.wte.weight.grad is not None
        assert not model.wte.weight.grad[VOCAB:].any() and model.wte.weight.grad[:VOCAB].any(dim=1).all()
        optimizer.step()
    assert not model.wte.weight[VOCAB:].any()


def test_head_and_embedding_are_one_tensor() -> None:
    """One parameter, one entry in the state dict; changing it changes both ends."""
    model = built()
    assert [n for n, p in model.named_parameters() if p.shape[0] == model.padded_vocab_size] == ["wte.weight"]
    hidden = model.hidden(some_ids())
    torch.testing.assert_close(model.head(hidden)[..., :VOCAB], hidden @ model.wte.weight[:VOCAB].T)
    before, ids = model.head(hidden), some_ids()
    with torch.no_grad():
        model.wte.weight.mul_(2.0)
    torch.testing.assert_close(model.head(hidden), 2 * before)
    assert not torch.equal(model.hidden(ids), hidden)


def test_mask_of_padding_is_not_saved() -> None:
    """A checkpoint holds weights only, under Hugging Face's names."""
    names = set(built(n_layer=1).state_dict())
    parts = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    expected = {f"h.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert names == expected | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}


def test_built_on_meta_and_started_later_is_the_same() -> None:
    """The mask, which no checkpoint holds, too."""
    with torch.device("meta"):
        model = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16), VOCAB)
    model.to_empty(device="cpu").init_weights()
    logits = model(some_ids())
    assert torch.isneginf(logits[..., VOCAB:]).all() and logits[..., :VOCAB].isfinite().all()


# --- loss -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_reductions(ignored: float) -> None:
    """Against a log-softmax written out; ignored targets count in none of them, nor in the mean's denominator."""
    model, ids, targets = built().eval(), some_ids(), some_ids(seed=2)
    targets[torch.rand(targets.shape, generator=torch.Generator().manual_seed(3)) < ignored] = IGNORE
    assert IGNORE == -1
    counts = targets != IGNORE
    assert counts.all() == (ignored == 0.0)
    log_p = model(ids)[..., :VOCAB].log_softmax(-1)
    by_hand = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * counts
    torch.testing.assert_close(model(ids, targets, reduction="none"), by_hand)
    torch.testing.assert_close(model(ids, targets, reduction="sum"), by_hand.sum())
    torch.testing.assert_close(model(ids, targets), by_hand.sum() / counts.sum())
    assert not model(ids, targets, reduction="none")[~counts].any()


def test_gradient_of_a_sum_is_the_mean_times_the_targets() -> None:
    """So accumulated micro-batches can be weighted exactly."""
    model, ids, targets = built(), some_ids(), some_ids(seed=2)
    targets[0, :9] = IGNORE
    mean = torch.autograd.grad(model(ids, targets), list(model.parameters()))
    total = torch.autograd.grad(model(ids, targets, reduction="sum"), list(model.parameters()))
    for a, b in zip(mean, total, strict=True):
        torch.testing.assert_close(a * (targets != IGNORE).sum(), b, rtol=1e-4, atol=1e-5)


def test_targets_may_be_a_slice() -> None:
    """Not contiguous, as a window shifted by one is."""
    model, ids = built().eval(), some_ids(3, 17)
    torch.testing.assert_close(
        model(ids[:, :-1], ids[:, 1:]), model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
    )


def test_bfloat16_autocast_stays_close() -> None:
    """The loss comes in float32, padding stays out of reach, gradients stay float32 and near."""
    model, ids, targets = built(), some_ids(), some_ids(seed=2)
    with torch.no_grad():
        for p in model.h.parameters():
            p.mul_(3.0) if p.dim() == 2 else None
    exact = model(ids, targets)
    exact_grads = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        logits, loss = model(ids), model(ids, targets)
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.isneginf(logits[..., VOCAB:]).all()
    assert loss.item() == pytest.approx(exact.item(), abs=2e-3)
    for grad, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), exact_grads, strict=True):
        assert grad.dtype == torch.float32 and grad.isfinite().all()
        assert (grad - wanted).norm() < 0.05 * wanted.norm()


# --- dropout --------------------------------------------------------------------------------------------------


def test_dropout_acts_in_training_only() -> None:
    model, ids = built(dropout=0.2), some_ids()
    assert not torch.equal(model.train()(ids), model(ids))
    quiet = model.eval()(ids)
    assert torch.equal(quiet, model(ids))
    assert torch.equal(quiet, built().eval()(ids)), "evaluation differs from a model built without dropout"


def test_no_dropout_means_training_equals_evaluation() -> None:
    model, ids = built(dropout=0.0), some_ids()
    assert torch.equal(model.train()(ids), model.eval()(ids))


def test_dropout_follows_the_seed() -> None:
    model, ids = built(dropout=0.2).train(), some_ids()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids, ids)

    assert torch.equal(drawn(3), drawn(3)) and not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_rate(rate: float) -> None:
    """In all four places of GPT-2: embeddings, attention weights, both outputs into the stream. To 5 sigma."""
    model = built(n_layer=1, n_head=4, block_size=64, dropout=rate).train()
    attention = model.h[0].attn
    with (
        torch.no_grad()
    ):  # values are all 1, so that position 0 shows its one attention weight, dropped or scaled
        attention.c_attn.weight.zero_()
        attention.c_attn.bias[-32:] = 1.0
    seen: dict[str, Tensor] = {}
    places = {
        "embeddings": model.drop,
        "attention output": attention.resid_dropout,
        "mlp": model.h[0].mlp.dropout,
    }
    for place, module in places.items():
        module.register_forward_hook(lambda _m, i, o, place=place: seen.update({place: o / i[0]}))
    attention.c_proj.register_forward_pre_hook(
        lambda _m, i: seen.update({"attention weights": i[0][:, 0, ::8]})  # one channel of each head
    )
    model(some_ids(1024, 64)[:, :8])
    assert len(seen) == 4
    for place, scale in seen.items():
        scale = scale[scale.isfinite()]
        dropped = scale == 0.0
        assert dropped.double().mean().item() == pytest.approx(
            rate, abs=5 * math.sqrt(rate * (1 - rate) / scale.numel())
        ), place
        torch.testing.assert_close(scale[~dropped], torch.full_like(scale[~dropped], 1 / (1 - rate)))


# --- what cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"n_layer": 0}, "model.n_layer must be at least 1.\n  got: 0"),
        ({"n_head": 0}, "model.n_head must be at least 1.\n  got: 0"),
        ({"n_embd": -4}, "model.n_embd must be at least 1.\n  got: -4"),
        ({"block_size": 0}, "model.block_size must be at least 1.\n  got: 0"),
        (
            {"n_embd": 100, "n_head": 12},
            "model.n_embd=100 is not a multiple of model.n_head=12.\n  try: --model.n-embd 96",
        ),
        (
            {"n_embd": 2, "n_head": 12},
            "model.n_embd=2 is not a multiple of model.n_head=12.\n  try: --model.n-embd 12",
        ),
        ({"dropout": 1.0}, "model.dropout must lie in [0, 1).\n  got: 1.0"),
        ({"dropout": -0.1}, "model.dropout must lie in [0, 1).\n  got: -0.1"),
    ],
)
def test_impossible_shapes_are_refused(shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(**shape)
    assert str(caught.value) == message


def test_more_positions_than_the_context_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        built()(some_ids(1, 17))
    assert str(caught.value) == "17 positions do not fit the model's context of 16 tokens."


def test_gelu_is_gpt2s_tanh_form() -> None:
    """It differs from the exact one by up to 5e-4, which HF's logits would show, and so does this."""
    mlp = built(n_embd=4, n_head=1).h[0].mlp
    x = torch.linspace(-4, 4, 64)
    with torch.no_grad():
        mlp.c_fc.weight.zero_()
        mlp.c_fc.weight[0, 0] = 1.0
        mlp.c_proj.weight.zero_()
        mlp.c_proj.weight[0, 0] = 1.0
        y = mlp(F.pad(x[:, None], (0, 3)))[:, 0]
    by_hand = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(y, by_hand, rtol=0.0, atol=1e-6)
    assert (F.gelu(x) - by_hand).abs().max() > 1e-4
