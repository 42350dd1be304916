"""The learning rate, and Muon's momentum, of every step, as pure functions of the step.

Warm-up is nanoGPT's: step s (from 0) gets lr * (s + 1) / (warmup_steps + 1), so that no step is wasted at zero and the
peak is reached at step `warmup_steps`. build-nanogpt divides by `warmup_steps` and is one step earlier at the peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from regpt.config import OptimConfig
from regpt.errors import ConfigError


def decay_start(config: OptimConfig, total_steps: int) -> int:
    """The step from which cosine and linear come down."""
    end = total_steps if config.decay_steps is None else config.decay_steps
    if config.schedule == "cosine":
        return config.warmup_steps
    return max(config.warmup_steps, end - round(config.decay_fraction * end))


def learning_rate(step: int, config: OptimConfig, total_steps: int, *, decayed: float | None = None) -> float:
    """The rate of update number `step`, counted from 0, of a run of `total_steps`.

    cosine: half a cosine from lr, at the end of warm-up, to min_lr at `decay_steps`; min_lr after that.
    linear: lr, then a straight line to min_lr over the last `decay_fraction` of `decay_steps` (a trapezoid).
    constant: lr after warm-up.

    Args:
        decayed: the share of the decay that lies behind; None: as follows from the step and `total_steps`.
    """
    end = total_steps if config.decay_steps is None else config.decay_steps
    warmup = config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return config.lr
    start = decay_start(config, total_steps)
    if decayed is not None:
        done = decayed
    elif step < start:
        return config.lr
    elif step >= end:
        return config.min_lr
    else:
        done = (step - start) / (end - start)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0 - done
    return config.min_lr + left * (config.lr - config.min_lr)


def muon_momentum(step: int, config: OptimConfig) -> float:
    """Muon's momentum at update number `step`: evenly from `muon_momentum_start` to `muon_momentum`, then that.

    Jordan's warm-up (modded-nanogpt, 2024-11-06): early gradients are soon out of date.
    """
    done = min(step / config.muon_momentum_steps, 1.0) if config.muon_momentum_steps else 1.0
    return (1 - done) * config.muon_momentum_start + done * config.muon_momentum


def set_rates(
    groups: Iterable[dict[str, Any]],
    step: int,
    config: OptimConfig,
    total_steps: int,
    *,
    decayed: float | None = None,
) -> float:
    """Set every parameter group's rate, and Muon's momentum, for update number `step`; returns the rate of `optim.lr`."""
    rate = learning_rate(step, config, total_steps, decayed=decayed)
    for group in groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
        if group.get("kind") == "muon":
            group["momentum"] = muon_momentum(step, config)
    return rate


def check_schedule(config: OptimConfig, total_steps: int) -> None:
    """Refuse a schedule that cannot be meant, before the run begins.

    Raises:
        ConfigError: naming the settings at odds.
    """
    if config.warmup_steps < 0:
        raise ConfigError("optim.warmup_steps must not be negative.", got=config.warmup_steps)
    if config.decay_steps is not None and config.decay_steps < 1:
        raise ConfigError(
            "optim.decay_steps must be at least 1.", got=config.decay_steps, hint="none: train.steps"
        )
    if config.warmup_steps >= total_steps > 0 and config.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps={config.warmup_steps} does not end before train.steps={total_steps}: the run would"
            " never reach optim.lr.",
            hint=f"--optim.warmup-steps {total_steps // 10}",
        )
    if config.schedule == "constant":
        return
    if not 0.0 <= config.min_lr <= config.lr:
        raise ConfigError(
            f"optim.min_lr={config.min_lr:g} must lie between 0 and optim.lr={config.lr:g}.",
            hint=f"--optim.min-lr {config.lr / 10:g}",
        )
    if config.decay_steps is not None and config.decay_steps <= config.warmup_steps:
        raise ConfigError(
            f"optim.decay_steps={config.decay_steps} is not after optim.warmup_steps={config.warmup_steps}.",
            hint=f"--optim.decay-steps {total_steps}",
        )
    if config.schedule == "linear" and not 0.0 < config.decay_fraction <= 1.0:
        raise ConfigError("optim.decay_fraction must lie in (0, 1].", got=config.decay_fraction)
