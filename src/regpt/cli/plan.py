"""A dry run: what a preset and its overrides come to in parameters, memory, FLOPs and time. Nothing is touched.

With --hours, --flops or --money: which size of model, on how many tokens, in which batch the budget is best spent on.
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import CommonArgs, Output, parse, preset_and_rest
from regpt.config import Config, differences, load_preset
from regpt.durations import duration

if TYPE_CHECKING:
    from regpt.data.split import TokenSet
    from regpt.train.machine import Machine
    from regpt.train.plan import Plan
    from regpt.train.sizing import Budget, Proposal


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt plan [PRESET]`."""

    price: float | None = None
    """Money an hour of this machine costs, to estimate the run's cost."""
    hours: float | None = None
    """Propose a model for so many hours of this machine."""
    flops: float | None = None
    """Propose a model for so many FLOPs (1e17, say)."""
    money: float | None = None
    """Propose a model for so much money, at --price an hour."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=Config
    )


def main(argv: list[str]) -> int:
    """`regpt plan`."""
    name, rest = preset_and_rest(argv)
    preset = load_preset(name)
    args = parse(Args, rest, prog="regpt plan", description=__doc__ or "", default=Args(config=preset.config))
    from regpt.data.corpus import known_corpus
    from regpt.train.allocator import keep_memory
    from regpt.train.compile import cpp_compiler, with_compile
    from regpt.train.estimate import with_time
    from regpt.train.machine import probe, using
    from regpt.train.plan import as_dict, make_plan
    from regpt.train.sizing import budget
    from regpt.train.tasks import task_names, tasks_time_s

    spend = budget(args.hours, args.flops, args.money, args.price)
    config = args.config
    task_names(config.eval)
    keep_memory()
    machine = probe(config.train.device, config.train.threads)
    vocab_size, sure, shards = known_corpus(config)
    train_tokens = shards.split("train").n_tokens if shards else None
    with using(machine):
        if spend is not None:
            return _propose(args, name, spend, machine, vocab_size, sure, train_tokens)
        plan = make_plan(config, machine, vocab_size=vocab_size, train_tokens=train_tokens)
        plan = with_compile(with_time(plan, config, machine), config, machine, compiler=cpp_compiler())
    tasks_s = tasks_time_s(config, plan)
    values = as_dict(plan) | {"tasks_s": tasks_s, "machine": dataclasses.asdict(machine)}
    text = describe(config, plan, machine, shards)
    if not sure:
        text += f"\nguessed   a vocabulary of {vocab_size}, until the text is prepared"
    if args.price is not None and plan.time_s is not None:
        values["cost"] = cost = args.price * (plan.time_s + (tasks_s or 0.0)) / 3600
        text += f"\ncost      {cost:,.2f} at {args.price:g} an hour"
    Output(args).result(values, text)
    return 0


def _propose(
    args: Args,
    preset: str,
    spend: Budget,
    machine: Machine,
    vocab_size: int,
    sure: bool,
    train_tokens: int | None,
) -> int:
    """Print what each law proposes."""
    from regpt.train.sizing import OURS, PUBLISHED, propose

    speeds: dict[int, float] = {}
    own = OURS.get(args.config.model.arch)
    laws = [law for law in (own, PUBLISHED) if law is not None]
    proposals = [
        propose(
            args.config,
            machine,
            law,
            spend,
            vocab_size=vocab_size,
            train_tokens=train_tokens,
            speeds=speeds,
        )
        for law in laws
    ]
    if spend.flops is not None:
        lines = [f"budget    {spend.flops:.2e} FLOPs"]
    else:
        money = f", {args.money:g} at {args.price:g} an hour" if args.money is not None else ""
        lines = [f"budget    {duration(spend.time_s or 0.0)} of {machine.device}: {machine.name}{money}"]
    if not sure:
        lines.append(f"guessed   a vocabulary of {vocab_size}, until the text is prepared")
    asked = {k: new for k, (_, new) in differences(load_preset(preset).config, args.config).items()}
    commands = [_command(preset, asked | p.settings) for p in proposals]
    for law, p, command in zip(laws, proposals, commands, strict=True):
        lines += ["", f"by        {law.name} ({law.source})", *_lines(args.config.model.arch, p)]
        if args.price is not None and p.time_s is not None:
            lines.append(f"price     {args.price * p.time_s / 3600:,.2f} at {args.price:g} an hour")
        lines.append(f"run       {command}")
    values = {
        "proposals": [
            dataclasses.asdict(p) | {"command": c} for p, c in zip(proposals, commands, strict=True)
        ],
        "machine": dataclasses.asdict(machine),
    }
    Output(args).result(values, "\n".join(lines))
    return 0


def _command(preset: str, settings: dict[str, object]) -> str:
    """The command line that trains a preset with those settings."""
    words = ["regpt", "train", preset]
    for key, value in settings.items():
        words += ["--" + key.replace("_", "-"), "none" if value is None else f"{value}"]
    return shlex.join(words)


def _lines(arch: str, p: Proposal) -> list[str]:
    """A proposal for a person."""
    from regpt.train.sizing import MANY_EPOCHS

    time = f", about {duration(p.time_s)} of training steps" if p.time_s is not None else ""
    epochs = f", {p.epochs:.2f} epochs" if p.epochs is not None else ""
    loss = "no guess: the law was fitted on other sizes"
    if p.expected_loss is not None:
        loss = f"{p.expected_loss:.2f} nats a token, if the law's text and tokenizer were yours"
    lines = [
        f"model     {arch} {p.n_layer} layers x {p.n_embd}, {p.n_head} heads: {p.parameters:,} parameters",
        f"tokens    {p.tokens:,}{epochs}, in {p.steps:,} steps of {p.batch_tokens:,}",
        f"cost      {p.flops:.2e} FLOPs{time}, {gib(p.memory_bytes)} of memory",
        f"loss      {loss}",
    ]
    if p.epochs is not None and p.epochs > MANY_EPOCHS:
        lines.append(
            f"warning: beyond {MANY_EPOCHS} epochs, repeated text teaches less and less: more text would help."
        )
    return lines


def describe(config: Config, plan: Plan, machine: Machine, shards: TokenSet | None) -> str:
    """The plan in a few lines for a person."""
    from regpt.train.tasks import evaluations, tasks_time_s

    m = config.model
    lines = []
    if shards is not None:
        train = shards.split("train")
        val = (
            f" + {shards.split('val').n_tokens:,} validation" if "val" in shards.splits else ", no validation"
        )
        lines.append(
            f"data      {shards.name}: {train.n_tokens:,} training{val} tokens, "
            f"{shards.tokenizer.kind} of {plan.vocab_size:,}"
        )
    ranks = f" on {plan.world} ranks ({plan.strategy}, {plan.reduction} reduction)" if plan.world > 1 else ""
    accumulation = f" in {plan.n_micro} micro-batches of {plan.micro_rows}" if plan.n_micro > 1 else ""
    epochs = f", {plan.epochs:.2f} epochs" if plan.epochs is not None else ""
    memory = plan.memory
    minutes = config.train.minutes
    fitted = f"about {plan.steps:,} in {minutes:g} minutes" if minutes is not None else f"{plan.steps:,}"
    lines += [
        f"model     {m.arch} {m.n_layer} layers x {m.n_embd}, {m.n_head} heads, context {m.block_size}, "
        f"vocabulary {plan.vocab_size:,} (padded {plan.padded_vocab_size:,}): {plan.parameters:,} parameters",
        f"batch     {plan.batch_rows} rows x {m.block_size} = {config.train.batch_tokens:,} tokens{ranks}{accumulation}"
        f"{plan.batches}",
        f"steps     {fitted}: {plan.total_tokens:,} tokens{epochs}, {plan.total_flops:.2e} FLOPs",
        f"machine   {machine.device}: {machine.name}, {machine.threads} threads; {plan.dtype}, "
        f"{'compiled' if plan.compile else 'eager'}" + (f": {plan.compile_why}" if plan.compile_why else ""),
        f"memory    {gib(memory.total)}: weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, "
        f"optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}, logits {gib(memory.logits)}, "
        f"process {gib(memory.process)}" + (f", checkpoint {gib(memory.saving)}" if memory.saving else ""),
    ]
    if plan.time_s is not None:
        lines.append(f"time      about {duration(plan.time_s)} of training steps")
    if config.eval.tasks is not None:
        n, time_s = evaluations(config.eval, plan.steps), tasks_time_s(config, plan)
        about = f", about {duration(time_s)} in all" if time_s is not None else ""
        lines.append(f"tasks     {config.eval.tasks}: {n} {'times' if n > 1 else 'time'}{about}")
    if machine.memory_bytes and memory.total > machine.memory_bytes:
        lines.append(
            f"warning: this needs {gib(memory.total)} and the device has {gib(machine.memory_bytes)}; "
            + (
                "try --train.micro-rows 1"
                if plan.micro_rows > 1
                else "try a smaller model or context, or a larger machine"
            )
        )
    return "\n".join(lines)


def gib(n: Any) -> str:
    """Bytes as GiB or MiB."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**29 else f"{n / 2**20:.0f} MiB"
