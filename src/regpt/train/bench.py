"""How fast a training step is here: the trainer's own step on random ids, timed, in parts, and operator by operator.

Model, optimizer, dtype, threads and micro-batches are what a run of the same settings would have. On a CPU
train.compile=auto is measured without compiling, as most runs there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from regpt.config import Config
from regpt.data.corpus import known_corpus
from regpt.data.loader import Loader
from regpt.data.split import Ids, TokenSplit
from regpt.errors import ConfigError, UsageError
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train.allocator import keep_memory
from regpt.train.dist import Ranks
from regpt.train.loop import Trainer
from regpt.train.machine import (
    Machine,
    measure_copy,
    measure_flops,
    peak_memory_bytes,
    probe,
    using,
    wait,
)
from regpt.train.operators import Operator, operators
from regpt.train.plan import LARGEST, Plan, as_dict, make_plan, with_steps
from regpt.train.run import RunDirectory
from regpt.train.session import check_memory, new_model, shortage_said
from regpt.train.signals import StopRequest
from regpt.train.track import Listener

WARM_UP_STEPS = 3  # the first compiles, allocates and imports
TIMED_S = 10.0  # how long is timed where no number of steps is given,
LEAST_STEPS = 5  # and at least so many
MOST_PARTED_STEPS = 20  # in which forward, backward and update are timed one by one
PROFILED_STEPS = 3
RANDOM_IDS = 1 << 20  # and at least a whole batch: none of it fits the caches next to the processor


@dataclass(frozen=True, kw_only=True)
class Profiled:
    """A few steps under torch.profiler, which slows them."""

    trace: str
    steps: int
    step_s: float
    """Of one step, profiled."""
    copy_bytes_per_second: float
    """Measured: a large tensor's copy, read and written."""
    product_flops_per_second: dict[str, float]
    """Measured, for each dtype that was multiplied."""
    operators: list[Operator]
    """The one with the most time of its own first."""

    def ceiling_share(self, o: Operator) -> float | None:
        """Of a product's FLOP/s in that measured, of another's bytes per second in the copy's; None without inputs."""
        amount, ceiling = (
            (o.flops, self.product_flops_per_second.get(o.dtype))
            if o.flops
            else (o.bytes, self.copy_bytes_per_second)
        )
        return amount / o.self_s / ceiling if amount and o.self_s and ceiling else None

    def step_share(self, o: Operator) -> float:
        """Of the profiled step's time."""
        return o.self_s / (self.steps * self.step_s)


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What `regpt bench train` measured. Seconds are medians."""

    plan: Plan
    machine: Machine
    vocabulary_known: bool
    """Otherwise it is a guess, until the text is prepared."""
    warm_up_steps: int
    steps: int
    step_s: float
    step_p10_s: float
    step_p90_s: float
    tokens_per_second: float
    flops_per_second: float
    """By the plan's FLOPs for each token: 6 N + 12 L C T."""
    ceiling_flops_per_second: float
    """Measured: a square matrix product in the plan's dtype, before or after the steps, whichever was faster."""
    share_of_ceiling: float
    peak_memory_bytes: int
    planned_memory_bytes: int
    """The plan's estimate without what a save in the background adds."""
    parted_steps: int
    forward_s: float
    backward_s: float
    update_s: float
    """From the last micro-batch's gradient on: norm, clipping, optimizer."""
    profile: Profiled | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for --json."""
        values = dataclasses.asdict(self) | {"plan": as_dict(self.plan)}
        if self.profile is not None:
            p = self.profile
            more = (
                {"share_of_step": p.step_share(o), "share_of_ceiling": p.ceiling_share(o)}
                for o in p.operators
            )
            both = zip(values["profile"]["operators"], more, strict=True)
            values["profile"]["operators"] = [own | added for own, added in both]
        return values


def bench_train(
    config: Config, *, steps: int | None = None, trace: Path | None = None, listen: Listener = lambda *_: None
) -> TrainBench:
    """Time training steps of `config` on random ids. No text is read and no run is begun.

    Args:
        steps: how many are timed; None: as many as take ten seconds, at least five.
        trace: also profile a few steps, into this file, which must not be there yet.
        listen: hears notes: what is under way, and what `regpt train` would say.

    Raises:
        ConfigError: the settings contradict each other, or `steps` is below 1.
        UsageError: `trace` cannot be written, or this is one of several processes.
        DeviceError: the machine lacks the device, or the memory.
    """
    if "RANK" in os.environ:
        raise UsageError(
            "regpt bench measures one process; it does not run under torchrun.",
            hint="regpt bench train … as it is, on an idle machine",
        )
    if steps is not None and steps < 1:
        raise ConfigError("--steps must be at least 1.", got=steps)
    keep_memory()
    machine = probe(config.train.device, config.train.threads)
    vocab_size, sure, _ = known_corpus(config)
    with using(machine), contextlib.ExitStack() as stack:
        # Of the whole batch, whose steps are most of a run.
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_ramp_steps=0))
        plan = make_plan(config, machine, vocab_size=vocab_size)
        check_memory(plan, machine)
        if trace is not None:
            stack.enter_context(_reserved(trace))
        stack.enter_context(shortage_said(plan, machine))
        return _measured(config, plan, machine, sure, steps, trace, listen)


def _measured(
    config: Config,
    plan: Plan,
    machine: Machine,
    sure: bool,
    steps: int | None,
    trace: Path | None,
    listen: Listener,
) -> TrainBench:
    ceiling = measure_flops(machine, plan.dtype)
    trainer = _Steps(config, plan, machine, listen)
    listen("info", 0, {"text": f"warming up: {WARM_UP_STEPS} steps"})
    trainer.timed(WARM_UP_STEPS)
    listen("info", 0, {"text": f"timing {f'{steps} steps' if steps else f'steps for {TIMED_S:g} s'}"})
    times = trainer.timed(steps) if steps else trainer.timed(LEAST_STEPS, at_least_s=TIMED_S)
    n = len(times)
    parts = [trainer.parts() for _ in range(min(n, MOST_PARTED_STEPS))]
    peak = peak_memory_bytes(machine)  # before ceilings are measured, which is no part of training
    ceiling = max(ceiling, measure_flops(machine, plan.dtype))
    step_s = statistics.median(times)
    tens = statistics.quantiles(times, n=10, method="inclusive") if n > 1 else [step_s]
    tokens_per_second = config.train.batch_tokens / step_s
    flops_per_second = plan.flops_per_token * tokens_per_second
    forward_s, backward_s, update_s = (statistics.median(part) for part in zip(*parts, strict=True))
    return TrainBench(
        plan=plan,
        machine=machine,
        vocabulary_known=sure,
        warm_up_steps=WARM_UP_STEPS,
        steps=n,
        step_s=step_s,
        step_p10_s=tens[0],
        step_p90_s=tens[-1],
        tokens_per_second=tokens_per_second,
        flops_per_second=flops_per_second,
        ceiling_flops_per_second=ceiling,
        share_of_ceiling=flops_per_second / ceiling,
        peak_memory_bytes=peak,
        planned_memory_bytes=plan.memory.total - plan.memory.saving,
        parted_steps=len(parts),
        forward_s=forward_s,
        backward_s=backward_s,
        update_s=update_s,
        profile=_profiled(trainer, machine, trace, listen, {plan.dtype: ceiling})
        if trace is not None
        else None,
    )


class RandomIds(TokenSplit):
    """A split in memory whose ids are drawn evenly from the vocabulary."""

    def __init__(self, vocab_size: int, n_tokens: int, seed: int) -> None:
        self.name, self.n_tokens = "random", n_tokens
        self._ids = np.random.default_rng(seed).integers(vocab_size, size=n_tokens, dtype=np.uint32)

    def rows(self, starts: Ids, length: int) -> NDArray[Any]:
        """Windows of `length` ids from `starts` (R,) on, around the end. (R, length)."""
        found: NDArray[Any] = self._ids[(starts[:, None] + np.arange(length)) % self.n_tokens]
        return found


class _Steps(Trainer):
    """A trainer that only makes steps: nothing is evaluated, saved or logged, and its schedule does not end."""

    def __init__(self, config: Config, plan: Plan, machine: Machine, listen: Listener) -> None:
        t = dataclasses.replace(config.train, minutes=None, on_bad_step="stop", spike_sigma=None)
        config = dataclasses.replace(config, train=t)
        loader = Loader(
            RandomIds(plan.vocab_size, max(RANDOM_IDS, config.train.batch_tokens + 1), config.seed),
            block_size=config.model.block_size,
            batch_rows=plan.batch_rows,
            seed=config.seed,
            order=config.data.order,
        )
        super().__init__(
            config,
            with_steps(plan, LARGEST),
            machine,
            new_model(config, plan.vocab_size),
            ByteTokenizer(),  # of a sample, which is never drawn
            loader,
            None,
            run=RunDirectory(Path(os.devnull)),  # touched by saves alone
            facts={},
            trackers=[],
            listen=listen,
            stop=StopRequest(),
            ranks=Ranks(),
        )
        self.state.model.train()

    def say(self, event: str, step: int, values: dict[str, Any]) -> None:
        """Notes only."""
        if event == "note":
            self.listen(event, step, values)

    def timed(self, steps: int, *, at_least_s: float = 0.0) -> list[float]:
        """Seconds from each step's end to the next one's; of more than `steps` steps where these take less than that."""
        wait(self.machine)
        marks = [self.clock()]
        while len(marks) <= steps or marks[-1] - marks[0] < at_least_s:
            self.train_step()
            wait(self.machine)
            marks.append(self.clock())
        return [b - a for a, b in itertools.pairwise(marks)]

    def parts(self) -> tuple[float, float, float]:
        """Seconds of the forward and backward passes of all micro-batches of one step, and of its update."""
        compute, after = self.compute_loss, self.gradients.after
        forward_s = backward_s = mark = 0.0

        def now() -> float:
            wait(self.machine)
            return self.clock()

        def forward(x: Tensor, y: Tensor) -> Tensor:
            nonlocal forward_s, mark
            began = now()
            loss = compute(x, y)
            mark = now()
            forward_s += mark - began
            return loss

        def backward(micro_loss: Tensor) -> None:
            nonlocal backward_s, mark
            began, mark = mark, now()
            backward_s += mark - began
            after(micro_loss)

        self.compute_loss, self.gradients.after = forward, backward  # type: ignore[method-assign]
        try:
            self.train_step()
            return forward_s, backward_s, now() - mark
        finally:
            self.compute_loss, self.gradients.after = compute, after  # type: ignore[method-assign]


def _profiled(
    trainer: _Steps, machine: Machine, trace: Path, listen: Listener, ceilings: dict[str, float]
) -> Profiled:
    """A few steps under the profiler, the trace written; `ceilings` are FLOP/s that were measured already."""
    on_device = machine.kind == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    listen("info", 0, {"text": f"profiling {PROFILED_STEPS} steps"})
    with profile(activities=activities):
        trainer.timed(1)  # the profiler warms up too
    with profile(activities=activities, record_shapes=True) as record:
        times = trainer.timed(PROFILED_STEPS)
    record.export_chrome_trace(str(trace))
    found = operators(record.events(), on_device=on_device)
    multiplied = {o.dtype for o in found if o.flops and o.dtype}
    return Profiled(
        trace=str(trace),
        steps=PROFILED_STEPS,
        step_s=sum(times) / PROFILED_STEPS,
        copy_bytes_per_second=measure_copy(machine),
        product_flops_per_second={
            d: max(measure_flops(machine, d), ceilings.get(d, 0.0)) for d in sorted(multiplied)
        },
        operators=found,
    )


@contextlib.contextmanager
def _reserved(path: Path) -> Iterator[None]:
    """Take the name `path` before anything slow begins; given back, where the work fails."""
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        raise UsageError(
            f"{path} is there already; a trace overwrites nothing.", hint="--profile another.json"
        ) from None
    except OSError as e:
        raise UsageError(
            f"the trace {path} cannot be written: {e.strerror or e}.", hint="--profile another.json"
        ) from None
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise
