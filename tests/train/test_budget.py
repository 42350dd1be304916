"""A time budget: whatever the speed does, the run ends with the time, and the rate comes down with it. No clock is real."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_child import said
from rank_child import train as train_ranks

from regpt.config import Config, EvalConfig, OptimConfig, SampleConfig, SaveConfig
from regpt.errors import ConfigError, Interrupted
from regpt.infer.engine import Piece
from regpt.optim.schedule import learning_rate
from regpt.train import budget, loop, session
from regpt.train.budget import Pace, _pauses
from regpt.train.checkpoint import newest_valid
from regpt.train.estimate import with_time
from regpt.train.loop import Trainer
from regpt.train.machine import probe
from regpt.train.plan import Plan, make_plan, with_steps
from tiny import tiny_hellaswag

BUDGET_S = 60.0


class Clock:
    """Stands still but where it is told that time passes."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def config(tiny_run: Config, one_thread: None) -> Config:
    """A minute, of which 200 steps of 0.25 s and ten pauses of a second would be all."""
    return dataclasses.replace(
        tiny_run,
        model=dataclasses.replace(tiny_run.model, n_layer=1, n_embd=16, dropout=0.0),
        train=dataclasses.replace(tiny_run.train, minutes=BUDGET_S / 60, batch_tokens=64),
        optim=dataclasses.replace(tiny_run.optim, warmup_steps=10),
        eval=EvalConfig(every=25),
        save=SaveConfig(keep=9),
    )


def timed(
    monkeypatch: pytest.MonkeyPatch,
    step_s: Callable[[int, float], float],
    *,
    estimate: int,
    eval_s: float = 0.6,
) -> Clock:
    """Have every step take `step_s(step, seconds since the beginning)`, an evaluation `eval_s`, a sample 0.3 s, a save
    0.1 s, and the plan expect `estimate` steps."""
    clock = Clock()

    def passing(name: str, cost_s: Callable[[Trainer], float]) -> None:
        original = getattr(Trainer, name)

        def slow(self: Trainer, *args: Any, **more: Any) -> Any:
            clock.now_s += cost_s(self)
            return original(self, *args, **more)

        monkeypatch.setattr(Trainer, name, slow)

    passing("update", lambda t: step_s(t.state.step, clock.now_s - 1000))
    passing("evaluate", lambda _: eval_s)
    passing("sample", lambda _: 0.3)
    passing("save", lambda _: 0.1)
    guess = Trainer._eval_guess_s

    def as_if_timed(self: Trainer, tokens: int) -> float:
        guess(self, tokens)
        return eval_s

    monkeypatch.setattr(Trainer, "_eval_guess_s", as_if_timed)
    monkeypatch.setattr(Trainer, "clock", clock)

    def estimated(plan: Plan, *_: object) -> Plan:
        return with_steps(plan, estimate)

    monkeypatch.setattr(session, "with_time", estimated)
    return clock


def steps(out: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


def never_up(rates: list[float]) -> bool:
    """Once the warm-up is over."""
    peak = rates.index(max(rates))
    return all(b <= a for a, b in itertools.pairwise(rates[peak:]))


def noisy(step: int, now_s: float) -> float:
    """A fifth up or down, and a hiccup of ten steps now and then."""
    rng = random.Random(step)
    return 0.25 * rng.uniform(0.8, 1.2) + (2.5 if rng.random() < 0.01 else 0)


SPEEDS: dict[str, Callable[[int, float], float]] = {
    "constant": lambda step, now_s: 0.25,
    "slow beginning": lambda step, now_s: 8.0 if step == 0 else 0.25,  # a compiler
    "half as fast from the middle on": lambda step, now_s: 0.25 if now_s < BUDGET_S / 2 else 0.5,
    "twice as fast from the middle on": lambda step, now_s: 0.5 if now_s < BUDGET_S / 2 else 0.25,
    "noisy": noisy,
}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("estimate", [70, 500])
def test_the_run_ends_with_the_time_and_the_rate_with_the_run(
    config: Config, speed: str, schedule: Any, estimate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, schedule=schedule))
    clock = timed(monkeypatch, SPEEDS[speed], estimate=estimate)
    result = session.train(config, "run")
    assert clock.now_s - 1000 == pytest.approx(BUDGET_S, rel=0.03)
    assert result.elapsed_s == pytest.approx(clock.now_s - 1000)
    log = steps("run")
    rates = [e["lr"] for e in log]
    assert never_up(rates)
    optim, last = config.optim, log[-1]
    assert max(rates) == pytest.approx(optim.lr)
    # The last update of a schedule of so many steps has almost min_lr; an unforeseen speed may leave two such steps.
    floor = learning_rate(last["total_steps"] - 3, optim, last["total_steps"])
    assert optim.min_lr <= rates[-1] <= floor * 1.02
    assert last["step"] == last["total_steps"] == result.step


@pytest.mark.parametrize("tokens", [0, 4, 64])
@pytest.mark.parametrize("in_background", [True, False])
def test_a_first_sample_and_checkpoint_at_the_very_end_are_allowed_for(
    config: Config, tokens: int, in_background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token takes 0.1 s, a prompt 0.4 s, a checkpoint 3 s, which its bytes foretell. Nothing is heard of the trial."""
    save, sample = SaveConfig(in_background=in_background), SampleConfig(tokens=tokens)
    config = dataclasses.replace(config, eval=EvalConfig(every=None), sample=sample, save=save)
    generate, make_sample = loop.generate, Trainer.sample
    clock = timed(
        monkeypatch,
        lambda *_: 0.25,
        estimate=100,
        eval_s=0.7,
    )
    n, make_save, generated = make_plan(config, probe("cpu"), vocab_size=257).parameters, Trainer.save, []
    monkeypatch.setattr(budget, "WRITE_BYTES_PER_S", n * budget.SAVED_BYTES / 3)

    def slowly(*args: Any) -> Iterator[Piece]:
        clock.now_s += 0.4
        generated.append(0)
        for piece in generate(*args):
            clock.now_s += 0.1
            generated[-1] += 1
            yield piece

    def slow_save(self: Trainer, *, required: bool) -> bool:
        clock.now_s += 2.9
        return make_save(self, required=required)

    monkeypatch.setattr(loop, "generate", slowly)
    monkeypatch.setattr(Trainer, "sample", make_sample)
    monkeypatch.setattr(Trainer, "save", slow_save)
    result = session.train(config, "run")
    assert generated == ([min(tokens, 8), tokens] if tokens else [])
    assert result.elapsed_s == pytest.approx(clock.now_s - 1000)
    assert clock.now_s - 1000 == pytest.approx(BUDGET_S, abs=0.3)
    samples = Path("run/samples.jsonl")
    assert (len(samples.read_text().splitlines()) if samples.exists() else 0) == bool(tokens)


@pytest.mark.parametrize(("every", "tasks_s"), [(25, 2.0), (None, 0.6)])
def test_tasks_are_allowed_for(
    config: Config, every: int | None, tasks_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what the last evaluation of them took; one that only comes at the end, by a guess as good as of the loss."""
    Path("hellaswag_val.jsonl").write_text(tiny_hellaswag(4))
    tasks = {"tasks": "hellaswag", "tasks_every": every, "tasks_data": "hellaswag_val.jsonl"}
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, **tasks))
    clock = timed(monkeypatch, lambda *_: 0.25, estimate=100)
    evaluate_tasks = Trainer.evaluate_tasks

    def slow(self: Trainer) -> None:
        clock.now_s += tasks_s
        evaluate_tasks(self)

    monkeypatch.setattr(Trainer, "evaluate_tasks", slow)
    session.train(config, "run")
    assert clock.now_s - 1000 == pytest.approx(BUDGET_S, abs=0.3)


