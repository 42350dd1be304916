"""AdamW: the same steps as PyTorch's with groups made by hand, and who is in which group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regpt.config import ModelConfig, OptimConfig
from regpt.errors import ConfigError
from regpt.models.gpt2 import GPT2
from regpt.optim.groups import adamw, check_adamw, decayed_names

pytestmark = pytest.mark.usefixtures("one_thread")


def small(bias: bool = True) -> GPT2:
    torch.manual_seed(0)
    return GPT2(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, bias=bias), 65)


class Tied(nn.Module):
    """One tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(ids)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 20) -> None:
    """On random text, a rate that changes at every step."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (step + 1) / steps
        ids = torch.randint(0, 65, (2, 9), generator=generator)
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()


def names(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    return {group["name"]: list(group["param_names"]) for group in optimizer.param_groups}


# --- authority ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["matrices", "linear", "all"])
def test_twenty_steps_equal_torchs_bit_for_bit(decay: str) -> None:
    """With groups written out here by name, apart from the code under test."""
    config = OptimConfig(lr=1e-2, beta1=0.85, beta2=0.97, eps=1e-7, weight_decay=0.3, decay=decay)  # type: ignore[arg-type]
    ours, theirs = small(), small()
    linear = [
        f"h.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    embeddings = ["wte.weight", "wpe.weight"]
    every = [name for name, _ in theirs.named_parameters()]
    decayed = {"matrices": embeddings + linear, "linear": linear, "all": every}[decay]
    by_name = dict(theirs.named_parameters())
    groups = [
        {"params": [by_name[n] for n in every if n in decayed], "weight_decay": 0.3},
        {"params": [by_name[n] for n in every if n not in decayed], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=1e-2, betas=(0.85, 0.97), eps=1e-7, fused=True
    )
    train(ours, adamw(ours, config, "cpu"))
    train(theirs, reference)
    for name, p in ours.named_parameters():
        assert torch.equal(p, by_name[name]), name
    assert not torch.equal(ours.wte.weight, small().wte.weight)


def test_one_step_by_hand() -> None:
    """Decoupled decay, then the bias-corrected moments: Loshchilov and Hutter 2019, algorithm 2, in float64."""
    model = nn.Linear(3, 2)
    config = OptimConfig(lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.2)
    optimizer = adamw(model, config, "cpu")
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    moments = dict.fromkeys(before, (0.0, 0.0))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    for t in (1, 2, 3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        for name, p in model.named_parameters():
            assert p.grad is not None
            grad, (m, v) = p.grad.double(), moments[name]
            m, v = 0.9 * m + 0.1 * grad, 0.95 * v + 0.05 * grad**2
            moments[name] = m, v
            rate = 0.2 if name == "weight" else 0.0
            update = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - 0.1 * rate) - 0.1 * update
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach().double(), before[name], rtol=1e-5, atol=1e-6)


# --- groups ---------------------------------------------------------------------------------------------------


def test_matrices_decay_by_default() -> None:
    """All of two dimensions, embeddings too; norms and biases not; each group in the model's order."""
    model = small()
    parts = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    groups = names(adamw(model, OptimConfig(), "cpu"))
    assert groups["decay"] == ["wte.weight", "wpe.weight"] + [
        f"h.{i}.{p}.weight" for i in (0, 1) for p in parts
    ]
    assert groups["no_decay"] == [n for n, p in model.named_parameters() if p.dim() == 1]
    assert list(groups) == ["decay", "no_decay"]


def test_linear_leaves_the_embeddings_out() -> None:
    model = small()
    assert decayed_names(model, "matrices") - decayed_names(model, "linear") == {"wte.weight", "wpe.weight"}


def test_all_is_all() -> None:
    """And the empty second group is left out."""
    model = small()
    assert names(adamw(model, OptimConfig(decay="all"), "cpu")) == {
        "decay": [n for n, _ in model.named_parameters()]
    }


