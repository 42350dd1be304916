"""What follows from the settings: accumulation, padded vocabulary, parameters, tokens, memory, FLOPs, time.

Pure: the same settings, machine and data facts give the same plan, and nothing is touched. It is printed before anything
slow begins, and alone by `regpt plan`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from regpt.config import Config, flat
from regpt.errors import ConfigError
from regpt.models import pad_vocab
from regpt.models.count import count_parameters, flops_per_token
from regpt.models.memory import Memory, memory_estimate
from regpt.models.shape import check_model
from regpt.optim.groups import check_optimizer
from regpt.optim.schedule import check_schedule
from regpt.tokenizers import check_entries
from regpt.train.batches import PARTS, Batches
from regpt.train.machine import Machine, choose_dtype

# Share of the data sheet's rate that plain PyTorch training reaches, as published for one H200.
GPU_EFFICIENCY = 0.42
LARGEST = 2**40  # of any whole number among the settings: sums with more leave what floats and int64 hold
MEMORY_SHARE = 0.85  # of the device's memory that an automatic micro-batch may plan for
CPU_MICRO_TOKENS = 16_384  # larger micro-batches are no faster on a CPU, they only need more memory


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything derived from the settings before the first step."""

    device: str
    dtype: str
    compile: bool
    compile_why: str = ""
    """In a word, where train.compile=auto decided by time (`train/compile.py`)."""
    world: int
    strategy: str
    reduction: str
    batch_rows: int
    """Rows of block_size tokens in one update, over all ranks."""
    block_size: int
    batch_ramp_steps: int
    """Over which the batch grows to `batch_rows`."""
    micro_rows: int
    """Rows in one forward pass of one rank."""
    n_micro: int
    """Forward passes of one rank in one update: gradient accumulation."""
    steps: int
    """With train.minutes an estimate, or train.steps where there is none."""
    total_tokens: int
    epochs: float | None
    """Passes over the training split; None while its size is unknown."""
    vocab_size: int
    padded_vocab_size: int
    parameters: int
    flops_per_token: float
    total_flops: float
    memory: Memory
    time_s: float | None
    """Expected seconds of training steps; None where no data sheet tells (`train/estimate.py` measures there)."""

    @property
    def batches(self) -> Batches:
        """Rows of every update."""
        return Batches(self.batch_rows, self.batch_ramp_steps)

    def micro(self, step: int) -> tuple[int, int]:
        """One rank's forward passes in update number `step`, and their rows."""
        return self.batches.micro(step, self.n_micro, self.micro_rows)

    def tokens_before(self, step: int) -> int:
        """Tokens that all updates before number `step` are made on."""
        return self.batches.before(step) * self.block_size


