"""Proposals of a model's size against the papers whose laws they follow, and what cannot be proposed."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from regpt.cli import main
from regpt.config import load_preset
from regpt.errors import ConfigError
from regpt.models.count import SIZES, count_parameters
from regpt.train.machine import Machine
from regpt.train.plan import make_plan
from regpt.train.sizing import (
    LADDER,
    LEAST_STEPS,
    OURS,
    PUBLISHED,
    Budget,
    Law,
    best_batch,
    budget,
    propose,
    sized,
)

A100 = Machine(
    device="cuda:0", name="A100", memory_bytes=80 << 30, threads=8, peak_flops=312e12, fast_bf16=True
)
GPT2 = load_preset("gpt2-124m-openwebtext").config
VOCAB = 50_257


def optimum(law: Law, flops: float) -> tuple[float, float]:
    """N and D of C = 6 N D in closed form (Hoffmann et al. 2022, equation 4)."""
    power = 1 / (law.alpha + law.beta)
    g = (law.alpha * law.a / (law.beta * law.b)) ** power
    n = g * (flops / 6) ** (law.beta * power)
    return n, flops / 6 / n


def test_the_published_law_gives_chinchilla_its_size() -> None:
    """Chinchilla spent 5.76e23 FLOPs on 70 B parameters and 1.4 T tokens, about 20 for each."""
    n, d = optimum(PUBLISHED, 5.76e23)
    assert n == pytest.approx(70e9, rel=0.05) and d == pytest.approx(1.4e12, rel=0.06)


@pytest.mark.parametrize("flops", [3e17, 1e18, 1e19, 1e20])
def test_a_proposal_is_the_rung_next_to_the_closed_form(flops: float) -> None:
    """The ladder's rungs are 1.4 to 2.4 times apart; FLOPs also hold attention, which 6 N D leaves out."""
    got = propose(GPT2, A100, PUBLISHED, Budget(flops=flops), vocab_size=VOCAB)
    n, _ = optimum(PUBLISHED, flops)
    assert 1 / 2.1 < got.parameters / n < 2.1
    assert got.flops <= flops and got.flops > 0.97 * flops
    assert got.steps >= LEAST_STEPS and got.tokens == got.steps * got.batch_tokens
    assert got.batch_tokens % GPT2.model.block_size == 0


def test_no_other_rung_is_better() -> None:
    got = propose(GPT2, A100, PUBLISHED, Budget(flops=1e19), vocab_size=VOCAB)
    assert got.expected_loss is not None
    for layers, channels in LADDER:
        config = sized(GPT2, layers, channels)
        plan = make_plan(config, A100, vocab_size=VOCAB)
        if plan.memory.total < A100.memory_bytes:
            loss = PUBLISHED.loss(plan.parameters, 1e19 / plan.flops_per_token)
            assert loss > got.expected_loss - 1e-3


def test_a_budget_of_hours_is_what_the_plan_says_takes_so_long() -> None:
    """The run that is proposed, planned by itself, takes the hours that were given."""
    got = propose(GPT2, A100, PUBLISHED, Budget(time_s=36_000.0), vocab_size=VOCAB)
    assert got.settings["train.minutes"] == 600
    config = sized(GPT2, got.n_layer, got.n_embd)
    train = dataclasses.replace(config.train, steps=got.steps, batch_tokens=got.batch_tokens, micro_rows=None)
    optim = dataclasses.replace(config.optim, warmup_steps=1, decay_steps=None)
    config = dataclasses.replace(config, train=train, optim=optim)
    plan = make_plan(config, A100, vocab_size=VOCAB)
    assert plan.time_s == pytest.approx(36_000, rel=0.03)
    assert plan.time_s == pytest.approx(got.time_s)


def test_gpt2s_sizes_are_on_the_ladder() -> None:
    small = SIZES["gpt2"]
    assert (small.n_layer, small.n_embd) in LADDER
    for layers, channels in LADDER:
        config = sized(GPT2, layers, channels)
        assert channels % config.model.n_head == 0
    sizes = [count_parameters(sized(GPT2, *shape).model, VOCAB).total for shape in LADDER]
    assert sizes == sorted(sizes)


def test_rates_go_with_one_over_the_root_of_the_width() -> None:
    config = load_preset("modern-char").config
    twice = sized(config, 4, 2 * config.model.n_embd)
    assert twice.optim.lr == pytest.approx(config.optim.lr / math.sqrt(2), rel=0.02)
    assert twice.optim.muon_lr == config.optim.muon_lr


def test_batches_grow_with_computing_and_leave_enough_steps() -> None:
    """DeepSeek's own 7 B model: 2 T tokens, about 7e22 FLOPs, a batch of 2,304 rows x 4,096 = 9.4 M tokens."""
    assert best_batch(7e22, 2 * 10**12, 4096) == pytest.approx(9.4e6, rel=0.45)
    assert best_batch(1e12, 10_000, 64) == 64
    sizes = [best_batch(10.0**x, 10**12, 64) for x in range(10, 24)]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("law", OURS.values(), ids=OURS)
def test_our_own_laws_are_laws(law: Law) -> None:
    assert min(law.e, law.a, law.b, law.alpha, law.beta) > 0
    assert law.fitted[0] < law.fitted[1] and not law.counts_embeddings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((1.0, 1e9, None, None), "--hours and --flops are two budgets"),
        ((0.0, None, None, None), "--hours must be above 0"),
        ((None, math.nan, None, None), "--flops must be above 0"),
        ((None, None, 5.0, None), "--money needs --price"),
        ((None, None, 5.0, -1.0), "--price must be above 0"),
        ((math.inf, None, None, None), "--hours must be above 0 and finite"),
    ],
)
def test_budgets_that_are_none(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget(*given)


def test_money_is_time() -> None:
    assert budget(None, None, 10.0, 2.5) == Budget(time_s=4 * 3600.0)
    assert budget(None, None, None, 2.5) is None


def test_a_budget_too_small_for_anything() -> None:
    with pytest.raises(ConfigError, match="does not hold 200 updates of one row of 1024 tokens"):
        propose(GPT2, A100, PUBLISHED, Budget(flops=1e9), vocab_size=VOCAB)


def test_the_command_line_prints_a_run_that_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "shakespeare-char-cpu", "--flops", "1e14", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    for proposal in said["proposals"]:
        words = proposal["command"].split()
        assert words[:3] == ["regpt", "train", "shakespeare-char-cpu"]
        assert main(["plan", *words[2:], "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        assert plan["parameters"] == proposal["parameters"]
        assert plan["total_tokens"] == proposal["tokens"] and plan["steps"] == proposal["steps"]
    words = ["plan", "shakespeare-char-cpu", "--flops", "1e14", "--data.source", "my text.txt"]
    assert main([*words, "--model.block-size", "32", "--json"]) == 0
    command = json.loads(capsys.readouterr().out)["proposals"][0]["command"]
    assert "--data.source 'my text.txt'" in command and "--model.block-size 32" in command
    assert main(["plan", "shakespeare-char-cpu", "--flops", "1e14"]) == 0
    assert "run       regpt train shakespeare-char-cpu --model.n-layer" in capsys.readouterr().out
