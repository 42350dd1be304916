"""How large a model, on how many tokens, in which batches, a given amount of computing is best spent on.

A law says what loss a model of N parameters reaches on D tokens: L = E + A / N^alpha + B / D^beta. A budget says how many
tokens each shape can be shown. The shape whose loss is lowest is the proposal. `docs/scaling.md` says how far to trust it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from regpt.config import Config, differences
from regpt.errors import ConfigError
from regpt.models.count import count_parameters, flops_per_token
from regpt.train.estimate import with_time
from regpt.train.machine import Machine
from regpt.train.plan import MEMORY_SHARE, make_plan

# (layers, channels), by size: heads of 64 channels, of 32 in the smallest, and about 64 channels a layer, as GPT-2's first.
LADDER = (
    *((2, 64), (2, 128), (3, 192), (4, 256), (5, 320), (6, 384), (8, 512), (10, 640), (12, 768), (16, 1024)),
    *((20, 1280), (24, 1536), (32, 2048), (40, 2560), (48, 3072)),
)
# DeepSeek-AI 2024, "DeepSeek LLM" (arXiv:2401.02954), equation 1: the best batch for C FLOPs, in tokens.
BATCH_FACTOR, BATCH_EXPONENT = 0.2920, 0.3271
LEAST_STEPS = 200  # fewer updates than this teach little, however large their batches
MANY_EPOCHS = 4  # up to so many, repeated text is worth nearly as much as new (Muennighoff et al. 2023, arXiv:2305.16264)


@dataclass(frozen=True, kw_only=True)
class Law:
    """L(N, D) = e + a / N^alpha + b / D^beta, in nats a token of the text and tokenizer it was fitted on."""

    name: str
    e: float
    a: float
    b: float
    alpha: float
    beta: float
    counts_embeddings: bool
    """Whether N holds token embeddings and positions; otherwise it is what a token meets in products, the head included."""
    fitted: tuple[float, float]
    """The smallest and the largest N that it was fitted on: outside, the loss it names means little."""
    source: str

    def loss(self, n: float, d: float) -> float:
        """Nats a token of a model of `n` parameters after `d` tokens."""
        return self.e + self.a * math.pow(n, -self.alpha) + self.b * math.pow(d, -self.beta)


# Besiroglu et al. 2024 (arXiv:2404.10102) corrected the third fit of Hoffmann et al. 2022, "Chinchilla" (arXiv:2203.15556).
PUBLISHED = Law(
    name="Hoffmann et al. 2022",
    e=1.8172,
    a=482.01,
    b=2085.43,
    alpha=0.3478,
    beta=0.3658,
    counts_embeddings=True,
    fitted=(44e6, 16e9),
    source="arXiv:2404.10102: web text, 32,000 tokens, 44 M to 16 B parameters",
)
# By architecture, from benchmarks/scaling.py; that of `gpt2` is none so far (docs/scaling.md).
OURS = {
    "modern": Law(
        name="regpt's own, of modern",
        e=2.416,
        a=36.40,
        b=76.75,
        alpha=0.3587,
        beta=0.3245,
        counts_embeddings=False,
        fitted=(1.6e5, 3.4e6),
        source="docs/scaling.md: books, a BPE of 1,024, 0.16 M to 3.4 M parameters in products, 0.26 M to 2.1 M tokens",
    )
}


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """What one law makes of a budget."""

    law: str
    n_layer: int
    n_head: int
    n_embd: int
    parameters: int
    tokens: int
    batch_tokens: int
    steps: int
    flops: float
    time_s: float | None
    """Of training steps; None where this machine's speed is unknown."""
    expected_loss: float | None
    """By the law, on its own text and tokenizer; None for a size outside those that it was fitted on."""
    epochs: float | None
    memory_bytes: int
    settings: dict[str, object]
    """What of the given settings changes."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Either seconds of this machine, or FLOPs."""

    time_s: float | None = None
    flops: float | None = None


