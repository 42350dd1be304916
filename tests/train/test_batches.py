"""A batch ramp: the closed form, the rows, the bits after any stop and on any number of ranks, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_child import said
from rank_child import train as train_ranks
from test_ranks import curve, log, tensors, with_train

from regpt.config import Config, EvalConfig, SampleConfig, SaveConfig, load_preset
from regpt.errors import CheckpointError, ConfigError, Interrupted
from regpt.train import session
from regpt.train.batches import Batches
from regpt.train.budget import Pace
from regpt.train.loop import Trainer
from regpt.train.machine import probe
from regpt.train.plan import make_plan, with_steps

LAX = settings(derandomize=True, deadline=None, max_examples=60)
whole, ramps = st.integers(1, 50).map(lambda n: 4 * n), st.integers(0, 90)
# Of `config` below: three steps of 2 rows, two of 4, three of 8.
ROWS = [2, 2, 2, 4, 4, 8, 8, 8]


@pytest.fixture
def config(tiny_run: Config, one_thread: None) -> Config:
    """8 rows in micro-batches of 2, dropout on."""
    config = with_train(tiny_run, steps=8, micro_rows=2, threads=1, batch_ramp_steps=5)
    return dataclasses.replace(config, save=SaveConfig(keep=9), sample=SampleConfig(tokens=2))


@LAX
@given(whole=whole, ramp=ramps)
def test_the_closed_form_is_the_plain_loop(whole: int, ramp: int) -> None:
    batches, before = Batches(whole, ramp), 0
    for step in range(100):
        rows = whole // 4 if 2 * step < ramp else whole // 2 if step < ramp else whole
        assert (batches.before(step), batches.rows(step)) == (before, rows)
        assert batches.steps_in(before / whole) == step
        assert batches.steps_in((before + rows - 1) / whole) == step
        assert batches.first_row(step, 3) == before + 3 * whole
        before += rows


@LAX
@given(whole=whole, ramp=ramps, back=st.integers(0, 95), bad=st.integers(0, 95), old=st.integers(0, 4))
def test_rows_to_pass_over_are_whole_batches_and_no_more(
    whole: int, ramp: int, back: int, bad: int, old: int
) -> None:
    batches, bad = Batches(whole, ramp), max(back, bad)
    end = batches.first_row(bad, old) + batches.rows(bad)
    skipped = batches.skipped(back, end)
    assert end <= batches.first_row(back, skipped) < end + whole
    if not ramp:
        assert skipped == bad + old + 1 - back


@LAX
@given(n_micro=st.integers(1, 24), micro_rows=st.integers(1, 8), world=st.integers(1, 3))
def test_fewer_micro_batches_and_only_then_smaller_ones(n_micro: int, micro_rows: int, world: int) -> None:
    rows = n_micro * micro_rows * world
    if rows % (4 * world):
        return
    batches = Batches(rows, 2)
    for step, share in ((0, 4), (1, 2), (2, 1)):
        n, of = batches.micro(step, n_micro, micro_rows)
        assert n * of * world == batches.rows(step) == rows // share
        assert of == micro_rows or n_micro % share


def test_tokens_are_what_was_read(config: Config) -> None:
    """In the plan, the log and the result."""
    plans: list[Any] = []
    heard = session.train(
        config, "run", listen=lambda e, _, v: plans.append(v["plan"]) if e == "plan" else None
    )
    tokens = [32 * n for n in itertools.accumulate(ROWS)]
    assert [e["tokens"] for e in log("run", "step")] == tokens
    assert heard.tokens == plans[0].total_tokens == tokens[-1]
    assert heard.tokens_per_second == pytest.approx(tokens[-1] / heard.seconds)
    seconds = np.diff([0.0] + [e["time_s"] for e in log("run", "step")])
    for line, rows, took in zip(log("run", "step"), ROWS, seconds, strict=True):
        assert line["tokens_per_second"] * took == pytest.approx(32 * rows)


def test_no_ramp_is_what_it_was(config: Config) -> None:
    """Whole batches from the beginning; and a ramp that is over trains on other rows, not on fewer micro-batches."""
    plain = with_train(config, batch_ramp_steps=0)
    plan = make_plan(plain, probe("cpu"), vocab_size=257)
    assert [plan.micro(s) for s in range(3)] == [(4, 2)] * 3 and plan.total_tokens == 8 * 256
    ramped = make_plan(config, probe("cpu"), vocab_size=257)
    assert [ramped.micro(s) for s in range(8)] == [(n // 2, 2) for n in ROWS]


@pytest.mark.parametrize("after", [0, 1, 3, 4, 5, 6])
def test_a_run_stopped_in_any_stage_ends_to_the_same_bits(
    config: Config, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.train(config, "whole")
    original, polls = Trainer.poll, []

    def poll(self: Trainer) -> None:
        if self.state.step == after and not polls:
            polls.append(1)
            signal.raise_signal(signal.SIGTERM)
        original(self)

    monkeypatch.setattr(Trainer, "poll", poll)
    with pytest.raises(Interrupted):
        session.train(config, "parts")
    session.train(config, "parts")
    assert (curve("parts"), tensors("parts")) == (curve("whole"), tensors("whole"))


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_a_run_killed_in_every_stage_ends_to_the_same_bits(config: Config) -> None:
    config = dataclasses.replace(config, save=SaveConfig(every=1, keep=9))
    session.train(config, "whole")
    for step in (2, 4, 7):
        assert train_ranks(1, config, "run", (0, step, "SIGKILL in backward")) == [-signal.SIGKILL]
    assert train_ranks(1, config, "run") == [0], said("run", 0)
    assert (curve("run"), tensors("run")) == (curve("whole"), tensors("whole"))


def test_another_ramp_is_another_run(config: Config) -> None:
    session.train(config, "run")
    with pytest.raises(CheckpointError, match=r"train\.batch_ramp_steps was 5, now 4"):
        session.train(with_train(config, batch_ramp_steps=4), "run")


@pytest.mark.parametrize("bad", [1, 3, 6])
def test_rolled_back_in_the_ramp_it_goes_on_behind_the_bad_rows(
    config: Config, bad: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No row before them is read again, and their own are not. Tokens are those of the updates that stayed."""
    config = with_train(config, on_bad_step="rollback")
    config = dataclasses.replace(config, save=SaveConfig(every=2), eval=EvalConfig(every=None))
    real, read, spoiled = Trainer.check_finite, [], []

    def spoil(self: Trainer, loss: float, norm: float) -> bool:
        first = self.next_row
        read.append((self.state.step, range(first, first + self.plan.batches.rows(self.state.step))))
        at_fault = self.state.step == bad and not spoiled
        spoiled.extend([True] if at_fault else [])
        return real(self, math.nan if at_fault else loss, norm)

    monkeypatch.setattr(Trainer, "check_finite", spoil)
    if bad == 1:  # there is no checkpoint yet
        with pytest.raises(Exception, match=r"at step 1 is nan(.|\n)*rows 2 to 3, "):
            session.train(config, "run")
        return
    session.train(config, "run")
    at = [step for step, _ in read].index(bad)
    (_, fault), (again, then) = read[at], read[at + 1]
    assert again == bad // 2 * 2 and fault.stop <= then.start < fault.stop + 8
    assert all(a[1].stop == b[1].start for a, b in itertools.pairwise(read[at + 1 :]))
    assert log("run", "step")[-1]["tokens"] == 32 * sum(ROWS)


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_exact_reduction_is_the_same_to_the_bit_on_1_and_2_ranks(config: Config) -> None:
    """Dropout on, and the number of ranks changes in the ramp."""
    config = with_train(config, reduction="exact", micro_rows=1)
    session.train(config, "one")
    assert train_ranks(2, config, "two") == [0, 0], said("two", 0)
    assert (curve("two"), tensors("two")) == (curve("one"), tensors("one"))
    assert train_ranks(2, config, "run", (0, 2, "SIGTERM")) == [143, 143]
    session.train(config, "run")
    assert (curve("run"), tensors("run")) == (curve("one"), tensors("one"))


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
def test_ddp_follows_one_process(config: Config) -> None:
    """In fewer micro-batches (of 1 row) and in smaller ones (of 4). Dropout off: its masks follow the micro-batches."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    for rows in (1, 4):
        config = with_train(config, micro_rows=rows)
        session.train(config, f"one{rows}")
        assert train_ranks(2, config, f"two{rows}") == [0, 0], said(f"two{rows}", 0)
        one, two = ([float.fromhex(x) for _, x in curve(f"{n}{rows}")] for n in ("one", "two"))
        assert two == pytest.approx(one, rel=2e-5)


@pytest.mark.parametrize(
    ("changes", "world", "message"),
    [
        (
            {"batch_ramp_steps": -1},
            1,
            "train.batch_ramp_steps must not be negative.\n  got: -1\n  try: --train.batch-ramp-steps 0 turns it off",
        ),
        (
            {"batch_ramp_steps": 9},
            1,
            "train.batch_ramp_steps=9 does not end before train.steps=8: no batch would be whole.\n"
            "  try: --train.batch-ramp-steps 1",
        ),
        (
            {"batch_tokens": 6 * 32},
            1,
            "train.batch_ramp_steps begins with a quarter of train.batch_tokens=192.\n  got: 6 rows of 32 tokens\n"
            "  expected: a multiple of 4 rows\n  try: --train.batch-tokens 128 or 256",
        ),
        (
            {"batch_tokens": 12 * 32},
            2,
            "train.batch_ramp_steps begins with a quarter of train.batch_tokens=384.\n"
            "  got: 12 rows of 32 tokens on 2 ranks\n"
            "  expected: a multiple of 8 rows\n  try: --train.batch-tokens 256 or 512",
        ),
        (
            {"reduction": "exact"},
            2,
            "train.reduction=exact with train.batch_ramp_steps needs a number of micro-batches a rank that divides by 4.\n"
            "  got: 2\n  try: --train.micro-rows 1",
        ),
    ],
)
def test_a_ramp_that_cannot_be(config: Config, changes: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        make_plan(with_train(config, **changes), probe("cpu"), vocab_size=257, world=world)
    assert str(e.value) == message


def test_a_plan_of_other_steps_counts_its_tokens(config: Config) -> None:
    """With a time budget the plan is fitted; a ramp then may be longer than train.steps."""
    plan = make_plan(with_train(config, minutes=1.0, steps=2), probe("cpu"), vocab_size=257, train_tokens=640)
    plan = with_steps(dataclasses.replace(plan, time_s=3.0), 8)
    assert plan.total_tokens == 32 * sum(ROWS) and plan.epochs == pytest.approx(plan.total_tokens / 640)
    assert plan.total_flops == plan.flops_per_token * plan.total_tokens
    assert plan.time_s == pytest.approx(3.0 * sum(ROWS) / 4)


@pytest.mark.parametrize("step", [0, 3, 12, 29, 40])
def test_a_pace_fits_steps_by_their_tokens(step: int) -> None:
    """A thousandth of a second a token, no pauses: the total that ends nearest."""
    before = Batches(8, 30).before
    pace = Pace(budget_s=0.5, total_steps=9, warmup_steps=2, recent_token_s=[1e-3] * 3)
    every: dict[str, int | None] = {"eval": None}
    total = pace.steps_that_fit(step, before(step) * 1e-3, before, every)
    assert total == min(range(200), key=lambda n: abs(before(n) * 1e-3 - 0.5))


def test_it_is_said(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """By the plan and of a run."""
    from regpt.cli import main

    session.train(config, "run")
    assert main(["inspect", "run"]) == 0
    ramp = "256 tokens, a quarter and then a half of it in the first 5 steps"
    assert f"training   8 steps of {ramp}" in capsys.readouterr().out
    assert str(Batches(8)) == ""
    assert load_preset("modern-char").config.train.batch_ramp_steps == 0
    assert Path("run/run.json").exists()
