"""The training loop: schedule, micro-batches, clip, check, step, log; evaluate, ask tasks, sample and save when due.

Everything that must survive an interruption stands in `TrainState`. The order of the data, dropout and samples are
functions of the seed and the step, so the step is all the state that they have.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from regpt.config import Config, OptimConfig
from regpt.data.loader import Loader
from regpt.data.split import TokenSplit
from regpt.errors import CheckpointError, DeviceError, Interrupted, TrainingDiverged
from regpt.evals.loss import SplitLoss, split_loss
from regpt.infer.engine import Piece, collect, generate
from regpt.infer.settings import SamplingSettings
from regpt.models import LanguageModel
from regpt.optim.groups import make_optimizer
from regpt.optim.schedule import learning_rate, set_rates
from regpt.tokenizers import Tokenizer
from regpt.train import checkpoint, named
from regpt.train.budget import (
    TRIED_TOKENS,
    UNMEASURED_STEPS,
    Pace,
    pause_periods,
    sample_guess_s,
    save_guess_s,
)
from regpt.train.checkpoint import SaveFailed
from regpt.train.compile import keep_compiled
from regpt.train.dist import Ranks
from regpt.train.machine import Machine, autocast, peak_memory_bytes
from regpt.train.parallel import Gradients, grad_norm, shard, spread, whole
from regpt.train.plan import Plan
from regpt.train.run import RunDirectory
from regpt.train.signals import StopRequest
from regpt.train.tasks import Prepared, evaluate_tasks, passing_tokens
from regpt.train.track import Listener, Tracker

# Small micro-batches are evaluated in passes up to this many tokens (a CPU is no faster with more, and they cost memory).
# Logits need no bound of their own: where there are many, `models/loss.py` holds a chunk of them.
EVAL_TOKENS = {"cpu": 2_048}
EVAL_TOKENS_ELSEWHERE = 16_384
SPIKE_WINDOW = 100  # losses that a spike is measured against
MAX_BAD = 10  # bad steps, each within so many of the one before, after which no policy goes on
SURPRISE_NATS = 0.5  # a first loss further than this from ln(V) is worth a word


@dataclass(kw_only=True)
class TrainState:
    """All that must survive a crash, beside the settings."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    """Updates made."""
    seconds: float = 0.0
    """Time spent in training steps, over all sittings."""
    elapsed_s: float = 0.0
    """Wall time of the loop, over all sittings: what `train.minutes` counts."""
    pace: Pace | None = None
    """The length of a run with a time budget; None without one."""
    evaluated_step: int | None = None
    tasks_step: int | None = None
    sampled_step: int | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    skipped_steps: int = 0
    """Whole global batches passed over by rolling back: the batch of step s is number s + skipped_steps."""
    bad_in_a_row: int = 0
    """Bad steps of which each came within MAX_BAD steps of the one before."""
    last_bad_step: int = -1_000_000
    recent_losses: list[float] = dataclasses.field(default_factory=list)
    """The last SPIKE_WINDOW, where spikes are looked for."""
    best_step: int | None = None
    best_val_loss: float | None = None


COUNTERS = [
    f.name for f in dataclasses.fields(TrainState) if f.name not in ("model", "optimizer", "scaler", "pace")
]


class Trainer:
    """One run; above one rank every rank has a trainer, and all go through the same steps.

    Args:
        ranks: who trains with us. Only rank 0 writes, logs and is heard.
        run: where checkpoints and the log go.
        facts: plain values stored with every checkpoint, so that it can be loaded without the run's settings.
        trackers, listen: hear of every event, after the log.
        stop: polled between micro-batches and evaluation passes.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)
    """Seconds from some beginning."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        machine: Machine,
        model: nn.Module,
        tokenizer: Tokenizer,
        loader: Loader,
        val_split: TokenSplit | None,
        tasks: Sequence[Prepared] = (),
        *,
        run: RunDirectory,
        facts: dict[str, Any],
        trackers: Sequence[Tracker],
        listen: Listener,
        stop: StopRequest,
        ranks: Ranks,
    ) -> None:
        self.config, self.plan, self.machine, self.tokenizer = config, plan, machine, tokenizer
        self.run_directory, self.facts, self.stop = run, facts, stop
        self.trackers, self.listen = trackers, listen
        self.ranks = ranks
        model.to(machine.device)
        if plan.strategy == "fsdp":
            shard(model, config, ranks, machine.device)
        self.state = TrainState(
            model=model,
            optimizer=make_optimizer(
                model,
                config.optim,
                machine.kind,
                dtype=plan.dtype,
                ranks=ranks,
                exact=plan.reduction == "exact",
            ),
            scaler=torch.amp.GradScaler(machine.kind, enabled=plan.dtype == "float16"),
        )
        self.loader = loader
        self.val_split, self.tasks = val_split, tasks
        tokens = EVAL_TOKENS.get(machine.kind, EVAL_TOKENS_ELSEWHERE)
        self.eval_rows = config.eval.micro_rows or max(plan.micro_rows, tokens // config.model.block_size)
        self.gradients = Gradients(model, plan, ranks)
        self.compute_loss: Callable[[Tensor, Tensor], Tensor] = self.gradients.module
        self.saved_step: int | None = None
        """Of the last save that was begun, unless it failed."""
        self.kept_step: int | None = None
        """Of the last checkpoint that is there."""
        self._saving: _Saving | None = None
        self._clock_s = self.clock()  # up to where `elapsed_s` has counted
        self._steps_here = 0  # of this sitting
        self.sampling = SamplingSettings(
            max_new_tokens=max(config.sample.tokens, 1),
            temperature=config.sample.temperature,
            top_k=config.sample.top_k,
            seed=config.seed,
        )
        if plan.compile:
            self.compute_loss = self._compiled(self.gradients.module)
        self._set_pace()

    # --- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last step.

        Raises:
            Interrupted: a signal asked for a stop; everything is saved.
            TrainingDiverged: a loss or gradient was not finite; the update was not made.
        """
        s = self.state
        s.model.train()
        self._clock_s = self.clock()
        self.guess_pauses()
        try:
            while True:
                last, news = s.step >= self.total_steps, False
                if s.evaluated_step != s.step and (last or _due(s.step, self.config.eval.every)):
                    with self._pause("eval"):
                        self.evaluate()
                    news = True
                if s.tasks_step != s.step and self._tasks_due(last):
                    with self._pause("tasks"):
                        self.evaluate_tasks()
                    news = True
                if s.sampled_step != s.step and self._sample_due(last):
                    with self._pause("sample"):
                        self.sample()
                    news = True
                if self._save_due(last) and (news or s.step != self.saved_step):
                    with self._pause("save"):
                        saved = self.save(required=last)
                    if not saved:
                        continue  # back at an earlier step
                if last:
                    return
                self.train_step()
        except _Stopped:
            self.settle()
            if self.saved_step != s.step:
                self.save(required=True)
            raise Interrupted(
                f"stopped by {self.stop.name} after step {s.step}; everything is saved.",
                signum=self.stop.signum or 2,
                hint="the same command continues (without --fresh)",
            ) from None

    def train_step(self) -> None:
        """One update on one global batch."""
        s, config, plan = self.state, self.config, self.plan
        began = self.clock()
        rate = set_rates(s.optimizer.param_groups, s.step, self.optim, self.total_steps, decayed=self.decayed)
        self.gradients.n_micro = n_micro = plan.micro(s.step)[0]
        for micro in range(n_micro):
            self.poll()
            x, y = self.loader.batch(s.step, micro, n_micro, self.ranks.rank, plan.world, s.skipped_steps)
            self.seed_dropout(s.step + s.skipped_steps, micro)
            self.gradients.before(micro)
            with self.autocast():
                micro_loss = self.compute_loss(self.move(x), self.move(y))
            s.scaler.scale(micro_loss * self.gradients.scale).backward()  # type: ignore[no-untyped-call]
            self.gradients.after(micro_loss)
        loss = self.gradients.finish()
        s.scaler.unscale_(s.optimizer)
        norm = grad_norm(s.model.parameters(), config.optim.clip_norm or math.inf)
        if not self.check_finite(loss, norm):
            return
        self.update()
        s.step += 1
        s.seconds += (took := self.clock() - began)
        self.keep_pace()
        if s.step == 1:
            self.check_first_loss(loss)
        if s.step == 1 or s.step == self.total_steps or _due(s.step, config.track.log_every):
            self.say("step", s.step, self._numbers(loss, norm, rate, took))

    def evaluate(self) -> None:
        """The loss over the whole validation split."""
        s = self.state
        s.evaluated_step = s.step
        if self.val_split is None:
            return
        began = self.clock()
        try:
            result: SplitLoss = split_loss(
                cast(LanguageModel, s.model),
                self.val_split,
                rows=self.eval_rows,
                device=self.machine.device,
                autocast=self.autocast,
                between=self.poll,
                ranks=self.ranks,
            )
        except _Stopped:
            s.evaluated_step = None
            raise
        finite = math.isfinite(result.nats)
        s.val_loss = result.nats if finite else None
        s.val_bits_per_byte = result.bits_per_byte if finite else None
        improved = finite and (s.best_val_loss is None or result.nats < s.best_val_loss)
        if improved:
            s.best_step, s.best_val_loss = s.step, result.nats
        self.say(
            "eval",
            s.step,
            {
                **self._place(),
                "val_loss": result.nats,
                "val_perplexity": result.perplexity,
                "val_bits_per_byte": result.bits_per_byte,
                "val_tokens": result.tokens,
                "best": improved,
                "eval_s": self.clock() - began,
            },
        )

    def evaluate_tasks(self) -> None:
        """What the settings ask for beside the loss."""
        s = self.state
        s.tasks_step = s.step
        began = self.clock()
        try:
            figures = evaluate_tasks(
                self.tasks,
                cast(LanguageModel, s.model),
                self.tokenizer,
                device=self.machine.device,
                autocast=self.autocast,
                poll=self.poll,
                ranks=self.ranks,
            )
        except _Stopped:
            s.tasks_step = None
            raise
        self.say("tasks", s.step, {**self._place(), **figures, "tasks_s": self.clock() - began})

    def sample(self) -> None:
        """A short text from the weights as they are."""
        s, prompt = self.state, self.config.sample.prompt

        def polled() -> Iterator[Piece]:
            for piece in generate(cast(LanguageModel, s.model), self.tokenizer, prompt, self.sampling):
                # Ranks might draw texts of different lengths, and then poll unequally often.
                if self.ranks.world == 1:
                    self.poll()
                yield piece

        text = ""
        if self.ranks.main or self.gradients.sharded:
            text = collect(polled(), self.tokenizer.eot_id)[0].text
        self.poll()
        s.sampled_step = s.step
        self.say("sample", s.step, {"prompt": prompt, "text": text})

    def update(self) -> None:
        """Apply the gradients. In float16 an overflow skips the update and halves the scale; too many mean the end."""
        s = self.state
        scale = s.scaler.get_scale()
        s.scaler.step(s.optimizer)
        s.scaler.update()
        s.optimizer.zero_grad(set_to_none=True)
        if s.scaler.get_scale() < scale:
            self.say(
                "note", s.step, {"text": f"float16 overflowed at step {s.step}; the update was left out."}
            )
            if s.scaler.get_scale() < 1:
                raise TrainingDiverged(
                    f"gradients overflow float16 at every scale down to {s.scaler.get_scale():g}, at step {s.step}.",
                    hint="a lower --optim.lr, or --train.dtype float32",
                )

    # --- how long ----------------------------------------------------------------------------------------------------

    @property
    def total_steps(self) -> int:
        """Where the run ends, as far as is known now."""
        return self.state.pace.total_steps if self.state.pace else self.plan.steps

    @property
    def optim(self) -> OptimConfig:
        """The schedule's settings, with the warm-up that a time budget has room for."""
        pace, optim = self.state.pace, self.config.optim
        return dataclasses.replace(optim, warmup_steps=pace.warmup_steps) if pace else optim

    @property
    def decayed(self) -> float | None:
        """Share of the decay that lies behind the next update; None where it follows from step and total."""
        return self.state.pace.decayed if self.state.pace else None

    def tick(self) -> float:
        """Count the wall time up to now; the seconds since it was last counted."""
        before, self._clock_s = self._clock_s, self.clock()
        self.state.elapsed_s += (passed := self._clock_s - before)
        return passed

    @property
    def step_tokens(self) -> int:
        """Of the last update."""
        s, before = self.state, self.plan.tokens_before
        return before(s.step) - before(s.step - 1)

    def keep_pace(self) -> None:
        """After a step: the total that fits the time budget, if there is one; the same on all ranks."""
        s, config = self.state, self.config
        step_s = self.tick()
        self._steps_here += 1
        if s.pace is None:
            return
        s.pace.made(s.step - 1, config.optim)
        if self._steps_here > UNMEASURED_STEPS:
            s.pace.measured(step_s / self.step_tokens)
        fitting = s.pace.steps_that_fit(
            s.step,
            s.elapsed_s,
            self.plan.tokens_before,
            pause_periods(config),
        )
        fitting = self.ranks.largest(fitting if self.ranks.main else 0)  # rank 0's clock decides
        s.pace.follow(s.step, fitting)

    def _set_pace(self) -> None:
        """The total as it was saved, or a first estimate where the budget is new."""
        s, minutes = self.state, self.config.train.minutes
        if minutes is None:
            s.pace = None
        elif s.pace is None or s.pace.budget_s != 60 * minutes:
            budget_s = 60 * minutes
            total = s.step + round(max(1 - s.elapsed_s / budget_s, 0.0) * self.plan.steps)
            s.pace = (
                dataclasses.replace(s.pace, budget_s=budget_s, total_steps=total)
                if s.pace
                else Pace(budget_s=budget_s, total_steps=total, warmup_steps=self.config.optim.warmup_steps)
            )

    def guess_pauses(self) -> None:
        """Before the first step: what an evaluation, a sample, a checkpoint may take, so that the first may come at the end.

        A few tokens are generated for it, which nobody sees; nothing of the run but its length depends on them.
        """
        pace, tokens, prompt = self.state.pace, self.config.sample.tokens, self.config.sample.prompt
        if pace is None or self.state.step >= self.total_steps:
            return
        pace.guess(save_guess_s(self.plan.parameters, in_background=self.config.save.in_background))
        if tokens and "sample" not in pace.pause_s and (self.ranks.main or self.gradients.sharded):
            few = dataclasses.replace(self.sampling, max_new_tokens=min(tokens, TRIED_TOKENS))
            read_s = [self.clock()]
            for _ in generate(cast(LanguageModel, self.state.model), self.tokenizer, prompt, few):
                read_s.append(self.clock())
            pace.guess({"sample": sample_guess_s(read_s, tokens)})
        if self.val_split is not None and "eval" not in pace.pause_s:
            pace.guess({"eval": self._eval_guess_s(self.val_split.n_tokens)})
        if self.tasks and "tasks" not in pace.pause_s:
            passing = passing_tokens(self.config, [p.task.name for p in self.tasks])
            pace.guess({"tasks": self._eval_guess_s(passing)})
        self.tick()

    @torch.no_grad()
    def _eval_guess_s(self, tokens: int) -> float:
        """What an evaluation on `tokens` may take: a pass, the second time that it is made, for each. All ranks make it."""
        model = cast(LanguageModel, self.state.model)
        ids = torch.zeros(self.eval_rows, self.config.model.block_size, dtype=torch.int64)
        model.eval()
        for _ in range(2):
            began = self.clock()
            with self.autocast():
                float(model(self.move(ids), self.move(ids), reduction="sum"))
        model.train()
        return (self.clock() - began) * math.ceil(tokens / (self.ranks.world * ids.numel()))

    @contextlib.contextmanager
    def _pause(self, kind: str) -> Iterator[None]:
        """Training waits for what is done inside; a time budget allows for as much the next time."""
        began = self.clock()
        yield
        if self.state.pace:
            self.state.pace.pause_s[kind] = self.clock() - began
        self.tick()

    # --- what keeps it safe ------------------------------------------------------------------------------------------

    def poll(self) -> None:
        """Leave the work here if a signal asked for it. No update is half made at any place that calls this."""
        self.ranks.doing = f"step {self.state.step}"
        # A signal to one rank stops all, at the same place.
        if signum := self.ranks.largest(self.stop.signum or 0):
            self.stop.signum = signum
            self.gradients.drop()
            self.state.optimizer.zero_grad(set_to_none=True)
            raise _Stopped

    def check_finite(self, loss: float, norm: float) -> bool:
        """Before the update: a loss or gradient that is not finite must not reach the weights."""
        s = self.state
        scaling = s.scaler.is_enabled()  # float16 overflows now and then; the scaler skips that update
        finite = math.isfinite(loss) and (math.isfinite(norm) or scaling)
        spiked = finite and self._is_spike(loss)
        if not self.ranks.largest(not finite or spiked):
            if self.config.train.spike_sigma is not None:
                s.recent_losses = [*s.recent_losses, loss][-SPIKE_WINDOW:]
            return True
        self.settle()  # so that the message, and going back, know the last checkpoint
        self._count_bad_step()
        first, policy = self.next_row, self.config.train.on_bad_step
        end = first + self.plan.batches.rows(s.step)
        what, number = ("gradient norm", str(norm)) if math.isfinite(loss) else ("loss", str(loss))
        if finite:
            what, number = (
                ("loss", f"{loss:.4f}, a spike") if spiked else ("gradient of another rank", "not finite")
            )
        error = TrainingDiverged(
            f"the {what} at step {s.step} is {number}; the update was not made.",
            got=f"rows {first} to {end - 1}, learning rate "
            f"{learning_rate(s.step, self.optim, self.total_steps, decayed=self.decayed):.2e}, {self.plan.dtype}",
            hint=f"a lower --optim.lr, a longer --optim.warmup-steps, or --train.dtype float32; {self.last_checkpoint}",
        )
        s.scaler.update()  # it was asked to unscale, and is not asked to step
        s.optimizer.zero_grad(set_to_none=True)
        if policy == "stop" or s.bad_in_a_row > MAX_BAD:
            raise error
        if policy == "skip":
            if not self.weights_finite():
                error.what = (
                    f"weights are not finite at step {s.step}, so to leave updates out does not help."
                )
                error.hint = "--train.on-bad-step rollback goes back to the last checkpoint, which is finite"
                raise error
            self.say(
                "note", s.step, {"text": f"{error.what} Its rows are left out (train.on_bad_step=skip)."}
            )
            s.step += 1
        else:
            self._roll_back(error, end)
        return False

    @property
    def next_row(self) -> int:
        """The first row of the next update."""
        return self.plan.batches.first_row(self.state.step, self.state.skipped_steps)

    def _count_bad_step(self) -> None:
        s = self.state
        s.bad_in_a_row = s.bad_in_a_row + 1 if s.step <= s.last_bad_step + MAX_BAD else 1
        s.last_bad_step = s.step

    @property
    def last_checkpoint(self) -> str:
        """What a message says of it."""
        return f"the last checkpoint is of step {'none' if self.kept_step is None else self.kept_step}"

    def weights_finite(self) -> bool:
        """Whether every weight on every rank is a number."""
        ours = all(bool(p.isfinite().all()) for p in self.gradients.local_parameters())
        return not self.ranks.largest(not ours)

    def _is_spike(self, loss: float) -> bool:
        """Far above the losses before it; never before there are as many as the window holds."""
        sigma, recent = self.config.train.spike_sigma, self.state.recent_losses
        if sigma is None or len(recent) < SPIKE_WINDOW:
            return False
        return loss > statistics.fmean(recent) + sigma * statistics.pstdev(recent)

    def _roll_back(self, error: TrainingDiverged, row: int) -> None:
        """To the last checkpoint, from where training goes on with the rows from `row` on."""
        s = self.state
        times, bad_step, elapsed_s = s.bad_in_a_row, s.last_bad_step, s.elapsed_s

        def note(text: str) -> None:
            self.say("note", s.step, {"text": text})

        found = self.ranks.together(
            lambda: (
                checkpoint.newest_valid(self.run_directory.checkpoints, say=note) if self.ranks.main else None
            )
        )
        if not self.ranks.from_main(found is not None):
            raise error
        self.restore(found)
        s.skipped_steps = self.plan.batches.skipped(s.step, row)
        s.bad_in_a_row, s.last_bad_step = times, bad_step
        s.elapsed_s = elapsed_s  # the steps are undone, the time is not
        self.rewind()
        note(
            f"{error.what} Back to step {s.step}, and past the rows up to there (train.on_bad_step=rollback)."
        )

    def rewind(self) -> None:
        """Take the log back to this step: what is done from here is written anew."""
        s = self.state
        again = [
            event
            for event, done in (
                ("eval", s.evaluated_step),
                ("tasks", s.tasks_step),
                ("sample", s.sampled_step),
            )
            if done != s.step  # the checkpoint is of before it, though the log may have it
        ]
        if self.ranks.main:
            self.run_directory.rewind(s.step, again=again)

    def check_first_loss(self, loss: float) -> None:
        """A fresh model knows nothing, so its loss is ln(V); anything else is a fault worth a word."""
        expected = math.log(self.plan.vocab_size)
        if abs(loss - expected) > SURPRISE_NATS:
            self.say(
                "note",
                self.state.step,
                {
                    "text": f"the first loss is {loss:.3f}, but a model that knows nothing has ln({self.plan.vocab_size}) = "
                    f"{expected:.3f}. The initialisation or the data is not what it should be."
                },
            )

    def seed_dropout(self, step: int, micro: int) -> None:
        """Dropout's masks depend on the seed, the batch's number, and which of its rows the micro-batch holds."""
        if self.config.model.dropout:
            n_micro, micro_rows = self.plan.micro(self.state.step)
            row = (self.ranks.rank * n_micro + micro) * micro_rows
            digest = hashlib.blake2b(f"{self.config.seed}/{step}/{row}".encode(), digest_size=8).digest()
            torch.manual_seed(int.from_bytes(digest, "little") >> 1)

    def save(self, *, required: bool) -> bool:
        """A checkpoint of this very step, then retention. False: weights were not finite, and the run was rolled back.

        Args:
            required: a failure ends the run. Otherwise it is said, and training goes on to the next save: the
                checkpoints that are there stay as they are.

        Raises:
            TrainingDiverged: weights are not finite, and the policy is not to roll back.
        """
        s, ranks = self.state, self.ranks
        self.settle()
        # They would be what the run goes back to, and would push the good ones out.
        if not self.weights_finite():
            error = TrainingDiverged(
                f"weights are not finite at step {s.step}; they were not saved.",
                hint=f"a lower --optim.lr or a larger --optim.eps; {self.last_checkpoint}",
            )
            self._count_bad_step()
            if self.config.train.on_bad_step != "rollback" or s.bad_in_a_row > MAX_BAD:
                raise error
            self._roll_back(error, self.next_row)
            return False
        self.tick()
        tensors, scalars = named.optimizer_tensors(s.model, s.optimizer)
        model, optimizer = whole(named.model_tensors(s.model), ranks), whole(tensors, ranks)
        self.saved_step = s.step
        if ranks.main:
            state = self.facts | {name: getattr(s, name) for name in COUNTERS}
            state |= {"optimizer_scalars": scalars, "scaler": s.scaler.state_dict()}
            state["pace"] = dataclasses.asdict(s.pace) if s.pace else None
            in_background = self.config.save.in_background and not required
            # Training changes them meanwhile; what was in shards is a copy.
            if in_background and not self.gradients.sharded:
                model, optimizer = (
                    {k: t.detach().to("cpu", copy=True) for k, t in x.items()} for x in (model, optimizer)
                )
            self._saving = _Saving(self.run_directory.checkpoints, s.step, model, optimizer, state)
            try:
                self.run_directory.sync()  # no step below the checkpoint may miss its line
                self._saving.start(in_background, keep=self.config.save.keep, best=s.best_step)
            except OSError as e:
                self._saving.fail(e)
        if required or not self.config.save.in_background:
            self.settle(required=required)
        return True

    def settle(self, *, required: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is, and say how it went; all ranks call it."""
        saving, self._saving = self._saving, None
        failure = saving.finish() if saving else None
        told = self.ranks.from_main(str(failure) if failure else None)
        if told:
            self.saved_step = None

        def fail() -> None:
            if failure is not None:
                raise failure

        if required:
            self.ranks.together(fail)
        if told:
            step = saving.step if saving else self.state.step
            self.say("note", step, {"text": f"{told}\n  training goes on; the next save will try again."})
        elif saving:
            self._saved(saving)

    def _saved(self, saving: _Saving) -> None:
        name = checkpoint.checkpoint_name(saving.step)
        self.kept_step = saving.step
        self.say("save", saving.step, {"path": name, "save_s": saving.seconds})
        if self.state.pace:
            self.state.pace.pause_s["write"] = saving.seconds
        if saving.left_behind:
            self.say("note", saving.step, {"text": saving.left_behind})

    def restore(self, found: checkpoint.Checkpoint | None) -> None:
        """Continue from a verified checkpoint, which only rank 0 reads; the others give None."""
        s, ranks = self.state, self.ranks

        def read() -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
            if found is None:
                return None
            weights, moments = found.model_tensors(), found.optimizer_tensors()
            if moments is None:
                raise CheckpointError(
                    f"{found.path} holds weights only, so training cannot continue from it.",
                    hint="train in another --out, or --fresh",
                )
            named.check_model_tensors(s.model, weights)
            return weights, moments

        parts = ranks.together(read)
        state = ranks.from_main(found.state if found else None)
        own, like = named.model_tensors(s.model), dict(s.model.named_parameters())
        with torch.no_grad():
            for name, t in spread(parts and parts[0], sorted(own), own, ranks):
                own[name].copy_(t)
        keys = ranks.from_main(sorted(parts[1]) if parts else None)
        moments = dict(spread(parts and parts[1], keys, {k: like[k.rpartition(".")[0]] for k in keys}, ranks))
        named.load_optimizer(s.model, s.optimizer, moments, state["optimizer_scalars"])
        if state["scaler"]:  # empty where the run was not in float16 so far
            s.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(s, name, state.get(name, getattr(s, name)))
        s.pace = Pace.from_dict(state.get("pace"))
        self._set_pace()
        self.saved_step = self.kept_step = s.step

    def say(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Into the log, to the trackers, to whoever listens; from rank 0 only."""
        if not self.ranks.main:
            return
        self.run_directory.log(event, step, values)
        for tracker in self.trackers:
            tracker.event(event, step, values)
        self.listen(event, step, values)

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, and the trackers write what they hold."""
        if (saving := self._saving) is not None:
            if failure := saving.finish():
                self.say("note", saving.step, {"text": str(failure)})
            else:
                self._saved(saving)
        for tracker in self.trackers:
            tracker.close()

    # --- small parts -------------------------------------------------------------------------------------------------

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Matrix products in the plan's dtype; weights stay float32."""
        return autocast(self.machine, self.plan.dtype)

    def move(self, x: Tensor) -> Tensor:
        """To the device, without waiting where that is possible."""
        if self.machine.kind == "cuda":
            return x.pin_memory().to(self.machine.device, non_blocking=True)
        return x.to(self.machine.device)

    def _tasks_due(self, last: bool) -> bool:
        return bool(self.tasks) and (last or _due(self.state.step, self.config.eval.tasks_every))

    def _sample_due(self, last: bool) -> bool:
        s, config = self.state, self.config.sample
        at_eval = config.every is None and s.step > 0 and s.evaluated_step == s.step
        return bool(config.tokens) and (last or at_eval or _due(s.step, config.every))

    def _save_due(self, last: bool) -> bool:
        s, every = self.state, self.config.save.every
        at_eval = s.evaluated_step == s.step and (every is None or s.best_step == s.step)
        return s.step > 0 and (last or at_eval or (every is not None and _due(s.step, every)))

    def _place(self) -> dict[str, Any]:
        """How far training has come: the step's tokens and time, so that any of them may be a curve's axis."""
        s = self.state
        return {
            "tokens": self.plan.tokens_before(s.step),
            "time_s": s.seconds,
            "elapsed_s": s.elapsed_s,
        }

    def _numbers(self, loss: float, norm: float, rate: float, took: float) -> dict[str, Any]:
        plan = self.plan
        per_second = self.step_tokens / took
        numbers: dict[str, Any] = {
            "loss": loss,
            "lr": rate,
            "grad_norm": norm,
            **self._place(),
            "tokens_per_second": per_second,
            "total_steps": self.total_steps,
            "memory_bytes": peak_memory_bytes(self.machine),
        }
        if self.machine.peak_flops and plan.dtype != "float32":  # the data sheet's figure is for 16 bits
            numbers["mfu"] = per_second * plan.flops_per_token / (self.machine.peak_flops * plan.world)
        return numbers

    def _compiled(self, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
        """The compiled loss; with compile=auto a failure is said once and training goes on without."""

        def failed(e: Exception) -> None:
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            if self.config.train.compile == "on":
                raise DeviceError(f"torch.compile failed: {reason}", hint="--train.compile off") from e
            self.say(
                "note", self.state.step, {"text": f"torch.compile failed, going on without it: {reason}"}
            )
            self.compute_loss = model

        keep_compiled()
        try:
            compiled = torch.compile(model, dynamic=False)
        except RuntimeError as e:  # this Python or platform has none
            failed(e)
            return model

        def attempt(x: Tensor, y: Tensor) -> Tensor:
            state = torch.get_rng_state()
            try:
                return cast(Tensor, compiled(x, y))
            except torch._dynamo.exc.TorchDynamoException as e:
                failed(e)
                torch.set_rng_state(state)  # dropout as it would have been
                return cast(Tensor, model(x, y))

        return attempt


class _Saving:
    """One checkpoint being written, in a thread where that is asked for; nobody changes its tensors meanwhile."""

    def __init__(
        self,
        folder: Path,
        step: int,
        model: dict[str, Tensor],
        optimizer: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        self.folder, self.step, self.seconds = folder, step, 0.0
        self.left_behind: str | None = None
        """Why older checkpoints could not be deleted, if they could not."""
        self._model, self._optimizer, self._state = model, optimizer, state
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def start(self, in_background: bool, *, keep: int, best: int | None) -> None:
        """Write it and prune older ones, here and now or in a thread."""
        if not in_background:
            self._write(keep, best)
            return
        self._thread = threading.Thread(target=self._write, args=(keep, best), name="regpt-save")
        self._thread.start()

    def fail(self, e: OSError) -> None:
        """It is not begun, for the log before it could not be written."""
        what = f"the checkpoint of step {self.step} could not be written, nor the log before it: {e.strerror or e}."
        self._error = SaveFailed(what, self.folder, no_space=e.errno in checkpoint.DISK_FULL)

    def finish(self) -> SaveFailed | None:
        """Wait; what went wrong on the disk, if anything did."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None and not isinstance(self._error, SaveFailed):
            return SaveFailed(
                f"the checkpoint of step {self.step}: {self._error}", self.folder, no_space=False
            )
        return self._error

    def _write(self, keep: int, best: int | None) -> None:
        began = time.perf_counter()
        try:
            checkpoint.save_checkpoint(
                self.folder, step=self.step, model=self._model, optimizer=self._optimizer, state=self._state
            )
            try:
                checkpoint.prune(self.folder, keep=keep, best=best)
            except SaveFailed as e:  # the next save tries again; this one is whole
                self.left_behind = str(e)
        except Exception as e:  # raised again by `finish`, in the thread that trains
            self._error = e
        self.seconds = time.perf_counter() - began


class _Stopped(Exception):
    """A signal was seen at a safe place."""


def _due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0
