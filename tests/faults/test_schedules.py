"""Runs that change the number of their processes at every stop, with dropout on: to the bit as one process untouched."""

from __future__ import annotations

import random
import signal
import sys

import pytest
from rank_child import said, train
from runs import debris, exact, outcome

from regpt.config import Config

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
STEPS = 12
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGKILL")


def schedule(number: int) -> tuple[list[int], list[tuple[int, str, int]]]:
    """Worlds of 1, 2 and 4 ranks, in turn never the same, and where each but the last is stopped, how, and on which rank."""
    if number == 0:
        worlds = [2, 1, 2, 4, 1]
    else:
        chance = random.Random(number)
        worlds = [chance.choice((1, 2, 4))]
        while len(worlds) < 5:
            worlds.append(chance.choice([w for w in (1, 2, 4) if w != worlds[-1]]))
    chance = random.Random(1000 + number)
    stops = sorted(chance.sample(range(1, STEPS), 4))
    return worlds, [
        (step, chance.choice(SIGNALS), chance.randrange(world))
        for step, world in zip(stops, worlds, strict=False)
    ]


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))])
def test_a_schedule_of_worlds(tiny_run: Config, number: int) -> None:
    config = exact(tiny_run, steps=STEPS)
    assert train(1, config, "whole") == [0]
    worlds, stops = schedule(number)
    for world, (step, signame, rank) in zip(worlds, stops, strict=False):
        ended = train(world, config, "run", (rank, step, signame))
        signum = getattr(signal, signame)
        if (
            signame == "SIGKILL"
        ):  # goes back to the last checkpoint; the other ranks leave with their own word
            assert ended[rank] == -signum and set(ended) <= {-signum, 4}, said("run", 0)
        else:
            assert ended == [128 + signum] * world, said("run", 0)
    assert train(worlds[-1], config, "run") == [0] * worlds[-1], said("run", 0)
    assert outcome("run") == outcome("whole") and debris("run") == []
