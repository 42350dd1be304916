"""Learning rates: spelled out step by step, and nanoGPT's own formula."""

from __future__ import annotations

import math
from typing import Any

import pytest

from regpt.config import OptimConfig
from regpt.errors import ConfigError
from regpt.optim.schedule import check_schedule, learning_rate

# Peak 1.0, floor 0.1, four steps of warm-up. Every row: the setting, total steps, {step: rate}.
SPELLED = {
    "cosine": (
        {"schedule": "cosine"},
        12,
        {
            0: 0.2,
            1: 0.4,
            2: 0.6,
            3: 0.8,
            4: 1.0,  # the peak, one step after warm-up's last
            5: 0.1 + 0.9 * (1 + math.cos(math.pi / 8)) / 2,
            6: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2,
            8: 0.55,  # half way down
            10: 0.1 + 0.9 * (1 - math.sqrt(0.5)) / 2,
            12: 0.1,
            13: 0.1,
            1000: 0.1,
        },
    ),
    "cosine that ends before the run": (
        {"schedule": "cosine", "decay_steps": 8},
        12,
        {3: 0.8, 4: 1.0, 6: 0.55, 8: 0.1, 9: 0.1, 11: 0.1},
    ),
    "cosine that outlives the run": (
        {"schedule": "cosine", "decay_steps": 20},
        12,
        {4: 1.0, 11: 0.1 + 0.9 * (1 + math.cos(math.pi * 7 / 16)) / 2, 12: 0.55, 20: 0.1},
    ),
    "linear": (
        {"schedule": "linear", "decay_fraction": 0.4},
        20,
        {
            0: 0.2,
            3: 0.8,
            4: 1.0,
            11: 1.0,
            12: 1.0,  # the last 8 of 20 steps come down
            13: 0.8875,
            14: 0.775,
            16: 0.55,
            19: 0.2125,
            20: 0.1,
            21: 0.1,
        },
    ),
    "linear all the way": (
        {"schedule": "linear", "decay_fraction": 1.0},
        14,
        {3: 0.8, 4: 1.0, 5: 0.91, 9: 0.55, 13: 0.19, 14: 0.1},
    ),
    "linear to a step of its own": (
        {"schedule": "linear", "decay_fraction": 0.5, "decay_steps": 10},
        20,
        {4: 1.0, 5: 1.0, 6: 0.82, 9: 0.28, 10: 0.1, 19: 0.1},
    ),
    "constant": (
        {"schedule": "constant"},
        12,
        {0: 0.2, 1: 0.4, 2: 0.6, 3: 0.8, 4: 1.0, 8: 1.0, 12: 1.0, 1000: 1.0},
    ),
    "no warm-up": (
        {"schedule": "cosine", "warmup_steps": 0},
        8,
        {0: 1.0, 4: 0.55, 8: 0.1},
    ),
    "one step": ({"schedule": "cosine", "warmup_steps": 0}, 1, {0: 1.0, 1: 0.1}),
}


def settings(**values: Any) -> OptimConfig:
    return OptimConfig(**{"lr": 1.0, "min_lr": 0.1, "warmup_steps": 4} | values)


@pytest.mark.parametrize("case", SPELLED)
def test_rates_step_by_step(case: str) -> None:
    values, total, expected = SPELLED[case]
    config = settings(**values)
    check_schedule(config, total)
    assert {step: learning_rate(step, config, total) for step in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "decay", "total"), [(100, 5000, 5000), (2000, 600_000, 600_000), (0, 300, 300), (7, 50, 90)]
)
def test_cosine_is_nanogpts(warmup: int, decay: int, total: int) -> None:
    """Its `get_lr`, as its README's runs use it, at every step or at 2,000 of them."""
    lr, min_lr = 6e-4, 6e-5

    def nanogpt(it: int) -> float:
        if it < warmup:
            return lr * (it + 1) / (warmup + 1)
        if it > decay:
            return min_lr
        fraction = (it - warmup) / (decay - warmup)
        return min_lr + 0.5 * (1.0 + math.cos(math.pi * fraction)) * (lr - min_lr)

    config = OptimConfig(lr=lr, min_lr=min_lr, warmup_steps=warmup, decay_steps=decay)
    for step in range(0, total + 10, max(1, total // 2000)):
        assert learning_rate(step, config, total) == pytest.approx(nanogpt(step), rel=1e-12), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_only_rises_and_the_rest_only_falls(schedule: str) -> None:
    """And no step of the run is wasted at a rate of zero."""
    config = settings(schedule=schedule, min_lr=0.0)
    rates = [learning_rate(step, config, 40) for step in range(40)]
    assert rates[:5] == sorted(rates[:5]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert min(rates) > 0.0 and max(rates) == 1.0


@pytest.mark.parametrize(
    ("values", "total", "message"),
    [
        ({"warmup_steps": -1}, 12, "optim.warmup_steps must not be negative.\n  got: -1"),
        (
            {"decay_steps": 0},
            12,
            "optim.decay_steps must be at least 1.\n  got: 0\n  try: none: train.steps",
        ),
        (
            {"warmup_steps": 100},
            50,
            "optim.warmup_steps=100 does not end before train.steps=50: the run would never reach optim.lr.\n"
            "  try: --optim.warmup-steps 5",
        ),
        (
            {"warmup_steps": 12, "schedule": "constant"},
            12,
            "optim.warmup_steps=12 does not end before train.steps=12: the run would never reach optim.lr.\n"
            "  try: --optim.warmup-steps 1",
        ),
        (
            {"min_lr": 2.0},
            12,
            "optim.min_lr=2 must lie between 0 and optim.lr=1.\n  try: --optim.min-lr 0.1",
        ),
        (
            {"min_lr": -0.1},
            12,
            "optim.min_lr=-0.1 must lie between 0 and optim.lr=1.\n  try: --optim.min-lr 0.1",
        ),
        (
            {"decay_steps": 4},
            12,
            "optim.decay_steps=4 is not after optim.warmup_steps=4.\n  try: --optim.decay-steps 12",
        ),
        (
            {"schedule": "linear", "decay_fraction": 0.0},
            12,
            "optim.decay_fraction must lie in (0, 1].\n  got: 0.0",
        ),
        (
            {"schedule": "linear", "decay_fraction": 1.5},
            12,
            "optim.decay_fraction must lie in (0, 1].\n  got: 1.5",
        ),
    ],
)
def test_impossible_schedules_are_refused(values: dict[str, Any], total: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_schedule(settings(**values), total)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ({}, 12),
        ({"warmup_steps": 0}, 1),
        ({"min_lr": 1.0}, 12),
        ({"min_lr": 0.0}, 12),
        ({"schedule": "constant", "min_lr": 2.0, "decay_steps": 2}, 12),  # neither is used
        ({"schedule": "cosine", "decay_fraction": 7.0}, 12),  # nor this
        ({}, 0),  # a run of no steps trains nothing
    ],
)
def test_possible_schedules_pass(values: dict[str, Any], total: int) -> None:
    check_schedule(settings(**values), total)