def test_the_trial_changes_no_bit(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout on: losses are those of a run without it, and the generator of random numbers stands where it stood."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.1))
    trial, guessed = Trainer.guess_pauses, {}

    def watched(self: Trainer) -> None:
        before = torch.get_rng_state()
        trial(self)
        assert torch.equal(torch.get_rng_state(), before) and self.state.model.training
        assert self.state.pace is not None and set(self.state.pace.pause_s) == {"eval", "sample", "write"}
        guessed.update(self.state.pace.pause_s)

    def told(self: Trainer) -> None:
        assert self.state.pace is not None
        self.state.pace.guess(guessed)

    for out, guess in (("with", watched), ("without", told)):
        with monkeypatch.context() as m:
            timed(m, lambda *_: 0.25, estimate=100)
            m.setattr(Trainer, "guess_pauses", guess)
            session.train(config, out)
    a, b = ([e["loss_hex"] for e in steps(out)] for out in ("with", "without"))
    assert a[:100] == b[:100]


def test_what_was_measured_is_not_guessed_again() -> None:
    pace = Pace(budget_s=60.0, total_steps=9, warmup_steps=2, pause_s={"sample": 2.0})
    pace.guess({"sample": 5.0, "write": 1.0})
    assert pace.pause_s == {"sample": 2.0, "write": 1.0}
    assert budget.save_guess_s(10**9, in_background=True) == {"write": 60.0}
    assert budget.save_guess_s(10**9, in_background=False) == {"write": 60.0, "save": 60.0}
    assert budget.sample_guess_s([1.0, 3.0, 3.5, 4.5, 5.0], 11) == 2.0 + 10 * 0.5
    assert budget.sample_guess_s([1.0, 3.0], 5) == 10.0  # it ended at once


def test_slower_at_the_very_end_the_run_is_in_time_but_its_decay_is_cut_short(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no estimate can foresee: the last tenth of the time at half the speed."""
    clock = timed(monkeypatch, lambda step, now_s: 0.25 if now_s < 0.9 * BUDGET_S else 0.5, estimate=200)
    session.train(config, "run")
    assert clock.now_s - 1000 == pytest.approx(BUDGET_S, abs=0.5)
    rates = [e["lr"] for e in steps("run")]
    assert never_up(rates) and rates[-1] < config.optim.min_lr + 0.01 * config.optim.lr


def test_at_a_constant_speed_it_is_the_schedule_of_so_many_steps(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the estimate was right, too: the total then never changes."""
    config = dataclasses.replace(config, sample=SampleConfig(tokens=0), save=SaveConfig(in_background=False))
    timed(
        monkeypatch, lambda *_: 0.25, estimate=211, eval_s=0.7
    )  # and a save: 211 steps and 9 pauses of 0.8 s
    session.train(config, "run")
    log = steps("run")
    assert [e["total_steps"] for e in log[:5]] == [211] * 5 and len({e["total_steps"] for e in log}) <= 5
    optim, n = config.optim, len(log)
    assert [e["lr"] for e in log] == pytest.approx([learning_rate(s, optim, n) for s in range(n)], rel=0.03)


def test_a_stopped_run_goes_on_with_its_schedule(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its total, its decay, its time; the end is as if it had not been stopped, and a third call changes nothing."""
    with monkeypatch.context() as m:
        timed(m, lambda *_: 0.25, estimate=180)
        session.train(config, "whole")
    whole = steps("whole")
    with monkeypatch.context() as m:
        clock = timed(m, lambda *_: 0.25, estimate=180)
        original = Trainer.poll

        def poll(self: Trainer) -> None:
            if self.state.step == 90 and not stopped:
                stopped.append(True)
                signal.raise_signal(signal.SIGTERM)
            original(self)

        stopped: list[bool] = []
        m.setattr(Trainer, "poll", poll)
        with pytest.raises(Interrupted):
            session.train(config, "parts")
        found = newest_valid(Path("parts/checkpoints"), say=lambda _: None)
        assert found is not None
        assert found.state["pace"]["total_steps"] == whole[89]["total_steps"]
        assert found.state["elapsed_s"] == pytest.approx(whole[89]["elapsed_s"] + 0.1)  # and its save
        clock.now_s += 3600  # between the sittings, which does not count
        m.setattr(session, "with_time", lambda plan, *_: with_steps(plan, 7))  # nor does a new estimate
        result = session.train(config, "parts")
        parts = steps("parts")
        # The stop's own save took time, which may cost the end a step.
        assert abs(len(parts) - len(whole)) <= 1
        for a, b in list(zip(parts, whole, strict=False))[:-10]:
            assert (a["total_steps"], a["lr"], a["loss_hex"]) == (b["total_steps"], b["lr"], b["loss_hex"])
        assert result.elapsed_s == pytest.approx(BUDGET_S, rel=0.03)
        assert session.train(config, "parts").step == result.step
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, minutes=1.2))
        assert session.train(longer, "parts").elapsed_s == pytest.approx(72, rel=0.03)
        assert never_up([e["lr"] for e in steps("parts")])


def test_a_budget_too_short_for_the_warm_up_shortens_it(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, warmup_steps=500))
    timed(monkeypatch, lambda *_: 0.25, estimate=400)
    session.train(config, "run")
    rates = [e["lr"] for e in steps("run")]
    assert rates.index(max(rates)) < len(rates) * 0.3 and rates[-1] < 1.02 * config.optim.min_lr


def test_time_of_steps_undone_counts(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rollback takes the steps back, not the time."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, on_bad_step="rollback"))
    clock = timed(monkeypatch, lambda *_: 0.25, estimate=180)
    real, spoiled = Trainer.check_finite, []

    def spoil(self: Trainer, loss: float, norm: float) -> bool:
        bad = self.state.step == 70 and not spoiled
        spoiled.extend([True] if bad else [])
        return real(self, math.nan if bad else loss, norm)

    monkeypatch.setattr(Trainer, "check_finite", spoil)
    result = session.train(config, "run")
    assert spoiled and result.elapsed_s == pytest.approx(clock.now_s - 1000)
    assert result.elapsed_s == pytest.approx(BUDGET_S, rel=0.03)


@pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_whose_clocks_differ_agree(config: Config, strategy: Any) -> None:
    """Rank 0's counts; ranks of two minds about the end would wait for each other for ever."""
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, minutes=0.5, threads=1, strategy=strategy)
    )
    assert train_ranks(2, config, "run", (None, 0, "own clock")) == [0, 0], said("run", 0) + said("run", 1)
    last = steps("run")[-1]
    assert last["step"] == last["total_steps"]
    assert last["elapsed_s"] == pytest.approx(30, rel=0.05)


@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan, math.inf, 1e300])
def test_what_is_no_time_is_refused(config: Config, minutes: float) -> None:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, minutes=minutes))
    with pytest.raises(ConfigError, match=r"train\.minutes"):
        make_plan(config, probe("cpu"), vocab_size=257)


def test_a_schedule_that_cannot_follow_is_refused(config: Config) -> None:
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, decay_steps=100))
    with pytest.raises(ConfigError, match=r"optim\.decay_steps=100 fixes the schedule"):
        make_plan(config, probe("cpu"), vocab_size=257)


def test_the_plan_has_as_many_steps_as_fit(config: Config) -> None:
    plan = dataclasses.replace(make_plan(config, probe("cpu"), vocab_size=257, train_tokens=640), time_s=6.0)
    timed_plan = with_time(plan, config, probe("cpu"))  # 12 steps in 6 s
    assert (timed_plan.steps, timed_plan.total_tokens, timed_plan.time_s) == (120, 120 * 64, 60.0)
    assert timed_plan.epochs == pytest.approx(12)


def test_while_the_total_stands_still_the_decay_is_the_schedules() -> None:
    for schedule in ("cosine", "linear"):
        optim = OptimConfig(warmup_steps=7, schedule=schedule)  # type: ignore[arg-type]
        pace = Pace(budget_s=60.0, total_steps=100, warmup_steps=7, recent_token_s=[0.1] * 3)
        for step in range(100):
            rate = learning_rate(step, optim, 100, decayed=pace.decayed)
            assert rate == pytest.approx(learning_rate(step, optim, 100), rel=1e-12)
            pace.made(step, optim)
        assert pace.decayed == 1


def test_an_estimate_far_too_low_does_not_end_the_run(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = timed(monkeypatch, lambda *_: 0.25, estimate=1)
    session.train(config, "run")
    assert clock.now_s - 1000 == pytest.approx(BUDGET_S, rel=0.03)
    log = steps("run")
    optim, n = config.optim, len(log)
    assert [e["lr"] for e in log] == pytest.approx([learning_rate(s, optim, n) for s in range(n)], rel=0.05)


def test_pauses_are_counted_as_the_loop_makes_them() -> None:
    for step, n, every in itertools.product(range(12), range(12), [1, 3, 5]):
        due = [s for s in range(step, step + n + 1) if s and (s == step + n or s % every == 0)]
        assert _pauses(step, n, every) == max(len(due), 1), (step, n, every)


def test_a_pace_survives_json() -> None:
    pace = Pace(budget_s=60.0, total_steps=9, warmup_steps=2, recent_token_s=[0.1], pause_s={"eval": 1.0})
    assert Pace.from_dict(json.loads(json.dumps(dataclasses.asdict(pace)))) == pace