def budget(
    hours: float | None, flops: float | None, money: float | None, price: float | None
) -> Budget | None:
    """What was asked for, or None.

    Args:
        money, price: what may be spent, and what an hour of the machine costs.

    Raises:
        ConfigError: more than one of them, or a number that is none.
    """
    given = {"--hours": hours, "--flops": flops, "--money": money}
    for name, value in (*given.items(), ("--price", price)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite.", got=value)
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    if len(named) > 1:
        raise ConfigError(f"{' and '.join(named)} are two budgets.", hint=f"only {named[0]}")
    if money is None:
        return Budget(time_s=3600 * hours if hours is not None else None, flops=flops)
    if price is None:
        raise ConfigError("--money needs --price: what an hour of this machine costs.", hint="--price 2.50")
    return Budget(time_s=3600 * money / price)


def propose(
    config: Config,
    machine: Machine,
    law: Law,
    spend: Budget,
    *,
    vocab_size: int,
    train_tokens: int | None = None,
    speeds: dict[int, float] | None = None,
) -> Proposal:
    """The shape of the ladder that the law expects most of.

    On a machine without a data sheet the speed is measured at the shape that is proposed, and the choice made again.

    Args:
        speeds: FLOP/s of training by the shape's place in LADDER, which another call has measured; filled in.

    Raises:
        ConfigError: not even the smallest shape fits the budget, or the memory.
    """
    plain = _of_any_length(config)
    shapes = [sized(plain, layers, channels) for layers, channels in LADDER]
    speeds = {} if speeds is None else speeds

    def speed(i: int) -> float | None:
        if not speeds:
            return None
        return speeds[min(speeds, key=lambda j: abs(j - i))]

    def tokens(i: int) -> int:
        cost = flops_per_token(shapes[i].model, vocab_size)
        if spend.flops is not None:
            return int(spend.flops / cost)
        assert spend.time_s is not None
        return int(spend.time_s * (speed(i) or 0.0) / cost)

    def with_batch(i: int) -> Config:
        """The shape with the batch that it would be proposed with; before any speed is known, with the batch asked for."""
        n, shape = tokens(i), shapes[i]
        cost, T = flops_per_token(shape.model, vocab_size), shape.model.block_size
        batch = best_batch(cost * n, n, T) if n else plain.train.batch_tokens
        return dataclasses.replace(shape, train=dataclasses.replace(shape.train, batch_tokens=batch))

    fitting = list(range(len(shapes)))
    while True:
        if not fitting:
            raise ConfigError(
                "no model of the ladder fits the memory of this machine.", hint="a shorter context"
            )
        unknown = spend.flops is None and not speeds
        best = fitting[len(fitting) // 2] if unknown else _best(law, shapes, fitting, tokens, vocab_size)
        chosen = with_batch(best)
        if not _fits(chosen, machine, vocab_size):
            fitting = [i for i in fitting if i < best]
            continue
        if best in speeds:
            break
        measured = _speed(chosen, machine, vocab_size)
        if measured is not None:
            speeds[best] = measured
        elif spend.flops is None:
            raise ConfigError("the speed of this machine could not be measured.", hint="--flops N")
        else:
            break
    minutes = spend.time_s / 60 if spend.time_s is not None else None
    return _proposal(
        law, config, chosen, minutes, machine, tokens(best), speed(best), vocab_size, train_tokens
    )


def sized(config: Config, n_layer: int, n_embd: int) -> Config:
    """`config` with that shape. Adam's rates go with the width, as nanochat's: lr x sqrt(channels before / after)."""
    model = dataclasses.replace(
        config.model, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // (64 if n_embd >= 192 else 32)
    )
    by = math.sqrt(config.model.n_embd / n_embd)
    rates: dict[str, Any] = {
        name: _rounded(getattr(config.optim, name) * by)
        for name in ("lr", "min_lr", "embed_lr", "head_lr", "scalar_lr")
        if getattr(config.optim, name) is not None
    }
    return dataclasses.replace(config, model=model, optim=dataclasses.replace(config.optim, **rates))


def best_batch(flops: float, tokens: int, block_size: int) -> int:
    """Tokens of an update: a power of two of rows near the published optimum, in at least LEAST_STEPS updates."""
    wanted = BATCH_FACTOR * math.pow(flops, BATCH_EXPONENT)
    rows = 1 << max(round(math.log2(wanted / block_size)), 0)
    while rows > 1 and LEAST_STEPS * rows * block_size > tokens:
        rows //= 2
    return rows * block_size


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _of_any_length(config: Config) -> Config:
    """`config` without what belongs to another length or batch than the proposal's."""
    # The laws were fitted without a batch ramp.
    train = dataclasses.replace(config.train, minutes=None, micro_rows=None, batch_ramp_steps=0)
    optim = dataclasses.replace(config.optim, warmup_steps=0, decay_steps=None)
    return dataclasses.replace(config, train=train, optim=optim)


def _fits(config: Config, machine: Machine, vocab_size: int) -> bool:
    plan = make_plan(config, machine, vocab_size=vocab_size)
    return not machine.memory_bytes or plan.memory.total <= MEMORY_SHARE * machine.memory_bytes


def _speed(config: Config, machine: Machine, vocab_size: int) -> float | None:
    """FLOP/s of training, as `regpt plan` estimates them."""
    plan = with_time(make_plan(config, machine, vocab_size=vocab_size), config, machine)
    return plan.total_flops / plan.time_s if plan.time_s else None


def _n(law: Law, config: Config, vocab_size: int) -> int:
    n = count_parameters(config.model, vocab_size)
    return n.total - n.tables if law.counts_embeddings else n.multiplied


def _best(
    law: Law, shapes: list[Config], fitting: list[int], tokens: Callable[[int], int], vocab_size: int
) -> int:
    """Of the shapes that can make LEAST_STEPS updates of a row, the one of the lowest loss."""
    enough = [i for i in fitting if tokens(i) >= LEAST_STEPS * shapes[i].model.block_size]
    if not enough:
        raise ConfigError(
            f"the budget does not hold {LEAST_STEPS} updates of one row of {shapes[0].model.block_size} tokens,"
            " even of the smallest model.",
            hint="a larger budget, or a shorter --model.block-size",
        )
    return min(enough, key=lambda i: law.loss(_n(law, shapes[i], vocab_size), tokens(i)))


def _proposal(
    law: Law,
    asked: Config,
    config: Config,
    minutes: float | None,
    machine: Machine,
    tokens: int,
    speed: float | None,
    vocab_size: int,
    train_tokens: int | None,
) -> Proposal:
    per_token, batch = flops_per_token(config.model, vocab_size), config.train.batch_tokens
    steps = max(tokens // batch, 1)
    total = steps * batch
    warmup = min(asked.optim.warmup_steps, steps // 10)
    chosen = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=steps, minutes=minutes),
        optim=dataclasses.replace(config.optim, warmup_steps=warmup),
    )
    plan, n = make_plan(chosen, machine, vocab_size=vocab_size), _n(law, config, vocab_size)
    return Proposal(
        law=law.name,
        n_layer=config.model.n_layer,
        n_head=config.model.n_head,
        n_embd=config.model.n_embd,
        parameters=plan.parameters,
        tokens=total,
        batch_tokens=batch,
        steps=steps,
        flops=float(per_token) * total,
        time_s=per_token * total / speed if speed else None,
        expected_loss=law.loss(n, total) if law.fitted[0] <= n <= law.fitted[1] else None,
        epochs=total / train_tokens if train_tokens else None,
        memory_bytes=plan.memory.total,
        settings={name: new for name, (_, new) in differences(asked, chosen).items()},
    )
