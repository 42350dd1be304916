"""GPT-2 against `GPT2LMHeadModel`: the same random weights give the same logits, losses and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regpt.config import ModelConfig
from regpt.models import IGNORE
from regpt.models.gpt2 import GPT2

hf = pytest.importorskip("transformers")

LOGITS = 1e-5  # measured over ten seeds: 3.4e-6 at most
GRADIENTS = 1e-6  # of the largest in a tensor, if that is above 1; measured: 1.6e-7
LOSS = 1e-6  # relative; measured: 2e-7

# (layers, heads, channels, context, vocabulary, biases): odd vocabularies, one head, three heads, one position
SHAPES = [
    (1, 1, 8, 5, 65, True),
    (2, 1, 48, 33, 211, True),
    (3, 3, 48, 64, 211, True),
    (2, 4, 64, 17, 128, True),
    (4, 4, 32, 24, 129, True),
    (2, 3, 96, 12, 50257, True),
    (2, 4, 64, 32, 211, False),
    (3, 1, 24, 16, 65, False),
]


def theirs_as_ours(name: str, p: Tensor) -> Tensor:
    """Conv1D keeps (in, out); this is its weight, or its gradient, as a Linear's (out, in), and the reverse."""
    return p.T if ".c_" in name and name.endswith("weight") else p


def pair(shape: tuple[int, int, int, int, int, bool], seed: int) -> tuple[GPT2, Any]:
    """Our model and HF's with equal weights, every one of them random: norms and biases too.

    The spread is wide enough for attention to prefer some positions and for GELU to bend.
    """
    layers, heads, channels, context, vocab, bias = shape
    torch.manual_seed(seed)
    ours = GPT2(
        ModelConfig(n_layer=layers, n_head=heads, n_embd=channels, block_size=context, bias=bias), vocab
    ).eval()
    theirs = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=vocab,
            n_positions=context,
            n_embd=channels,
            n_layer=layers,
            n_head=heads,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",  # written out in matrix products, unlike ours
        )
    ).eval()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            norm = ".ln_" in f".{name}" and name.endswith("weight")
            p.normal_(1.0 if norm else 0.0, 0.1)
        ours.wte.weight[vocab:] = 0.0
        for name, p in theirs.transformer.named_parameters():
            own = dict(ours.named_parameters()).get(name)
            p.zero_() if own is None else p.copy_(theirs_as_ours(name, own[:vocab] if "wte" in name else own))
    return ours, theirs


def tokens(shape: tuple[int, int, int, int, int, bool], rows: int = 3) -> Tensor:
    """As many positions as fit."""
    return torch.randint(0, shape[4], (rows, shape[3]), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_equal(shape: tuple[int, int, int, int, int, bool]) -> None:
    """Over the full context, to float32 rounding; and in float64 to float64's, so nothing hides in the tolerance."""
    ours, theirs = pair(shape, seed=1)
    ids, vocab = tokens(shape), shape[4]
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 0.2, "weights too small to tell anything"
        torch.testing.assert_close(ours(ids)[..., :vocab], expected, rtol=0.0, atol=LOGITS)
        expected = theirs.double()(ids).logits
        torch.testing.assert_close(ours.double()(ids)[..., :vocab], expected, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradients_are_equal(shape: tuple[int, int, int, int, int, bool]) -> None:
    """Of every parameter, with a third of the targets ignored; HF shifts its labels itself."""
    ours, theirs = pair(shape, seed=2)
    ids, vocab = tokens(shape), shape[4]
    ignored = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)) < 1 / 3
    expected = theirs(ids, labels=ids.masked_fill(ignored, -100)).loss
    loss = ours(ids[:, :-1], ids.masked_fill(ignored, IGNORE)[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=LOSS, atol=0.0)

    loss.backward()
    expected.backward()
    wanted = dict(theirs.transformer.named_parameters())
    for name, p in ours.named_parameters():
        assert p.grad is not None
        grad = p.grad[:vocab] if name == "wte.weight" else p.grad
        expected_grad = wanted[name].grad
        assert expected_grad is not None and expected_grad.abs().max() > 0, name
        torch.testing.assert_close(
            grad,
            theirs_as_ours(name, expected_grad),
            rtol=0.0,
            atol=GRADIENTS * max(1.0, expected_grad.abs().max().item()),
            msg=lambda text, name=name: f"{name}: {text}",
        )


def test_every_hugging_face_parameter_has_ours() -> None:
    """And nothing more: names are theirs, without the prefix, the head being the token embedding."""
    ours, theirs = pair((2, 2, 8, 8, 65, True), seed=0)
    assert list(ours.state_dict()) == [name for name, _ in theirs.transformer.named_parameters()]
