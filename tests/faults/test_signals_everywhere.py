"""Every stopping signal at every phase of a run, on one rank and on several: saved at that very step, and to the bit after.

The signal is sent by the rank to itself in the middle of the phase. Workers exist in preparation only: batches are computed
from the step, so a loader has no state, no workers and no prefetch that could matter.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from rank_child import said, train
from runs import debris, entries, exact, outcome, steps

from regpt.config import Config
from regpt.train.dist import PEER_EXIT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
PHASES = {  # when it is sent, and the step whose checkpoint is the newest then
    "start": (0, 0),
    "step": (5, 5),
    "backward": (0, 0),  # of the first step of all
    "update": (5, 6),
    "logging": (5, 6),
    "evaluation": (4, 4),
    "sample": (4, 4),
    "save": (4, 4),
    "writing": (4, None),  # training goes on meanwhile
    "pruning": (6, None),
    "saved": (6, 6),
}
WHO = {"alone": (1, 0), "first of 2": (2, 0), "second of 2": (2, 1), "both": (2, None)}
MAIN_ONLY = ("logging", "writing", "pruning")  # what rank 0 does alone


@pytest.fixture
def config(tiny_run: Config) -> Config:
    return exact(tiny_run, steps=10)


@pytest.fixture
def expected(config: Config) -> object:
    """What the run comes to if nobody touches it; the same on any number of ranks."""
    assert train(1, config, "whole") == [0]
    return outcome("whole")


def stopped(config: Config, signame: str, phase: str, who: str, expected: object, out: str) -> None:
    """One case: a run that is stopped there, and ended by the same command."""
    world, rank = WHO[who]
    at, newest = PHASES[phase]
    ended = train(world, config, out, (rank, at, f"{signame} in {phase}"))
    note = f"{signame} in {phase}, {who}: {said(out, 0)}"
    assert ended == [128 + getattr(signal, signame)] * world, note
    found = re.search(
        rf"Interrupted: stopped by {signame} after step (\d+); everything is saved", said(out, 0)
    )
    assert found and int(found[1]) == steps(out)[-1] and newest in (None, int(found[1])), note
    assert not any("Interrupted" in said(out, r) for r in range(1, world)), note
    again = train(world, config, out)
    assert again == [0] * world, note + said(out, 0)
    assert outcome(out) == expected and debris(out) == [], note
    shutil.rmtree(out)


SLICE = [("SIGTERM", "writing"), ("SIGUSR1", "evaluation"), ("SIGINT", "backward")]
ALL = [(s, p) for s in SIGNALS for p in PHASES if (s, p) not in SLICE]


@pytest.mark.parametrize(
    ("signame", "phase"), [*SLICE, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]
)
def test_a_signal_in_any_phase_on_any_rank(
    config: Config, expected: object, signame: str, phase: str
) -> None:
    for who in WHO:
        if not (phase in MAIN_ONLY and who == "second of 2"):
            stopped(config, signame, phase, who, expected, "run")


@pytest.mark.parametrize(
    ("phase", "at", "saved"), [("step", 5, 4), pytest.param("evaluation", 4, 2, marks=pytest.mark.slow)]
)
def test_a_second_signal_leaves_at_once(
    config: Config, expected: object, phase: str, at: int, saved: int
) -> None:
    """Unsaved, and nothing of what was saved before is lost."""
    config = dataclasses.replace(config, save=dataclasses.replace(config.save, in_background=False))
    assert train(1, config, "run", (0, at, f"SIGTERM twice in {phase}")) == [-signal.SIGTERM]
    assert "again: at once, unsaved" in said("run", 0) and steps("run")[-1] == saved
    assert train(1, config, "run") == [0]
    assert outcome("run") == expected and debris("run") == []


@pytest.mark.parametrize(
    ("signame", "workers", "who"),
    [("SIGTERM", 2, "alone")]
    + [
        pytest.param(s, workers, who, marks=pytest.mark.slow)
        for s in SIGNALS
        for workers in (1, 2)
        for who in WHO
        if (s, workers, who) != ("SIGTERM", 2, "alone")
    ],
)
def test_a_signal_while_text_is_prepared(config: Config, signame: str, workers: int, who: str) -> None:
    """There is nothing to save: the process leaves, the others with it, and the same command begins again."""
    world, rank = WHO[who]
    signum = getattr(signal, signame)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers, dir="shards"))
    place = "waiting" if rank == 1 else "preparation"  # rank 0 prepares, for all
    ended = train(world, config, "run", (rank, 0, f"{signame} in {place}"))
    gone = (-signum, 128 + signum)
    assert ended[rank or 0] in gone, ended
    # Of two that are sent one, the second may never come to where it would send it.
    assert set(ended) <= {*gone, PEER_EXIT}, ended
    assert rank == 1 or not Path("shards").exists()
    assert train(world, config, "run") == [0] * world, said("run", 0)
    assert {p.name for p in Path().iterdir() if "shards" in p.name} == {"shards"}
    assert entries("run", "step")[-1]["step"] == 10


def test_an_evaluation_is_logged_once_however_often_it_is_begun(config: Config, expected: object) -> None:
    """Stopped in it, its step is saved without it; then killed after it, and before the save that would know of it."""
    assert train(1, config, "run", (0, 4, "SIGTERM in evaluation")) == [143]
    assert train(1, config, "run", (0, 4, "SIGKILL in save")) == [-signal.SIGKILL]
    assert [e["step"] for e in entries("run", "eval")] == [4]
    assert train(1, config, "run") == [0]
    assert outcome("run") == expected