def make_plan(
    config: Config,
    machine: Machine,
    *,
    vocab_size: int,
    train_tokens: int | None = None,
    world: int = 1,
) -> Plan:
    """The plan of `config` on `world` machines like `machine`.

    Args:
        vocab_size: ids that the tokenizer has.
        train_tokens: tokens in the training split, where they are known already.

    Raises:
        ConfigError: the settings contradict each other.
    """
    _check(config, vocab_size)
    T, rows = config.model.block_size, _batch_rows(config, world)
    if config.train.compile == "on" and machine.kind == "mps":
        raise ConfigError("train.compile=on is not supported on mps.", hint="--train.compile auto")
    dtype = choose_dtype(config.train.dtype, machine, config.model)
    _check_ranks(config, world, dtype)

    def memory(micro_rows: int) -> Memory:
        return _memory(config, machine, vocab_size, dtype, world, micro_rows)

    if config.train.reduction == "exact" and world > 1 and not config.train.micro_rows:
        raise ConfigError(
            "train.reduction=exact over several ranks needs train.micro_rows: it is the same on any number of ranks.",
            hint=f"--train.micro-rows {max(rows // world // 2, 1)}",
        )
    micro_rows = config.train.micro_rows or _largest_that_fits(rows // world, T, machine, memory)
    n_micro, ramp = rows // world // micro_rows, config.train.batch_ramp_steps
    _check_ramp_is_exact(config, rows // world, n_micro)
    per_token = flops_per_token(config.model, vocab_size)
    total_tokens = Batches(rows, ramp).before(config.train.steps) * T
    rate = machine.peak_flops if dtype != "float32" else None  # data sheets speak of 16 bits
    return Plan(
        device=machine.device,
        dtype=dtype,
        compile=_compiled(config, machine),
        world=world,
        strategy=config.train.strategy if world > 1 else "one rank",
        reduction=config.train.reduction,
        batch_rows=rows,
        block_size=T,
        batch_ramp_steps=ramp,
        micro_rows=micro_rows,
        n_micro=n_micro,
        steps=config.train.steps,
        total_tokens=total_tokens,
        epochs=total_tokens / train_tokens if train_tokens else None,
        vocab_size=vocab_size,
        padded_vocab_size=pad_vocab(vocab_size),
        parameters=count_parameters(config.model, vocab_size).total,
        flops_per_token=per_token,
        total_flops=per_token * total_tokens,
        memory=memory(micro_rows),
        time_s=per_token * total_tokens / (rate * GPU_EFFICIENCY * world) if rate else None,
    )


def _compiled(config: Config, machine: Machine) -> bool:
    """As asked for; auto is CUDA here, and on a CPU decided once the time is known (`train/compile.py`)."""
    return config.train.compile == "on" or (config.train.compile == "auto" and machine.kind == "cuda")


def _memory(
    config: Config, machine: Machine, vocab_size: int, dtype: str, world: int, micro_rows: int
) -> Memory:
    """What one rank needs with micro-batches of so many rows."""
    t, save = config.train, config.save
    return memory_estimate(
        config.model,
        vocab_size,
        micro_rows=micro_rows,
        dtype=dtype,
        device_type=machine.kind,
        n_micro=t.batch_tokens // config.model.block_size // world // micro_rows,
        optimizer=config.optim.name,
        saves_in_background=save.in_background and (save.every or config.eval.every or t.steps) < t.steps,
        shards=(t.shard_group or world) if t.strategy == "fsdp" and world > 1 else 1,
        exact_sums=t.reduction == "exact",
        compiled=_compiled(config, machine),
        checkpoint_activations=t.checkpoint_activations,
    )


def _check(config: Config, vocab_size: int) -> None:
    positive = {
        "train.steps": config.train.steps,
        "train.batch_tokens": config.train.batch_tokens,
        "train.micro_rows": config.train.micro_rows,
        "model.block_size": config.model.block_size,
        "eval.every": config.eval.every,
        "eval.micro_rows": config.eval.micro_rows,
        "eval.tasks_every": config.eval.tasks_every,
        "eval.tasks_rows": config.eval.tasks_rows,
        "save.every": config.save.every,
        "save.keep": config.save.keep,
        "sample.every": config.sample.every,
        "sample.top_k": config.sample.top_k,
        "track.log_every": config.track.log_every,
    }
    optional = {"eval.every", "eval.tasks_every", "eval.tasks_rows", "save.every", "sample.top_k"}
    for name, value in positive.items():
        if value is not None and value < 1:
            hint = f"--{name.replace('_', '-')} none turns it off" if name in optional else None
            raise ConfigError(f"{name} must be at least 1.", got=value, hint=hint)
    for name, value in flat(config).items():
        if type(value) is int and abs(value) > LARGEST and name != "seed":
            raise ConfigError(
                f"{name} is too large.", got=f"{str(value)[:24]}…", expected=f"at most {LARGEST}"
            )
    if config.tokenizer.name == "bpe":
        check_entries(config.tokenizer.vocab_size)
    check_model(config.model, vocab_size)
    check_optimizer(config.optim)
    _check_minutes(config)
    _check_ramp(config)
    # How many steps a time budget holds is not known yet: the warm-up then follows (`train/budget.py`).
    check_schedule(config.optim, config.train.steps if config.train.minutes is None else 0)
    if config.data.val_fraction is not None and not 0 <= config.data.val_fraction < 1:
        raise ConfigError("data.val_fraction must lie in [0, 1).", got=config.data.val_fraction)
    if config.sample.tokens < 0:
        raise ConfigError("sample.tokens must not be negative.", got=config.sample.tokens)
    if not 0 <= config.sample.temperature < math.inf:
        raise ConfigError("sample.temperature must be 0 (greedy) or more.", got=config.sample.temperature)
    if config.train.spike_sigma is not None and not config.train.spike_sigma > 0:
        raise ConfigError(
            "train.spike_sigma must be above 0.",
            got=config.train.spike_sigma,
            hint="--train.spike-sigma none",
        )
    if not 0 <= config.seed < 2**63:
        raise ConfigError("seed must lie in [0, 2^63).", got=config.seed)


def _check_minutes(config: Config) -> None:
    """A time budget that is one, with a schedule that can follow it."""
    minutes = config.train.minutes
    if minutes is None:
        return
    if not 0 < minutes < math.inf:
        raise ConfigError(
            "train.minutes must be above 0 and finite.", got=minutes, hint="--train.minutes none: train.steps"
        )
    if minutes > LARGEST:
        raise ConfigError("train.minutes is too large.", got=minutes, expected=f"at most {LARGEST}")
    if config.optim.decay_steps is not None:
        raise ConfigError(
            f"optim.decay_steps={config.optim.decay_steps} fixes the schedule that train.minutes={minutes:g} fits to"
            " the time.",
            hint="--optim.decay-steps none",
        )


def _check_ramp(config: Config) -> None:
    """A ramp that comes to its end."""
    t = config.train
    if t.batch_ramp_steps < 0:
        raise ConfigError(
            "train.batch_ramp_steps must not be negative.",
            got=t.batch_ramp_steps,
            hint="--train.batch-ramp-steps 0 turns it off",
        )
    if t.minutes is None and t.batch_ramp_steps >= t.steps:
        raise ConfigError(
            f"train.batch_ramp_steps={t.batch_ramp_steps} does not end before train.steps={t.steps}: no batch would be whole.",
            hint=f"--train.batch-ramp-steps {t.steps // 5}",
        )


def _check_ramp_is_exact(config: Config, rank_rows: int, n_micro: int) -> None:
    """Micro-batches are the leaves of the exact sum, so none may become smaller on one number of ranks and not on another."""
    if config.train.batch_ramp_steps and config.train.reduction == "exact" and n_micro % PARTS:
        raise ConfigError(
            "train.reduction=exact with train.batch_ramp_steps needs a number of micro-batches a rank that divides by"
            f" {PARTS}.",
            got=n_micro,
            hint=f"--train.micro-rows {rank_rows // PARTS}",
        )


def with_steps(plan: Plan, steps: int) -> Plan:
    """The plan with another number of steps, and what follows from it; its time by tokens, though under a batch ramp an
    update takes as long for fewer of them."""
    if steps == plan.steps:
        return plan
    tokens = plan.tokens_before(steps)
    share = tokens / plan.tokens_before(plan.steps)
    return dataclasses.replace(
        plan,
        steps=steps,
        total_tokens=tokens,
        epochs=plan.epochs * share if plan.epochs is not None else None,
        total_flops=plan.flops_per_token * tokens,
        time_s=plan.time_s * share if plan.time_s is not None else None,
    )


def _check_ranks(config: Config, world: int, dtype: str) -> None:
    """What cannot be combined over several ranks."""
    t = config.train
    if t.shard_group is not None and t.strategy != "fsdp":
        raise ConfigError(
            f"train.shard_group={t.shard_group} shards nothing with train.strategy=ddp.",
            hint="--train.strategy fsdp",
        )
    if world == 1:
        return
    if t.strategy == "fsdp" and t.reduction == "exact":
        raise ConfigError(
            "train.reduction=exact needs train.strategy=ddp: FSDP adds up in NCCL's and Gloo's order."
        )
    if t.strategy == "fsdp" and dtype == "float16":
        raise ConfigError("train.strategy=fsdp does not train in float16.", hint="--train.dtype bfloat16")
    group = t.shard_group
    if group is not None and (group < 2 or world % group):
        raise ConfigError(
            f"train.shard_group={group} does not divide {world} ranks into groups of two or more."
        )
    if t.reduction == "exact" and t.micro_rows:
        n_micro = t.batch_tokens // (world * t.micro_rows * config.model.block_size)
        if n_micro & (n_micro - 1):
            raise ConfigError(
                f"train.reduction=exact needs a power of two of micro-batches a rank; here are {n_micro}.",
                hint="another number of ranks, --train.micro-rows or --train.batch-tokens",
            )


def _batch_rows(config: Config, world: int) -> int:
    """Rows of the global batch, or an error that names the nearest batches that divide."""
    T, micro = config.model.block_size, config.train.micro_rows
    unit = world * (micro or 1) * T
    if config.train.batch_tokens % unit:
        lower = config.train.batch_tokens // unit * unit
        parts = [f"{world} ranks"] if world > 1 else []
        parts += [f"{micro} rows"] if micro else []
        product = " x ".join([*parts, f"{T} tokens"])
        choices = " or ".join(str(n) for n in (lower, lower + unit) if n)
        raise ConfigError(
            f"train.batch_tokens={config.train.batch_tokens} is not a multiple of {product}"
            + (f" = {unit}." if parts else "."),
            hint=f"--train.batch-tokens {choices}",
        )
    rows = config.train.batch_tokens // T
    if config.train.batch_ramp_steps and rows % (PARTS * world):
        unit = math.lcm(unit, PARTS * world * T)
        lower = config.train.batch_tokens // unit * unit
        choices = " or ".join(str(n) for n in (lower, lower + unit) if n)
        raise ConfigError(
            f"train.batch_ramp_steps begins with a quarter of train.batch_tokens={config.train.batch_tokens}.",
            got=f"{rows} rows of {T} tokens" + (f" on {world} ranks" if world > 1 else ""),
            expected=f"a multiple of {PARTS * world} rows",
            hint=f"--train.batch-tokens {choices}",
        )
    return rows


def _largest_that_fits(rows: int, T: int, machine: Machine, memory: Callable[[int], Memory]) -> int:
    """The largest divisor of `rows` whose planned memory fits the device."""
    budget = machine.memory_bytes * MEMORY_SHARE
    small = [n for n in range(1, math.isqrt(rows) + 1) if rows % n == 0]
    divisors = sorted({*small, *(rows // n for n in small)}, reverse=True)
    if machine.kind == "cpu":
        divisors = [n for n in divisors if n * T <= CPU_MICRO_TOKENS] or [1]
    return next((n for n in divisors if not budget or memory(n).total <= budget), 1)


def as_dict(plan: Plan) -> dict[str, object]:
    """Plain values, for run.json and --json."""
    return dataclasses.asdict(plan) | {
        "memory": dataclasses.asdict(plan.memory) | {"total": plan.memory.total}
    }
