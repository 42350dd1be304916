"""From settings to a finished run: text and tokenizer, plan, run directory, training; resumed where it was left.

`regpt train` and `regpt.train_model` are both this. Everything that can be refused is refused before anything slow is begun.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from regpt.config import Config, Preset, build, differences, to_dict
from regpt.data.corpus import corpus, text_identity
from regpt.data.loader import Loader
from regpt.data.split import TokenSet
from regpt.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    Interrupted,
    RegptError,
    TrainingDiverged,
)
from regpt.models import build_model
from regpt.paths import nearest_existing, user_path
from regpt.tokenizers import LEAST_ENTRIES, SIZES, Tokenizer
from regpt.train import checkpoint
from regpt.train.allocator import keep_memory
from regpt.train.compile import as_recorded, cpp_compiler, with_compile
from regpt.train.dist import Ranks, joined
from regpt.train.estimate import with_time
from regpt.train.loop import Trainer
from regpt.train.machine import Machine, probe, using
from regpt.train.plan import Plan, as_dict, make_plan, with_steps
from regpt.train.run import RunDirectory
from regpt.train.signals import StopRequest, stop_on_signal
from regpt.train.tasks import Prepared, open_tasks, prepare_tasks, task_names
from regpt.train.track import Listener, Tracker, check_trackers, make_trackers

HOPELESS = 2.0  # times the memory that there is: more than an estimate errs and a swap file helps
# Settings that decide what is learned or in which order rows are seen: with other values it is another run.
FIXED = (
    "seed",
    "model.",
    "tokenizer.name",
    "tokenizer.vocab_size",
    "train.batch_tokens",
    "train.batch_ramp_steps",
    "data.order",
    "optim.name",
)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What `regpt train --json` prints."""

    step: int
    tokens: int
    val_loss: float | None
    val_bits_per_byte: float | None
    tokens_per_second: float | None
    seconds: float
    """Of training steps."""
    elapsed_s: float
    """Of the whole loop, over all sittings: what train.minutes counts."""
    run: str


def train(
    config: Config,
    out: Path | str,
    *,
    fresh: bool = False,
    preset: Preset | None = None,
    listen: Listener = lambda *_: None,
) -> TrainResult:
    """Train `config` in the run directory `out`; continue there if a run of the same settings was begun.

    Args:
        fresh: begin anew; what stood in `out` is moved aside.
        preset: whose settings `config` was made from; the run's record says so.
        listen: hears every event as it happens.

    Raises:
        RegptError: whatever is wrong, as one message; Interrupted after a signal, TrainingDiverged on a non-finite loss.
    """
    keep_memory()
    try:
        machine = probe(config.train.device, config.train.threads)
    except RegptError as e:
        e.told = os.environ.get("LOCAL_RANK", "0") != "0"  # the first process of each host says it
        raise
    with using(machine), joined(machine.kind) as ranks:
        try:
            heard = listen if ranks.main else lambda *_: None
            return _train(config, user_path(out), fresh, preset, heard, machine, ranks)
        except (Interrupted, TrainingDiverged) as e:
            e.told = not ranks.main  # it is the same on all
            raise


def _train(
    config: Config,
    out: Path,
    fresh: bool,
    preset: Preset | None,
    listen: Listener,
    machine: Machine,
    ranks: Ranks,
) -> TrainResult:
    """`train` on one rank."""
    # Contradictions between settings show before any text is read.
    ranks.together(lambda: _check_settings(config, machine, ranks))
    run = RunDirectory(out)

    def check() -> Path | None:
        check_trackers(config.track)
        if not ranks.main:
            return None
        _check_place(run)
        return None if fresh else _check_same_run(run, config, listen)

    found = ranks.from_main(ranks.together(check) is not None)
    tasks = open_tasks(config.eval, ranks, lambda text: listen("note", 0, {"text": text}))
    kept = run.tokenizer if found else None
    tokenizer, shards = ranks.first_on_each_host(
        lambda: corpus(config, listen, kept_tokenizer=kept, verify=ranks.local_rank == 0)
    )
    # A character that the tokenizer lacks is refused now, not at a sample.
    ranks.together(lambda: tokenizer.encode(config.sample.prompt))
    prepared = ranks.together(lambda: prepare_tasks(tasks, config, tokenizer))
    loader = ranks.together(
        lambda: Loader(
            shards.split("train"),
            block_size=config.model.block_size,
            batch_rows=config.train.batch_tokens // config.model.block_size,
            seed=config.seed,
            order=config.data.order,
            ramp_steps=config.train.batch_ramp_steps,
        )
    )
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_on_signal())
        plan = _plan(config, machine, tokenizer.vocab_size, shards, ranks)
        # Refused so far without a trace; a run that --fresh moves aside was left alone.
        opened = ranks.together(lambda: RunDirectory.open(run.path, fresh=fresh) if ranks.main else run)
        run = stack.enter_context(opened)
        with shortage_said(plan, machine):
            plan = _same_steps(with_time(plan, config, machine), ranks)
            plan = _same_compile(plan, config, machine, run, ranks)
            names = [task.name for task in tasks]
            listen("plan", 0, {"plan": plan, "machine": machine, "shards": shards, "tasks": names})
            trainer = _trainer(
                config, plan, machine, tokenizer, shards, loader, prepared, run, preset, listen, stop, ranks
            )
            try:
                trainer.run()
            finally:
                trainer.close()
        return _result(trainer, run)


