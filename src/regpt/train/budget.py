"""Training for a time instead of a number of steps: how many steps fit is asked anew after each.

The rate of every update follows from `Pace`: warm-up by the step, and then a decay whose share done grows, at each
update, by (what is left of the decay) / (the steps that are left). While the total stands still that is the schedule of
so many steps, to rounding; when the total changes, the decay goes on faster or slower from where it is. So a rate never
jumps, and the last update has the rate that a schedule ends with, if the last steps take as long as those before them.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from regpt.config import Config, OptimConfig
from regpt.optim.schedule import decay_start

# Whose median is the speed: a pause of the machine does not move it, a slower machine does, soon.
RECENT_STEPS = 20
UNMEASURED_STEPS = 2  # of each sitting: they compile, and ask for memory
ENOUGH_STEPS = 3  # measured before the first estimate gives way to them
TOLERANCE = 0.02  # of the steps left: by less than this the total does not follow the speed
WARMUP_SHARE = 0.25  # of the total at most: a budget may hold fewer steps than `warmup_steps` had in mind
FINEST_S = 1e-9  # a step is not faster, whatever the clock says
TRIED_TOKENS = 8  # generated before the first step: a sample's cost until one was measured
# A checkpoint's cost until one was written: a slow disk's rate, for a weight and two moments of each parameter at most.
WRITE_BYTES_PER_S = 2e8
SAVED_BYTES = 12


@dataclasses.dataclass(kw_only=True)
class Pace:
    """The length of a run that has a time budget; every rank has the same total, of the rest rank 0's counts."""

    budget_s: float
    total_steps: int
    """In force: the run ends there unless the speed changes."""
    warmup_steps: int
    decayed: float = 0.0
    """Share of the decay that lies behind the next update."""
    recent_token_s: list[float] = dataclasses.field(default_factory=list)
    """Seconds of a training step divided by its tokens, of the last RECENT_STEPS."""
    pause_s: dict[str, float] = dataclasses.field(default_factory=dict)
    """What the last evaluation, evaluation of tasks, sample and save each took, or a guess; "write": the whole writing of
    a checkpoint."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Pace | None:
        """What `dataclasses.asdict` made of one."""
        return cls(**values) if values is not None else None

    @property
    def known(self) -> bool:
        """Whether the speed has been measured, so that the first estimate no longer counts."""
        return len(self.recent_token_s) >= ENOUGH_STEPS

    def made(self, step: int, config: OptimConfig) -> None:
        """Update number `step` was made: how far the decay has come at the next one."""
        if not self.known:
            return  # a first estimate may be far too low, and what has decayed does not come back
        start = decay_start(dataclasses.replace(config, warmup_steps=self.warmup_steps), self.total_steps)
        if step >= start or self.decayed > 0:
            self.decayed += (1 - self.decayed) / max(self.total_steps - step, 1)

    def guess(self, pause_s: Mapping[str, float]) -> None:
        """What pauses may take that were not measured so far."""
        self.pause_s = {**pause_s, **self.pause_s}

    def measured(self, token_s: float) -> None:
        """A training step took so long, divided by its tokens."""
        self.recent_token_s = [*self.recent_token_s, token_s][-RECENT_STEPS:]

    def steps_that_fit(
        self,
        step: int,
        elapsed_s: float,
        tokens_before: Callable[[int], int],
        every: Mapping[str, int | None],
    ) -> int:
        """The total that ends nearest to the budget, as far as is known now.

        Args:
            step: updates made; evaluations and saves due at it are not done yet.
            tokens_before: of a step; no step has fewer than those before it.
            every: steps between pauses of each kind, all of which also come at the end; None: then only.
        """
        left_s = self.budget_s - elapsed_s
        if not self.known:
            return max(self.total_steps, step + 1) if left_s > 0 else step
        here = tokens_before(step)
        step_tokens = tokens_before(step + 1) - here
        token_s = max(statistics.median(self.recent_token_s), FINEST_S / step_tokens)
        step_s = step_tokens * token_s
        cost_s = dict(self.pause_s)
        # The last checkpoint is waited for, the others are written while training goes on.
        final_s = max(cost_s.pop("write", 0.0) - cost_s.get("save", 0.0), 0.0)

        def fits(n: int) -> bool:
            pauses = sum(s * _pauses(step, n, every[kind]) for kind, s in cost_s.items() if kind in every)
            last_s = (tokens_before(step + n) - tokens_before(step + n - 1)) * token_s
            return (tokens_before(step + n) - here) * token_s + pauses + final_s <= left_s + last_s / 2

        low, high = 0, max(int(left_s / step_s), 0) + 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return step + low

    def follow(self, step: int, fitting: int) -> None:
        """Take the total that fits, where it is far enough from the one in force."""
        if abs(fitting - self.total_steps) > TOLERANCE * (self.total_steps - step):
            self.total_steps = fitting
        if self.known and step < self.warmup_steps:
            self.warmup_steps = max(step, min(self.warmup_steps, int(WARMUP_SHARE * self.total_steps)))


def save_guess_s(parameters: int, *, in_background: bool) -> dict[str, float]:
    """What writing a checkpoint may take, and how long training may wait for one."""
    write_s = parameters * SAVED_BYTES / WRITE_BYTES_PER_S
    return {"write": write_s} if in_background else {"write": write_s, "save": write_s}


def sample_guess_s(read_s: Sequence[float], tokens: int) -> float:
    """What a sample of `tokens` may take, by the clock before a short one and after each of its tokens.

    The first token has the prompt in it; what a context that slides costs is left out.
    """
    first, *others = (b - a for a, b in itertools.pairwise(read_s))
    return first + (tokens - 1) * (statistics.median(others) if others else first)


def pause_periods(config: Config) -> dict[str, int | None]:
    """Steps between evaluations of the loss and of tasks, samples and saves."""
    every = config.eval.every
    periods = {"eval": every, "save": config.save.every or every}
    if config.eval.tasks:
        periods["tasks"] = config.eval.tasks_every
    return periods | ({"sample": config.sample.every or every} if config.sample.tokens else {})


def _pauses(step: int, n: int, every: int | None) -> int:
    """Pauses due at `step` and the `n` steps after it, the one at the end included."""
    return 1 + (-(-(step + n) // every) - -(-max(step, 1) // every) if every is not None and n else 0)
