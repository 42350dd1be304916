"""SIGKILL at random instants of a run, again and again until it completes: to the bit as one that nobody touched.

A kill keeps what the kernel has: this says nothing of power loss.
"""

from __future__ import annotations

import dataclasses
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from rank_child import start
from runs import debris, outcome

from regpt.config import (
    Config,
    EvalConfig,
    SampleConfig,
    SaveConfig,
)

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
LIFE_S = 60.0  # no life of this run is longer


@pytest.fixture
def config(tiny_run: Config) -> Config:
    """A checkpoint at every other step: a good third of the time goes into saving and pruning."""
    train = dataclasses.replace(tiny_run.train, steps=40, batch_tokens=128, threads=1)
    return dataclasses.replace(
        tiny_run,
        train=train,
        eval=EvalConfig(every=15),
        save=SaveConfig(keep=2, every=2),
        sample=SampleConfig(tokens=2),
    )


def live(config: Config, out: str, seconds: float | None) -> int:
    """One life of the run, killed after so many seconds; its exit status."""
    (process,) = start(1, config, out)
    process.join(seconds if seconds is not None else LIFE_S)
    if process.is_alive():
        process.kill()
    process.join()
    status = process.exitcode
    assert isinstance(status, int)
    return status


@pytest.mark.parametrize(
    ("in_background", "kills"),
    [
        (True, 12),
        (False, 4),
        pytest.param(True, 600, marks=pytest.mark.slow),
        pytest.param(False, 400, marks=pytest.mark.slow),
    ],
)
def test_killed_at_any_instant(config: Config, in_background: bool, kills: int) -> None:
    config = dataclasses.replace(config, save=dataclasses.replace(config.save, in_background=in_background))
    assert live(config, "first", None) == 0  # the warm process is warm after this one
    began = time.monotonic()
    assert live(config, "whole", None) == 0
    whole_s, expected = time.monotonic() - began, outcome("whole")
    chance = random.Random(kills)
    done, runs, ends = 0, 0, Counter[int]()
    while done < kills:
        out = f"run-{runs}"
        runs += 1
        lives = 0
        while (status := live(config, out, chance.uniform(0.2, 1.0) * whole_s if lives < 50 else None)) != 0:
            ends[status] += 1
            assert status == -signal.SIGKILL, Path(f"{out}.stderr-0").read_text()
            done, lives = done + 1, lives + 1
        assert outcome(out) == expected, f"{out}, after {lives} kills"
        assert debris(out) == []
    print(
        f"{done} kills in {runs} runs, each equal to the bit to the whole one; a life takes {whole_s:.1f} s"
    )
