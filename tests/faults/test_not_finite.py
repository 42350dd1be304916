"""NaN and infinities planted in a loss, a gradient, a weight or an input, on one rank of a run: never an update with them.

Each case is compared with one process that meets the same fault, or with a run that meets none.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from rank_child import said, train
from runs import debris, entries, exact, outcome, steps

from regpt.config import Config
from regpt.train.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
AT = 5
CASES = [
    (f"{number} {place}", policy, world, rank)
    for number in ("nan", "inf", "-inf")
    for place in ("loss", "gradient", "weight", "input")
    for policy in ("stop", "skip", "rollback")
    for world, rank in ((1, 0), (2, 0), (2, 1))
]
SLICE = [("nan weight", "rollback", 1, 0), ("inf input", "stop", 2, 1), ("-inf gradient", "skip", 1, 0)]


def case(number: int) -> object:
    return CASES[number] if CASES[number] in SLICE else pytest.param(*CASES[number], marks=pytest.mark.slow)


@pytest.mark.parametrize(("what", "policy", "world", "rank"), [case(i) for i in range(len(CASES))])
def test_planted(tiny_run: Config, what: str, policy: str, world: int, rank: int) -> None:
    config = exact(tiny_run, steps=8, on_bad_step=policy)
    ended = train(world, config, "run", (rank, AT, what))
    note = said("run", 0)
    for step in steps("run"):
        weights = read_checkpoint(Path("run/checkpoints") / f"step-{step:06d}").model_tensors().values()
        assert all(bool(t.isfinite().all()) for t in weights), (
            f"step {step} was saved with what is not finite"
        )
    if policy == "stop" or (policy == "skip" and "weight" in what):
        assert ended == [3] * world, note
        assert note.count("TrainingDiverged") == 1 and f"at step {AT}" in note
        assert [said("run", r) for r in range(1, world)] == [""] * (world - 1)
        assert [e["step"] for e in entries("run", "step")] == list(range(1, AT + 1))
        # Nothing of the fault stays: the same command goes on as if it had not been.
        assert train(world, config, "run") == [0] * world
        assert train(1, config, "whole") == [0]
        assert outcome("run") == outcome("whole")
    else:
        assert ended == [0] * world, note
        assert any(f"train.on_bad_step={policy}" in e["text"] for e in entries("run", "note"))
        assert [e["step"] for e in entries("run", "step")] == [
            s for s in range(1, 9) if s != AT + 1 or policy == "rollback"
        ]
        if world > 1:
            assert train(1, config, "one", (0, AT, what)) == [0]
            assert outcome("run") == outcome("one")
    assert debris("run") == []


def test_the_cases_are_enough() -> None:
    assert len(CASES) == 108 and all(c in CASES for c in SLICE)
    assert not torch.tensor(float("-inf")).isfinite()
