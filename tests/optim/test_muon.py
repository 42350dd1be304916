"""Muon against the exact SVD, against `torch.optim.Muon` and AdamW to the bit, and in any company the same."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from regpt.config import ModelConfig, OptimConfig
from regpt.errors import ConfigError
from regpt.models import build_model
from regpt.optim.groups import adamw, check_optimizer, make_optimizer, roles
from regpt.optim.muon import ITERATIONS, NEWTON_SCHULZ, Muon, orthogonalize
from regpt.optim.schedule import learning_rate, muon_momentum, set_rates

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [(32, 32), (96, 32), (32, 128), (64, 64), (1, 16)]
MUON = OptimConfig(name="muon", lr=0.01, min_lr=0.0, muon_lr=0.03, weight_decay=0.1)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def polar(matrices: Tensor) -> Tensor:
    """U Vᵀ by the exact singular value decomposition, in float64."""
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    return u @ vh


# --- the iteration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_iterated_to_convergence_it_is_the_svds_polar_factor(shape: tuple[int, int]) -> None:
    """Jordan's quintic never settles; (15, -10, 3) / 8, which does, agrees with the SVD to 1e-6 in float64."""
    x = drawn(3, *shape).double()
    got = orthogonalize(x, ((15 / 8, -10 / 8, 3 / 8),) * 60)
    torch.testing.assert_close(got, polar(x), rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("method", "low", "high"), [("newton_schulz", 0.68, 1.21), ("polar_express", 0.85, 1.15)]
)
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 128)])
def test_five_steps_turn_every_singular_value_to_about_one(
    method: str, low: float, high: float, shape: tuple[int, int]
) -> None:
    """And leave the singular vectors: in the SVD's own bases the result is diagonal. Conditions up to 100."""
    u, _, vh = torch.linalg.svd(drawn(4, *shape).double(), full_matrices=False)
    s = torch.logspace(0, -2, u.shape[-1], dtype=torch.float64)
    got = u.mT @ orthogonalize(u @ torch.diag(s) @ vh, *ITERATIONS[method]) @ vh.mT
    values = got.diagonal(dim1=1, dim2=2)
    assert low <= values.min() and values.max() <= high
    assert (got - torch.diag_embed(values)).abs().max() < 1e-9


@pytest.mark.parametrize("method", ITERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 8), (32, 32), (32, 96), (128, 128), (128, 512), (384, 384)])
def test_a_matrix_in_any_batch_has_the_same_bits(
    method: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Alone, among others, and at another place among others: so ranks may divide a batch among them."""
    x = drawn(7, *shape).to(dtype)
    whole = orthogonalize(x, *ITERATIONS[method])
    for part in (slice(0, 1), slice(3, 4), slice(2, 7), slice(5, 7)):
        assert torch.equal(orthogonalize(x[part], *ITERATIONS[method]), whole[part])


def test_zero_stays_zero_and_scale_does_not_matter() -> None:
    assert not orthogonalize(torch.zeros(2, 8, 16)).any()
    x = drawn(2, 8, 16)
    torch.testing.assert_close(orthogonalize(1000 * x), orthogonalize(x), rtol=1e-4, atol=1e-5)


# --- the optimizer ------------------------------------------------------------------------------------------------


def group(params: list[nn.Parameter], **changes: Any) -> dict[str, Any]:
    made = {"kind": "muon", "parts": [1] * len(params), "momentum": 0.95, "cautious": False}
    return {"params": params, "lr": 0.02, "weight_decay": 0.1} | made | changes


def parameters(seed: int = 0) -> list[nn.Parameter]:
    return [nn.Parameter(drawn(*shape, seed=seed + i)) for i, shape in enumerate(SHAPES)]


def test_twenty_steps_equal_torch_optim_muons() -> None:
    """Theirs computes in bfloat16 always; in bfloat16 ours has the same bits, weight decay and tall matrices included."""
    ours, theirs = parameters(), parameters()
    a = Muon([group(ours)], dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95)
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = drawn(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0.0, atol=1e-6)
        assert torch.equal(a.state[p]["momentum_buffer"], b.state[q]["momentum_buffer"])


def test_a_parameter_of_three_matrices_is_three_parameters() -> None:
    """Queries, keys and values by one product are orthogonalised apart, each with the rate of its own shape."""
    fused = nn.Parameter(drawn(96, 32))
    apart = [nn.Parameter(part.clone()) for part in fused.detach().chunk(3)]
    a, b = Muon([group([fused], parts=[3])]), Muon([group(apart)])
    fused.grad = drawn(96, 32, seed=1)
    for p, g in zip(apart, fused.grad.chunk(3), strict=True):
        p.grad = g.clone()
    a.step()
    b.step()
    assert torch.equal(fused, torch.cat(apart))


def test_cautious_decay_spares_what_grows() -> None:
    """Chen et al. 2025: a weight decays only where the update takes it to zero too."""
    p, q, plain = (nn.Parameter(drawn(16, 16)) for _ in range(3))
    for one in (p, q, plain):
        one.grad = drawn(16, 16, seed=5)
    Muon([group([p], cautious=True)]).step()
    Muon([group([q])]).step()
    Muon([group([plain], weight_decay=0.0)]).step()
    start, update = drawn(16, 16), drawn(16, 16) - plain
    shrinks = update * start >= 0
    torch.testing.assert_close(p[shrinks], q[shrinks])
    assert torch.equal(p[~shrinks], plain[~shrinks]) and shrinks.any() and not shrinks.all()


def small(arch: str = "modern", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = ModelConfig(arch=arch, n_layer=2, n_head=2, n_embd=16, block_size=8, bias=False)  # type: ignore[arg-type]
    return build_model(config, 65)


def test_the_iteration_has_the_dtype_of_the_runs_products() -> None:
    """bfloat16 where the run's is; else float32."""
    for dtype, products in (
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float32),
    ):
        optimizer = make_optimizer(small(), MUON, "cpu", dtype=dtype)
        assert isinstance(optimizer, Muon) and optimizer.dtype == products