@pytest.mark.parametrize("decay", ["matrices", "linear", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_is_in_one_group(decay: str, bias: bool) -> None:
    """Names run parallel to tensors; rates are the setting's and zero."""
    model = small(bias)
    optimizer = adamw(model, OptimConfig(decay=decay, weight_decay=0.25), "cpu")  # type: ignore[arg-type]
    own = dict(model.named_parameters())
    seen = [
        (name, p)
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]
    assert sorted(name for name, _ in seen) == sorted(own)
    assert all(p is own[name] for name, p in seen)
    rates = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert rates == {"decay": 0.25} | ({} if decay == "all" else {"no_decay": 0.0})


def test_tied_tensor_is_one_parameter() -> None:
    """Under its first name, decayed once."""
    model = Tied()
    groups = names(adamw(model, OptimConfig(), "cpu"))
    assert groups == {"decay": ["embedding.weight", "inner.weight"], "no_decay": ["inner.bias"]}
    assert decayed_names(model, "linear") == {"inner.weight"}
    optimizer = adamw(model, OptimConfig(lr=0.1, weight_decay=0.5), "cpu")
    before = model.embedding.weight.detach().clone()
    (0.0 * model(torch.arange(6)).sum()).backward()  # gradients of zero: only the decay acts
    optimizer.step()
    torch.testing.assert_close(model.embedding.weight.detach(), before * (1 - 0.1 * 0.5))
    assert model.head.weight is model.embedding.weight


def test_an_embedding_named_after_its_head_is_still_one() -> None:
    """Which of two tied names comes first does not decide whether `linear` decays it."""
    model = nn.ModuleDict({"head": nn.Linear(4, 6, bias=False), "tokens": nn.Embedding(6, 4)})
    model["head"].weight = model["tokens"].weight
    assert decayed_names(model, "matrices") == {"head.weight"}
    assert decayed_names(model, "linear") == set()


def test_frozen_parameters_are_left_out() -> None:
    model = small()
    model.wpe.weight.requires_grad_(False)
    assert "wpe.weight" not in names(adamw(model, OptimConfig(), "cpu"))["decay"]


@pytest.mark.parametrize(("device", "fused"), [("cpu", True), ("cuda", True), ("mps", True), ("xpu", False)])
def test_fused_where_there_is_a_kernel(device: str, fused: bool) -> None:
    """Elsewhere the plain loop, which every device has."""
    assert adamw(small(), OptimConfig(), device).defaults["fused"] is fused


def test_settings_arrive() -> None:
    optimizer = adamw(small(), OptimConfig(lr=0.02, beta1=0.8, beta2=0.9, eps=1e-5), "cpu")
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.9), 1e-5)


# --- what cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be above 0 and finite.\n  got: 0.0"),
        ({"lr": float("nan")}, "optim.lr must be above 0 and finite.\n  got: nan"),
        ({"lr": float("inf")}, "optim.lr must be above 0 and finite.\n  got: inf"),
        ({"beta1": 1.0}, "optim.beta1 must lie in [0, 1).\n  got: 1.0"),
        ({"beta2": -0.1}, "optim.beta2 must lie in [0, 1).\n  got: -0.1"),
        ({"eps": 0.0}, "optim.eps must be above 0.\n  got: 0.0"),
        ({"eps": -1e-8}, "optim.eps must be above 0.\n  got: -1e-08"),
        ({"weight_decay": -0.1}, "optim.weight_decay must not be negative.\n  got: -0.1"),
        (
            {"clip_norm": 0.0},
            "optim.clip_norm must be above 0.\n  got: 0.0\n  try: --optim.clip-norm none",
        ),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    """By the check that runs before anything is built, and by `adamw` itself."""
    with pytest.raises(ConfigError) as caught:
        check_adamw(OptimConfig(**values))
    assert str(caught.value) == message
    with pytest.raises(ConfigError):
        adamw(small(), OptimConfig(**values), "cpu")


def test_edges_of_the_ranges_pass() -> None:
    check_adamw(OptimConfig(beta1=0.0, beta2=0.0, eps=1e-300, weight_decay=0.0, clip_norm=None))
