"""Weights and optimizer state by name: bitwise the same training, and whatever does not fit is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from regpt.config import ModelConfig
from regpt.errors import CheckpointError
from regpt.models.gpt2 import GPT2
from regpt.train.checkpoint import read_checkpoint, save_checkpoint
from regpt.train.named import load_model_tensors, load_optimizer, model_tensors, optimizer_tensors

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8)
Make = Callable[[nn.Module], torch.optim.Optimizer]


def small(seed: int = 0, **other: Any) -> GPT2:
    torch.manual_seed(seed)
    return GPT2(ModelConfig(**{**SHAPE.__dict__, **other}), vocab_size=50)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """In two groups, as training does it."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-2)


OPTIMIZERS: dict[str, Make] = {
    "adamw": adamw,
    "fused adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, amsgrad=True),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "plain": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-2),
    "adafactor": lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-2),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=1e-2),
    "rprop": lambda m: torch.optim.Rprop(m.parameters(), lr=1e-2),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        g = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 50, (4, 9), generator=g)
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_from_a_checkpoint_to_the_bit(name: str, tmp_path: Path) -> None:
    whole = small()
    optimizer = OPTIMIZERS[name](whole)
    train(whole, optimizer, 0, 5)
    tensors, scalars = optimizer_tensors(whole, optimizer)
    path = save_checkpoint(
        tmp_path, step=5, model=model_tensors(whole), optimizer=tensors, state={"optimizer_scalars": scalars}
    )
    train(whole, optimizer, 5, 10)

    resumed = small(seed=1)
    again = OPTIMIZERS[name](resumed)
    found = read_checkpoint(path)
    load_model_tensors(resumed, found.model_tensors())
    saved = found.optimizer_tensors()
    assert saved is not None
    load_optimizer(resumed, again, saved, found.state["optimizer_scalars"])
    train(resumed, again, 5, 10)

    for key, t in model_tensors(whole).items():
        assert torch.equal(t, model_tensors(resumed)[key]), key
    same_state(optimizer, again)


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Against torch's own idea of an optimizer's state."""
    left, right = a.state_dict(), b.state_dict()
    assert left["param_groups"] == right["param_groups"]
    assert left["state"].keys() == right["state"].keys()
    for index, state in left["state"].items():
        assert state.keys() == right["state"][index].keys()
        for key, value in state.items():
            other = right["state"][index][key]
            if isinstance(value, torch.Tensor):
                assert (
                    value.dtype == other.dtype and value.device == other.device and torch.equal(value, other)
                )
            else:
                assert type(value) is type(other) and value == other


def test_state_is_found_by_name_whatever_the_grouping() -> None:
    model = small()
    optimizer = adamw(model)
    train(model, optimizer, 0, 3)
    tensors, scalars = optimizer_tensors(model, optimizer)
    assert tensors["h.0.attn.c_attn.weight.exp_avg"].shape == (48, 16)
    assert scalars["parameters"] == sorted(n for n, _ in model.named_parameters())

    other = copy.deepcopy(model)
    regrouped = torch.optim.AdamW(list(other.parameters())[::-1], lr=1e-2)
    load_optimizer(other, regrouped, tensors, scalars)
    for name, p in other.named_parameters():
        assert torch.equal(regrouped.state[p]["exp_avg"], tensors[f"{name}.exp_avg"]), name


def test_settings_of_the_optimizer_stay_its_own() -> None:
    """A run may be continued with another learning rate."""
    model = small()
    optimizer = adamw(model)
    train(model, optimizer, 0, 2)
    saved = optimizer_tensors(model, optimizer)
    lower = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    load_optimizer(model, lower, *saved)
    assert lower.param_groups[0]["lr"] == 1e-5 and lower.param_groups[0]["weight_decay"] == 0.0


def test_numbers_that_are_not_tensors_are_kept() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                self.state[p]["seen"] = self.state[p].get("seen", 0) + 0.1

    model = small()
    optimizer = Counting(model.parameters(), lr=0.1)
    optimizer.step()
    tensors, scalars = optimizer_tensors(model, optimizer)
    assert tensors == {} and scalars["values"]["wte.weight.seen"] == 0.1
    again = Counting(model.parameters(), lr=0.1)
    load_optimizer(model, again, tensors, scalars)
    same_state(optimizer, again)


def test_a_compiled_model_has_the_names_of_the_one_inside() -> None:
    model = small()
    compiled = torch.compile(model, backend="eager")
    assert model_tensors(compiled).keys() == model_tensors(model).keys()
    optimizer = adamw(compiled)
    train(model, optimizer, 0, 1)
    assert "wte.weight.exp_avg" in optimizer_tensors(compiled, optimizer)[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("ln_f.weight"), "the weights are not this model's: missing ln_f.weight"),
        (lambda t: t.update(extra=torch.ones(1)), "the weights are not this model's: unknown extra"),
        (
            lambda t: t.update({"wpe.weight": torch.ones(8, 17)}),
            r"wpe.weight does not fit this model.\n  got: \(8, 17\) torch.float32\n  expected: \(8, 16\)",
        ),
        (
            lambda t: t.update({"ln_f.bias": torch.ones(16).half()}),
            r"ln_f.bias does not fit.*\n  got: .*float16",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, Any]], object], says: str) -> None:
    model = small()
    before = copy.deepcopy(model_tensors(model))
    tensors = dict(model_tensors(small(seed=1)))
    change(tensors)
    with pytest.raises(CheckpointError, match=says):
        load_model_tensors(model, tensors)
    assert all(torch.equal(t, before[name]) for name, t in model_tensors(model).items())


def test_many_names_are_not_all_listed() -> None:
    with pytest.raises(CheckpointError, match=r"missing h.1.attn.c_attn.bias, .* and 9 more"):
        load_model_tensors(small(), model_tensors(small(n_layer=1)))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"n_layer": 1}, "the parameters in the optimizer are not this model's: missing h.1"),
        ({"n_layer": 3}, "the parameters in the optimizer are not this model's: unknown h.2"),
        ({"n_embd": 32}, r"the optimizer state .* does not fit.\n  got: .*32.*\n  expected: .*16"),
    ],
)
def test_optimizer_state_of_another_model_is_refused(other: dict[str, int], says: str) -> None:
    stranger = small(**other)
    optimizer = adamw(stranger)
    train(stranger, optimizer, 0, 1)
    saved = optimizer_tensors(stranger, optimizer)
    model = small()
    mine = adamw(model)
    with pytest.raises(CheckpointError, match=says):
        load_optimizer(model, mine, *saved)
    assert mine.state_dict()["state"] == {}


def test_state_of_a_parameter_that_does_not_exist_is_refused() -> None:
    model = small()
    optimizer = adamw(model)
    tensors, scalars = optimizer_tensors(model, optimizer)
    with pytest.raises(CheckpointError, match=r"nobody.exp_avg belongs to no parameter"):
        load_optimizer(model, optimizer, tensors | {"nobody.exp_avg": torch.ones(1)}, scalars)