def _check_settings(config: Config, machine: Machine, ranks: Ranks) -> None:
    """Refuse settings that contradict each other or name what there is not, and a model far too large."""
    plan = make_plan(config, machine, vocab_size=_least_vocabulary(config), world=ranks.world)
    check_memory(plan, machine)
    task_names(config.eval)


def _plan(config: Config, machine: Machine, vocab_size: int, shards: TokenSet, ranks: Ranks) -> Plan:
    """The plan on the text as it is, the same on all ranks, of a model that fits."""
    train_tokens = shards.split("train").n_tokens
    plan = make_plan(config, machine, vocab_size=vocab_size, train_tokens=train_tokens, world=ranks.world)
    ranks.together(lambda: _same_plan(plan, ranks))
    ranks.together(lambda: check_memory(plan, machine))
    return plan


def _same_steps(plan: Plan, ranks: Ranks) -> Plan:
    """The plan with rank 0's steps: for a time budget, each rank has measured for itself how many fit."""
    return with_steps(plan, ranks.from_main(plan.steps))


def _same_compile(plan: Plan, config: Config, machine: Machine, run: RunDirectory, ranks: Ranks) -> Plan:
    """The plan with rank 0's decision whether to compile: that of the run's beginning where it goes on."""

    def decide() -> tuple[bool, str]:
        compiler = cpp_compiler()
        decided = with_compile(plan, config, machine, compiler=compiler)
        before = run.read().get("plan") if ranks.main and run.begun else None
        decided = as_recorded(decided, before, config, machine, compiler=compiler)
        return decided.compile, decided.compile_why

    compiled, why = ranks.from_main(ranks.together(decide))
    return dataclasses.replace(plan, compile=compiled, compile_why=why)


def _same_plan(plan: Plan, ranks: Ranks) -> None:
    """Ranks that divide the batch unequally would wait for one another for ever."""
    names = (
        "micro_rows",
        "n_micro",
        "dtype",
        "steps",
        "batch_rows",
        "batch_ramp_steps",
        "parameters",
        "strategy",
        "reduction",
        "compile",
    )
    ours = {name: getattr(plan, name) for name in names}
    theirs = ranks.from_main(ours)
    if other := [name for name in names if ours[name] != theirs[name]]:
        raise ConfigError(
            f"rank {ranks.rank} plans another run than rank 0; different: {', '.join(other)}.",
            got=", ".join(str(ours[name]) for name in other),
            expected=", ".join(str(theirs[name]) for name in other),
            hint=f"the same settings everywhere, with --train.micro-rows {theirs['micro_rows']} "
            f"--train.dtype {theirs['dtype']}",
        )


def _least_vocabulary(config: Config) -> int:
    """Of the tokenizer, as far as it is known before the text is read."""
    return (SIZES | {"bpe": LEAST_ENTRIES}).get(config.tokenizer.name, 1)


