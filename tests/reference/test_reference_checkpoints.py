"""Weights that others trained or published: our model must compute what theirs computed."""

from __future__ import annotations

import base64
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from regpt.config import ModelConfig
from regpt.models.gpt2 import GPT2

ACTIVATIONS = 5e-6  # measured: 1.4e-6 at most, on values up to 8.4


def test_tiny_gpt2_gives_hugging_faces_logits(test_data: Path) -> None:
    """A checkpoint in HF's layout, read by transformers and by us: the stream everywhere, logits where it begins."""
    hf = pytest.importorskip("transformers")
    folder = test_data / "checkpoints" / "tiny-gpt2"
    theirs = hf.GPT2LMHeadModel.from_pretrained(folder).eval()
    ours = GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=2, block_size=1024), 50257).eval()
    weights = dict(ours.state_dict())
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = name.removeprefix("transformer.")
        linear = ".c_" in own and own.endswith("weight")
        weights[own] = tensor.T if linear else tensor
    padding = torch.zeros(ours.padded_vocab_size - 50257, 2)
    weights["wte.weight"] = torch.cat([weights["wte.weight"], padding])
    ours.load_state_dict(weights)

    ids = torch.randint(0, 50257, (1, 1024), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden, start = theirs.transformer(ids).last_hidden_state, ids[:, :32]
        torch.testing.assert_close(ours.hidden(ids), hidden, rtol=0.0, atol=2e-6)
        torch.testing.assert_close(ours(start)[..., :50257], theirs(start).logits, rtol=0.0, atol=1e-6)


def unpacked(entry: dict[str, Any]) -> Tensor:
    """A tensor of gpt-nano-sort's files: little-endian float32 in base64."""
    flat = np.frombuffer(base64.b64decode(entry["data"]), "<f4")
    return torch.from_numpy(flat.reshape(entry["shape"]).copy())


@pytest.fixture(scope="module")
def sorter(test_data: Path) -> GPT2:
    """minGPT's sorter of six digits 0..2.

    minGPT does not tie its head to the embedding. We do; so ids 0..2 carry its embedding, and ids 3..5, which are never
    put in, carry its head: logits 3..5 are its three.
    """
    file = json.loads((test_data / "checkpoints/gpt-nano-sort/gpt-nano-sort-model.json").read_text())
    shape = file.pop("config")
    weights = {name.removeprefix("transformer."): unpacked(entry) for name, entry in file.items()}
    weights = {name: w for name, w in weights.items() if not name.endswith(".attn.bias")}  # its causal masks
    head = weights.pop("lm_head.weight")
    config = ModelConfig(**{name: shape[name] for name in ("n_layer", "n_head", "n_embd", "block_size")})
    model = GPT2(config, 6).eval()
    padding = torch.zeros(model.padded_vocab_size - 6, config.n_embd)
    weights["wte.weight"] = torch.cat([weights["wte.weight"], head, padding])
    model.load_state_dict(weights)
    return model


@pytest.fixture(scope="module")
def recorded(test_data: Path) -> dict[str, Tensor]:
    """What minGPT computed on the way, by its author's names."""
    file = json.loads((test_data / "checkpoints/gpt-nano-sort/gpt-nano-sort-t0-partials.json").read_text())
    return {name: unpacked(entry) for name, entry in file.items() if name != "config"}


def activations(model: GPT2, ids: Tensor) -> dict[str, Tensor]:
    """The same intermediate values of ours, caught on their way in or out of a module."""
    seen: dict[str, Tensor] = {}
    first = model.h[0]
    outputs = {
        "tok_emb": model.wte,
        "x": model.drop,
        "ln1": first.ln_1,
        "qkv": first.attn.c_attn,
        "yProj": first.attn.c_proj,
        "ln2": first.ln_2,
        "fc": first.mlp.c_fc,
        "mlp": first.mlp.c_proj,
        "block0": first,
        "block1": model.h[1],
        "block2": model.h[2],
        "ln_f": model.ln_f,
    }
    inputs = {"y": first.attn.c_proj, "attnResid": first.ln_2, "gelu": first.mlp.c_proj}

    def keep(name: str, value: Tensor) -> None:
        seen[name] = value

    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: keep(name, out))
        for name, module in outputs.items()
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _m, args, name=name: keep(name, args[0]))
        for name, module in inputs.items()
    ]
    with torch.no_grad():
        logits = model(ids)
    for hook in hooks:
        hook.remove()
    seen["lm_head"] = logits[..., 3:6]
    seen["probs"] = seen["lm_head"].softmax(-1)
    seen["mlpResid"] = seen["block0"]
    return seen


def test_trained_mingpt_reproduces_its_recorded_activations(
    sorter: GPT2, recorded: dict[str, Tensor]
) -> None:
    """Every one that our model forms too; attention weights it never forms, their sums it does."""
    ours = activations(sorter, recorded["idx"].long())
    assert set(recorded) - set(ours) == {"idx", "pos_emb", "q", "k", "v", "att", "attSm"}
    for name, value in ours.items():
        torch.testing.assert_close(
            value, recorded[name], rtol=0.0, atol=ACTIVATIONS, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_trained_mingpt_sorts(sorter: GPT2) -> None:
    """All 729 inputs, greedily, six digits after the six."""
    ids = torch.tensor(list(itertools.product(range(3), repeat=6)))
    wanted = ids.sort(dim=1).values
    with torch.no_grad():
        for _ in range(6):
            best = sorter(ids)[:, -1, 3:6].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    wrong = (ids[:, 6:] != wanted).any(dim=1).sum().item()
    assert wrong == 0