def test_what_is_no_matrix_follows_adamw_to_the_bit() -> None:
    """The same rates for all, the same gradients: torch.optim.AdamW's result."""
    ours, theirs = small(), small()
    a = make_optimizer(ours, MUON, "cpu")
    b = adamw(theirs, dataclasses.replace(MUON, name="adamw"), "cpu")
    for step in range(5):
        for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            p.grad = drawn(*p.shape, seed=100 * step + i)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    kinds, others = roles(ours), dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert torch.equal(p, others[name]) == (kinds[name] != "matrix"), name


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
def test_every_parameter_has_a_role_and_a_group(arch: str) -> None:
    model = small(arch)
    optimizer = make_optimizer(model, MUON, "cpu")
    named = {n: g["name"] for g in optimizer.param_groups for n in g["param_names"]}
    assert sorted(named) == sorted(n for n, _ in model.named_parameters())
    matrices = [n for n, role in roles(model).items() if role == "matrix"]
    assert len(matrices) == 4 * 2
    assert named["wte.weight"] == "embedding, decay"
    if arch == "modern":
        assert named["lm_head.weight"] == "head, decay"
        assert named["h.1.attn.value_gate.weight"] == "scalar, decay"
        assert named["value_embeds.1.weight"] == "embedding, decay"
        assert named["x0_scalars"] == "scalar, no decay"
    else:
        assert named["h.0.ln_1.weight"] == "scalar, no decay"
    muon = next(g for g in optimizer.param_groups if g["kind"] == "muon")
    assert dict(zip(muon["param_names"], muon["parts"], strict=True))["h.0.attn.c_attn.weight"] == 3


def test_every_group_has_its_peak_and_one_schedule() -> None:
    config = dataclasses.replace(MUON, embed_lr=0.3, head_lr=0.004, schedule="linear", warmup_steps=0)
    groups = make_optimizer(small(), config, "cpu").param_groups
    peaks = {"matrix": 0.03, "embedding": 0.3, "head": 0.004, "scalar": 0.01}
    for step in (0, 50, 90):
        rate = set_rates(groups, step, config, 100)
        assert rate == learning_rate(step, config, 100)
        for one in groups:
            assert one["lr"] == pytest.approx(peaks[one["name"].partition(",")[0]] * rate / 0.01)
    assert rate < 0.01


def test_momentum_rises_evenly_and_stays() -> None:
    config = OptimConfig(muon_momentum_start=0.85, muon_momentum=0.95, muon_momentum_steps=50)
    assert [round(muon_momentum(step, config), 4) for step in (0, 25, 50, 51, 1000)] == [
        0.85,
        0.9,
        0.95,
        0.95,
        0.95,
    ]
    assert muon_momentum(0, dataclasses.replace(config, muon_momentum_steps=0)) == 0.95
    groups = make_optimizer(small(), MUON, "cpu").param_groups
    set_rates(groups, 0, MUON, 100)
    assert [g["momentum"] for g in groups if g["kind"] == "muon"] == [0.85]


def test_state_round_trips() -> None:
    """Through state_dict, as PyTorch's own."""
    one, other = small(), small()
    a, b = make_optimizer(one, MUON, "cpu"), make_optimizer(other, MUON, "cpu")

    def updated(model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
        for i, p in enumerate(model.parameters()):
            p.grad = drawn(*p.shape, seed=100 * step + i)
        optimizer.step()

    updated(one, a, 0)
    other.load_state_dict(one.state_dict())
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    updated(one, a, 1)
    updated(other, b, 1)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"muon_lr": 0.0}, "optim.muon_lr must be above 0 and finite."),
        ({"embed_lr": float("nan")}, "optim.embed_lr must be above 0 and finite."),
        ({"muon_momentum": 1.0}, "optim.muon_momentum must lie in [0, 1)."),
        ({"muon_momentum_steps": -1}, "optim.muon_momentum_steps must not be negative."),
        ({"beta1": 1.0}, "optim.beta1 must lie in [0, 1)."),
    ],
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    config = OptimConfig(name="muon", **values)
    with pytest.raises(ConfigError) as caught:
        check_optimizer(config)
    assert message in str(caught.value)
    with pytest.raises(ConfigError):
        make_optimizer(small(), config, "cpu")


def test_the_coefficients_are_torchs() -> None:
    default = torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).defaults
    assert list(NEWTON_SCHULZ) == [default["ns_coefficients"]] * default["ns_steps"]
