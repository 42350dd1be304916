"""Run a preset's whole recipe, evaluate it, and print published figures, ours, the difference, and why they differ.

The same command again continues a stopped run. What is printed lies in the run as reproduction.json and reproduction.md.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.beside import text_of
from regpt.cli.parse import CommonArgs, Output, finite, parse, preset_and_rest, program
from regpt.cli.train import Screen, write_run_report
from regpt.config import Config, Preset, differences, load_preset
from regpt.durations import duration
from regpt.errors import DataError, Interrupted, UsageError
from regpt.evals.compare import Comparison, Run, Values, compare, markdown, table, tokens_of
from regpt.evals.names import LOSS
from regpt.evals.published import of_preset, tasks_of
from regpt.paths import user_path

if TYPE_CHECKING:
    from regpt.evals.tasks import Task
    from regpt.train.load import Loaded

JSON_FILE, MARKDOWN_FILE = "reproduction.json", "reproduction.md"
# Settings that decide what is learned; the others are of this machine, or of what is written down.
LEARNED = (
    *("model.", "tokenizer.name", "tokenizer.vocab_size", "optim.", "train.steps", "train.minutes"),
    *("train.batch_tokens", "train.batch_ramp_steps", "data.source", "data.val_", "data.order", "data.dedup"),
)


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt reproduce PRESET`."""

    out: str | None = None
    """The run directory. None: runs/<preset>."""
    fresh: bool = False
    """Begin anew; what stands in the run directory is moved aside."""
    nproc: int = 1
    """Processes on this machine that train; one of them evaluates the tasks."""
    tasks: str | None = None
    """Tasks to evaluate, with commas between (loss, hellaswag, …). None: those that the preset has published figures for."""
    data: str | None = None
    """The tasks' file, or a folder of them. None: downloaded by name."""
    rows: int | None = None
    """The first so many rows of each task. None: all."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=Config
    )


def main(argv: list[str]) -> int:
    """`regpt reproduce`."""
    if (not argv or argv[0].startswith("-")) and not {"-h", "--help"} & set(argv):
        raise UsageError(
            "regpt reproduce asks which preset.",
            got=argv[0] if argv else "none",
            hint="regpt reproduce PRESET …; regpt presets",
        )
    name, rest = preset_and_rest(argv)
    preset = load_preset(name)
    args = parse(
        Args,
        rest,
        prog="regpt reproduce PRESET",
        description=f"{__doc__}\n\nPreset {preset.name}: {preset.about.summary}. Other presets: regpt presets",
        default=Args(config=preset.config),
    )
    if args.nproc != 1 and "RANK" not in os.environ:
        from regpt.train.launch import launch

        return launch(args.nproc, ["reproduce", *argv])
    main_rank = os.environ.get("RANK", "0") == "0"
    screen = Screen(Output(args if main_rank else dataclasses.replace(args, quiet=True)), args.config)
    tasks, skipped = open_tasks(args, preset.name) if main_rank else ({}, {})
    for task, why in skipped.items():
        screen.out.warn(f"{task} will be skipped: {why}")
    from regpt.train.session import train  # torch only from here on

    out = user_path(args.out or f"runs/{preset.name}")
    with screen:
        result = train(args.config, out, fresh=args.fresh, listen=screen.hear)
    if not main_rank:
        return 0
    write_run_report(out, screen.out)
    try:
        ours, run = evaluated(args, preset, out, tasks, skipped, result.tokens, screen.out)
    except KeyboardInterrupt:
        raise Interrupted(
            "stopped while the tasks were evaluated; the run is trained and saved.",
            signum=signal.SIGINT,
            hint="the same command evaluates it (without --fresh)",
        ) from None
    found = compare(of_preset(preset.name), ours, run, skipped)
    values = as_dict(preset, result, run, ours, found, skipped)
    write(out, preset, values, found)
    lines = [table(found)] if found else [f"nothing is published for {preset.name}."]
    lines += [f"{task} is skipped: {why}" for task, why in skipped.items()]
    lines += [
        f"the table lies in {out / MARKDOWN_FILE}",
        f"next:  {program()} eval {out} --which last" if ours else f"next:  {program()} inspect {out}",
    ]
    screen.out.result(values, "\n".join(lines))
    return 0


def open_tasks(args: Args, preset: str) -> tuple[dict[str, Task], dict[str, str]]:
    """The tasks to evaluate with their rows, read before anything is trained; and those whose rows cannot be had, and why.

    Raises:
        ConfigError: there is no such task, or `--rows` is no number of rows.
        DataError: the rows of a task that was named on the command line cannot be had.
    """
    from regpt.evals.tasks import open_task

    names = (
        tasks_of(preset) if args.tasks is None else [n.strip() for n in args.tasks.split(",") if n.strip()]
    )
    opened: dict[str, Task] = {}
    skipped: dict[str, str] = {}
    for name in names:
        if name == LOSS:
            continue
        try:
            opened[name] = open_task(name, None if args.data is None else Path(args.data), args.rows)
        except DataError as e:
            if args.tasks is not None:
                raise
            skipped[name] = " ".join(str(e).split())
    return opened, skipped


def evaluated(
    args: Args,
    preset: Preset,
    out: Path,
    tasks: dict[str, Task],
    skipped: dict[str, str],
    tokens: int,
    output: Output,
) -> tuple[dict[str, Values], Run]:
    """The figures of the run's last checkpoint by task; and what must be known of it to compare it.

    A task that this tokenizer cannot write is skipped, and told in `skipped`.
    """
    from regpt.models.count import count_parameters
    from regpt.train.load import load_model
    from regpt.train.machine import probe, using

    machine = probe(args.config.train.device, args.config.train.threads)
    loaded = load_model(out, device=machine.device, which="last", say=output.warn)
    ours: dict[str, Values] = {}
    if loaded.val_loss is not None:
        ours[LOSS] = {"nats": loaded.val_loss}
    else:
        skipped[LOSS] = no_loss(loaded)
    with using(machine, exact=True):
        for name, task in tasks.items():
            try:
                ours[name] = _asked(task, loaded, machine.device, output)
            except DataError as e:  # not raised: what was trained for hours is still set beside its figures
                skipped[name] = " ".join(str(e).split())
                output.warn(f"{name} is skipped: {skipped[name]}")
    text = text_of(dataclasses.asdict(args.config.data))
    corpus = text.corpus if text else None
    changed = {
        key: values
        for key, values in differences(preset.config, args.config).items()
        if key.startswith(LEARNED) and not (key == "data.source" and corpus == values[0])
    }
    vocab_size = loaded.tokenizer.vocab_size
    run = Run(
        windows=(loaded.config.block_size, loaded.config.block_size),
        parameters=count_parameters(loaded.config, vocab_size).total,
        corpus=corpus,
        tokenizer=tokens_of(loaded.tokenizer.kind, vocab_size),
        held_out=text.held_out if text else None,
        tokens=tokens,
        changed=changed,
    )
    return ours, run


def no_loss(loaded: Loaded) -> str:
    """Why a checkpoint has no validation loss."""
    from regpt.train.checkpoint import read_checkpoint
    from regpt.train.run import RunDirectory

    step = read_checkpoint(loaded.path, verify=False).state.get("evaluated_step")
    if step != loaded.step:
        before = "never" if step is None else f"at step {step:,}"
        return f"its last step, {loaded.step:,}, was not evaluated (the loss was last taken: {before})"
    log = RunDirectory(loaded.path.absolute().parent.parent).lines
    evaluated = any(e["event"] == "eval" and e["step"] == step for e in log.entries())
    return f"the loss at step {step:,} was not finite" if evaluated else "the run has no validation split"


def _asked(task: Task, loaded: Loaded, device: str, output: Output) -> Values:
    """One task's figures, with progress."""
    with output.progress(task.name, 100, "%") as bar:
        result = task.evaluate(
            loaded.model,
            loaded.tokenizer,
            device=device,
            progress=lambda done, total: bar.update(100 * done / max(total, 1)),
        )
    output.info(f"{task.name}: {result.rows:,} rows in {duration(result.seconds)}")
    return result.as_dict()


def as_dict(
    preset: Preset,
    result: Any,
    run: Run,
    ours: dict[str, Values],
    found: Sequence[Comparison],
    skipped: dict[str, str],
) -> dict[str, Any]:
    """What --json prints and reproduction.json holds."""
    return {
        "preset": preset.name,
        "run": result.run,
        "step": result.step,
        "tokens": result.tokens,
        "seconds": result.seconds,
        "parameters": run.parameters,
        "changed": {key: {"recipe": a, "run": b} for key, (a, b) in (run.changed or {}).items()},
        "figures": [c.as_dict() for c in found],
        "skipped": skipped,
        **ours,
    }


def write(out: Path, preset: Preset, values: dict[str, Any], found: Sequence[Comparison]) -> None:
    """Both files into the run. Raises CheckpointError where the disk does not take them."""
    from regpt.errors import CheckpointError
    from regpt.train.durable import json_bytes, replace_file

    title = f"{preset.name}: published figures and this run's, step {values['step']:,}"
    try:
        replace_file(out / JSON_FILE, json_bytes(finite(values)))
        replace_file(out / MARKDOWN_FILE, markdown(title, found).encode())
    except OSError as e:
        raise CheckpointError(f"the table cannot be written into {out}: {e.strerror or e}.") from e