def new_model(config: Config, vocab_size: int) -> torch.nn.Module:
    """The model as every run begins with it: weights by config.seed, on the CPU."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, vocab_size)
    model.checkpoint_activations = config.train.checkpoint_activations
    return model


def check_memory(plan: Plan, machine: Machine) -> None:
    """Refuse what is far from fitting: a system short of memory ends processes without a word. Less is a warning only."""
    m = plan.memory
    needed = m.total - m.saving  # which rank 0 alone needs, and not all the time
    if machine.memory_bytes and needed > HOPELESS * machine.memory_bytes:
        smaller = plan.micro_rows > 1 and m.activations + m.logits > needed / 2
        raise DeviceError(
            f"this model needs {needed / 2**30:,.1f} GiB to train.",
            got=f"{machine.name} with {machine.memory_bytes / 2**30:,.1f} GiB for each process",
            hint="--train.micro-rows 1"
            if smaller
            else "a smaller model or context, --train.checkpoint-activations, or more memory",
        )


@contextlib.contextmanager
def shortage_said(plan: Plan, machine: Machine) -> Iterator[None]:
    """While open, running out of memory is a DeviceError that names the setting to change."""
    try:
        yield
    except RuntimeError as e:
        if not _out_of_memory(e):
            raise
        raise DeviceError(
            f"{machine.name} ran out of memory; the plan expected {plan.memory.total / 2**30:.1f} GiB.",
            hint=f"--train.micro-rows {max(plan.micro_rows // 2, 1)} (the batch stays as it is)",
        ) from e


def _out_of_memory(error: RuntimeError) -> bool:
    said = str(error).lower()
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "out of memory" in said
        or "can't allocate memory" in said
    )


def _trainer(
    config: Config,
    plan: Plan,
    machine: Machine,
    tokenizer: Tokenizer,
    shards: TokenSet,
    loader: Loader,
    tasks: Sequence[Prepared],
    run: RunDirectory,
    preset: Preset | None,
    listen: Listener,
    stop: StopRequest,
    ranks: Ranks,
) -> Trainer:
    """A trainer at step 0, or where the newest valid checkpoint stands; the run directory says what it is."""
    facts = _facts(config, tokenizer, shards)

    def note(text: str) -> None:
        listen("note", 0, {"text": text})

    before = ranks.together(lambda: run.read() if ranks.main and run.begun else None)
    found = ranks.together(lambda: _newest(run, facts, note) if ranks.main else None)
    step = found.step if found is not None else None
    tracked = to_dict(config)

    def follow() -> list[Tracker]:
        return make_trackers(config.track, run.path, tracked, say=note, resumed_step=step)

    trackers = ranks.together(lambda: follow() if ranks.main else [])
    model = new_model(config, tokenizer.vocab_size)
    trainer = Trainer(
        config,
        plan,
        machine,
        model,
        tokenizer,
        loader,
        shards.split("val") if "val" in shards.splits else None,
        tasks,
        run=run,
        facts=facts,
        trackers=trackers,
        listen=listen,
        stop=stop,
        ranks=ranks,
    )
    if ranks.from_main(found is not None):
        trainer.restore(found)

    def begin() -> None:
        if before is not None:
            _say_what_breaks_bits(before, plan, machine, listen)
            _rewind(trainer, run, listen)
        if ranks.main:
            tokenizer.save(run.tokenizer)
            all_facts = facts | {"text": text_identity(config)} | _text_facts(shards)
            parts = {"plan": as_dict(plan), "facts": all_facts, "machine": dataclasses.asdict(machine)}
            run.begin(config=tracked, preset=_preset_record(preset, config, before), **parts)

    ranks.together(begin)
    return trainer


def _preset_record(preset: Preset | None, config: Config, before: dict[str, Any] | None) -> dict[str, Any]:
    """Whose settings these are, and which differ from them now; as it was recorded where nobody says."""
    if preset is None:
        known = (before or {}).get("preset")
        return known if isinstance(known, dict) else {}
    return {"name": preset.name, "differs": differences(preset.config, config)}


def _text_facts(shards: TokenSet) -> dict[str, Any]:
    """What the text is called and how much of it there is: for the report, nothing depends on it."""
    tokens = {name: shards.split(name).n_tokens for name in shards.splits}
    return {"tokens": tokens, "corpus": shards.name}


def _facts(config: Config, tokenizer: Tokenizer, shards: TokenSet) -> dict[str, Any]:
    """What a checkpoint needs to be loaded without the run's settings."""
    return {
        "model_config": to_dict(config.model),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "data_fingerprint": shards.fingerprint,
    }


def _rewind(trainer: Trainer, run: RunDirectory, listen: Listener) -> None:
    """Take the log back to the step from where the run goes on."""
    step = trainer.state.step
    if step and not run.lines.path.exists():
        listen("note", step, {"text": f"{run.lines.path} is missing: the log begins anew at step {step}."})
    trainer.rewind()
    listen("resume", step, {"run": str(run.path), "total_steps": trainer.total_steps})


def _newest(
    run: RunDirectory, facts: dict[str, Any], note: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """The newest valid checkpoint, of this text and tokenizer."""
    found = checkpoint.newest_valid(run.checkpoints, say=note)
    _check_facts(facts, found, run)
    return found


def _say_what_breaks_bits(before: dict[str, Any], plan: Plan, machine: Machine, listen: Listener) -> None:
    """Exact resume holds for the same build, processor, threads, micro-batch and dtype: say aloud what changed."""
    then, now = (
        before.get("plan", {}) | before.get("machine", {}),
        as_dict(plan) | dataclasses.asdict(machine),
    )
    changed = [
        k
        for k in ("dtype", "compile", "micro_rows", "threads", "name", "device", "reduction")
        if then.get(k) != now[k]
    ]
    worlds = then.get("world", 1), now["world"]
    if worlds[0] != worlds[1] and plan.reduction != "exact":
        changed.append("world")
    if before.get("versions", {}).get("torch") != str(torch.__version__):
        changed.append("torch")
    if changed:
        text = f"{', '.join(changed)} changed since this run was begun: it goes on, but not to the same bits."
        listen("note", 0, {"text": text})


def _check_place(run: RunDirectory) -> None:
    """Refuse a run directory that cannot be used, before anything slow; one that is not there is not made yet."""
    if run.path.exists():
        RunDirectory.open(run.path).close()
        return
    parent = nearest_existing(run.path)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(
            f"the run directory {run.path} cannot be made: {parent} is not a folder to write in."
        )


def _check_same_run(run: RunDirectory, config: Config, listen: Listener) -> Path | None:
    """Refuse what would make it another run; say aloud which other settings changed. Returns the run's tokenizer."""
    if not run.begun and checkpoint.list_checkpoints(run.checkpoints):
        raise CheckpointError(
            f"{run.path} has checkpoints but no run.json: a part of it was deleted.",
            hint="put run.json back, or begin anew with --fresh",
        )
    if not run.begun or (not run.checkpoints.exists() and run.last_saved_step() is None):
        return None
    before = build(Config, run.config, where=str(run.path / "run.json"))
    changed = differences(before, config)
    fixed = {k: v for k, v in changed.items() if k.startswith(FIXED)}
    if fixed:
        lines = "; ".join(f"{k} was {old!r}, now {new!r}" for k, (old, new) in fixed.items())
        raise CheckpointError(
            f"{run.path} holds a run with other settings: {lines}.",
            hint="another --out, or --fresh to begin anew (the old run is moved aside)",
        )
    then, now = run.read().get("facts", {}).get("text", {}), text_identity(config)
    if then.keys() == now.keys() and then != now:
        other = [name for name in now if now[name] != then[name]]
        raise CheckpointError(
            f"the text changed since the run in {run.path} was begun: {', '.join(other)}.",
            got=", ".join(f"{name} {now[name]}" for name in other),
            expected=", ".join(f"{name} {then[name]}" for name in other),
            hint="give the text it was begun with, another --out, or --fresh",
        )
    for name, (old, new) in changed.items():
        listen("info", 0, {"text": f"{name} was {old!r} in this run, from now on it is {new!r}"})
    return run.tokenizer


def _check_facts(facts: dict[str, Any], found: checkpoint.Checkpoint | None, run: RunDirectory) -> None:
    """Refuse text or a tokenizer that changed under a run, and a run whose checkpoints were deleted."""
    if found is None:
        if run.begun and (saved := run.last_saved_step()) is not None:
            raise CheckpointError(
                f"{run.path} says that it saved step {saved}, but it has no checkpoint: a part of it was deleted.",
                hint="put its checkpoints folder back, or begin anew with --fresh",
            )
        return
    for name, noun in (("tokenizer_fingerprint", "tokenizer"), ("data_fingerprint", "text")):
        if found.state[name] != facts[name]:
            raise CheckpointError(
                f"the {noun} changed since {found.path} was written.",
                got=facts[name],
                expected=found.state[name],
                hint=f"give the {noun} it was begun with, another --out, or --fresh",
            )


def _result(trainer: Trainer, run: RunDirectory) -> TrainResult:
    s = trainer.state
    tokens = trainer.plan.tokens_before(s.step)
    return TrainResult(
        step=s.step,
        tokens=tokens,
        val_loss=s.val_loss,
        val_bits_per_byte=s.val_bits_per_byte,
        tokens_per_second=tokens / s.seconds if s.seconds else None,
        seconds=s.seconds,
        elapsed_s=s.elapsed_s,
        run=str(run.path),
    )
