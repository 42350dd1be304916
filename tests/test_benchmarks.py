"""The ablations' table of variants: each is a run that can be begun, and every switch of the modern model is in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest

from regpt.config import ModernConfig, load_preset
from regpt.optim.groups import check_optimizer
from regpt.optim.schedule import check_schedule
from regpt.train.machine import Machine
from regpt.train.plan import make_plan

LAPTOP = Machine(
    device="cpu", name="a laptop", memory_bytes=16 << 30, threads=2, peak_flops=None, fast_bf16=False
)


@pytest.fixture(scope="module")
def ablate() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "ablate.py"
    spec = importlib.util.spec_from_file_location("ablate", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["ablate"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("preset", ["modern-char", "modern-30m"])
@pytest.mark.parametrize("steps", [None, 100])
def test_every_variant_can_be_run(ablate: ModuleType, preset: str, steps: int | None) -> None:
    base = load_preset(preset).config
    names = ablate.variants(base)
    assert len(names) > 30
    for name in names:
        config = ablate.variant(base, name, steps)
        make_plan(config, LAPTOP, vocab_size=65)
        check_optimizer(config.optim)
        check_schedule(config.optim, config.train.steps)


def test_every_switch_of_the_modern_model_is_turned_over(ablate: ModuleType) -> None:
    base = load_preset("modern-char").config
    turned = {setting for name in ablate.variants(base) for setting in ablate.VARIANTS[name]}
    assert {f"model.modern.{f.name}" for f in dataclasses.fields(ModernConfig)} <= turned


def test_what_is_counted_in_steps_is_fitted_to_them(ablate: ModuleType) -> None:
    base = load_preset("modern-char").config
    assert ablate.fitted(base, base.train.steps) == base
    half = ablate.fitted(base, base.train.steps // 2).optim
    assert (half.muon_momentum_steps, half.warmup_steps, half.decay_steps) == (25, 0, None)


def test_a_ramp_is_compared_at_equal_tokens(ablate: ModuleType) -> None:
    """Of more steps: a fifth with three eighths of the tokens. What reads no other batches has the base's steps."""
    base = load_preset("modern-char").config
    steps = ablate.steps_of_tokens(base, "batch_ramp=on")
    config = ablate.variant(base, "batch_ramp=on", steps)
    assert (steps, config.train.batch_ramp_steps) == (274, 54)
    assert 0 <= ablate.tokens(config) - ablate.tokens(base) < base.train.batch_tokens
    assert ablate.steps_of_tokens(base, "norm=layer") == base.train.steps
    assert ablate.steps_of_tokens(config, "batch_ramp=off") in (240, 241)
    assert ablate.fitted(config, 137).train.batch_ramp_steps == 27


def test_verdicts(ablate: ModuleType) -> None:
    """Two pooled deviations decide; seeds that only one side has do not count; a failure is one."""

    def runs(*losses: float) -> dict[int, dict[str, object]]:
        return {
            seed: {"loss": loss, "failed": None if math.isfinite(loss) else "exit 3"}
            for seed, loss in enumerate(losses)
        }

    base = runs(1.00, 1.02, 1.04, 9.0)
    clear = ablate.Compared(runs(0.90, 0.92, 0.94), base)
    assert (clear.difference, clear.spread) == (pytest.approx(-0.1), pytest.approx(0.02))
    assert (clear.verdict, clear.unsure, clear.seeds) == ("pays", False, "3")
    assert ablate.Compared(runs(1.10, 1.12, 1.14), base).verdict == "costs"
    assert ablate.Compared(runs(1.03, 1.05, 1.07), base).verdict == "within noise"
    failed = ablate.Compared(runs(0.90, math.inf, 0.94), base)
    assert (failed.verdict, failed.unsure, failed.seeds) == ("fails", False, "2 + 1 failed")
    assert failed.difference == pytest.approx(-0.1)
