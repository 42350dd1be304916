"""A dry run: what a preset and its overrides come to in parameters, memory, FLOPs and time. Nothing is touched."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import CommonArgs, Output, duration, parse, preset_and_rest
from regpt.config import Config, load_preset

if TYPE_CHECKING:
    from regpt.data.shards import Shards
    from regpt.train.machine import Machine
    from regpt.train.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt plan [PRESET]`."""

    price: float | None = None
    """Money an hour of this machine costs, to estimate the run's cost."""
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

    config = args.config
    keep_memory()
    machine = probe(config.train.device, config.train.threads)
    vocab_size, sure, shards = known_corpus(config)
    with using(machine):
        plan = make_plan(
            config,
            machine,
            vocab_size=vocab_size,
            train_tokens=shards.split("train").n_tokens if shards else None,
        )
        plan = with_compile(with_time(plan, config, machine), config, machine, compiler=cpp_compiler())
    values = as_dict(plan) | {"machine": dataclasses.asdict(machine)}
    text = describe(config, plan, machine, shards)
    if not sure:
        text += f"\nguessed   a vocabulary of {vocab_size}, until the text is prepared"
    if args.price is not None and plan.time_s is not None:
        values["cost"] = cost = args.price * plan.time_s / 3600
        text += f"\ncost      {cost:,.2f} at {args.price:g} an hour"
    Output(args).result(values, text)
    return 0


def describe(config: Config, plan: Plan, machine: Machine, shards: Shards | None) -> str:
    """The plan in a few lines for a person."""
    m = config.model
    lines = []
    if shards is not None:
        data, train = shards.manifest, shards.split("train")
        val = (
            f" + {shards.split('val').n_tokens:,} validation" if "val" in shards.splits else ", no validation"
        )
        lines.append(
            f"data      {data.source.name}: {train.n_tokens:,} training{val} tokens, "
            f"{data.tokenizer.kind} of {plan.vocab_size:,}"
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
        f"batch     {plan.batch_rows} rows x {m.block_size} = {config.train.batch_tokens:,} tokens{ranks}{accumulation}",
        f"steps     {fitted}: {plan.total_tokens:,} tokens{epochs}, {plan.total_flops:.2e} FLOPs",
        f"machine   {machine.device}: {machine.name}, {machine.threads} threads; {plan.dtype}, "
        f"{'compiled' if plan.compile else 'eager'}" + (f": {plan.compile_why}" if plan.compile_why else ""),
        f"memory    {gib(memory.total)}: weights {gib(memory.weights)}, gradients {gib(memory.gradients)}, "
        f"optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}, logits {gib(memory.logits)}, "
        f"process {gib(memory.process)}" + (f", checkpoint {gib(memory.saving)}" if memory.saving else ""),
    ]
    if plan.time_s is not None:
        lines.append(f"time      about {duration(plan.time_s)} of training steps")
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
