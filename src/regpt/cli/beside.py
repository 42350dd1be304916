"""What stands beside a run's own figures in `regpt eval`: published ones, and those of any task of lm-eval."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from regpt.cli.parse import CommonArgs, Output
from regpt.data.download import offline, reachable
from regpt.durations import duration
from regpt.errors import ConfigError
from regpt.evals.compare import (
    Comparison,
    Run,
    Values,
    aligned,
    beside,
    columns,
    comparisons,
    held_out,
    sources,
    tokens_of,
    written,
)
from regpt.evals.names import LOSS
from regpt.paths import user_path

if TYPE_CHECKING:
    from regpt.adapters.lm_eval import HarnessTasks
    from regpt.evals.figures import TaskResult
    from regpt.train.load import Loaded


@dataclass(frozen=True, kw_only=True)
class BesideArgs(CommonArgs):
    """Arguments of `regpt eval` for what stands beside."""

    published: Literal["nearest", "all", "none"] = "nearest"
    """Published figures to show: of the GPT-2 nearest in size, of every model with their sources, or none."""
    harness: str | None = None
    """Tasks, groups or tags of lm-eval, with commas between: any of them, on this run; --tasks then names none by default."""
    harness_tasks: str | None = None
    """A folder with task files for --harness, beside lm-eval's own. They may name local data, and run code beside them."""
    num_fewshot: int | None = None
    """Of --harness: solved examples before each question. None: as each task says."""


def open_harness(args: BesideArgs, out: Output) -> HarnessTasks | None:
    """The tasks of --harness with their rows, before any model is loaded; None where it was not asked for.

    Raises:
        ConfigError: no such task, or an option without --harness.
        DataError: a task's rows cannot be had.
        DeviceError: lm-eval is not installed.
    """
    if args.harness is None:
        for option, value in (("--harness-tasks", args.harness_tasks), ("--num-fewshot", args.num_fewshot)):
            if value is not None:
                raise ConfigError(f"{option} belongs to --harness, which was not given.", got=value)
        return None
    names = list(dict.fromkeys(name.strip() for name in args.harness.split(",") if name.strip()))
    if not names:
        raise ConfigError("--harness names no task.", expected="names with commas between: piqa,arc_easy")
    if args.num_fewshot is not None and args.num_fewshot < 0:
        raise ConfigError("--num-fewshot is out of range.", got=args.num_fewshot, expected="0 or more")
    out.info(f"lm-eval reads its tasks: {', '.join(names)}")
    if not offline() and not reachable():  # asked once here: the hub's own library tries for minutes
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when lm-eval is imported
        out.info("the hub is out of reach: only what lies in its cache, or in --harness-tasks")
    from regpt.adapters.lm_eval import open_tasks

    folder = None if args.harness_tasks is None else user_path(args.harness_tasks)
    return open_tasks(names, folder, say=out.warn)


def run_harness(
    tasks: HarnessTasks,
    args: BesideArgs,
    loaded: Loaded,
    out: Output,
    *,
    rows: int | None,
    device: str,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
    batch_tokens: int | None,
) -> dict[str, Values]:
    """The figures of --harness by task, with progress."""
    from regpt.adapters.lm_eval import evaluate

    with Bars(out) as bars:
        return dict(
            evaluate(
                tasks,
                loaded.model,
                loaded.tokenizer,
                num_fewshot=args.num_fewshot,
                rows=rows,
                device=device,
                autocast=autocast,
                batch_tokens=batch_tokens,
                progress=bars.update,
                say=out.warn,
            )
        )


class Bars:
    """A bar for each kind of work that lm-eval asks for, one after another."""

    def __init__(self, out: Output) -> None:
        self.out, self.doing = out, ""
        self.stack = contextlib.ExitStack()
        self.bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *what: object) -> None:
        self.stack.close()

    def update(self, doing: str, done: int, total: int) -> None:
        """So much of that work is done."""
        if doing != self.doing:
            self.stack.close()
            self.doing = doing
            self.bar = self.stack.enter_context(self.out.progress(f"lm-eval, {doing}", total, "requests"))
        self.bar.update(done)


NO_FIGURES = ("rows", "num_fewshot")  # of what the bridge to lm-eval tells of a task


def harness_table(found: Mapping[str, Values]) -> str:
    """A line for every figure."""
    rows = [["lm-eval", "this run", "rows", "examples"]]
    for task, values in found.items():
        for figure in values:
            name, comma, kind = figure.partition(",")
            if figure in NO_FIGURES or name.endswith("_stderr"):
                continue
            stderr = values.get(f"{name}_stderr{comma}{kind}")
            counts = [str(values.get(key, "")) for key in NO_FIGURES]
            rows.append([f"{task} {figure}", written(figure, values[figure], stderr), *counts])
    return aligned(rows)


def published_beside(
    args: BesideArgs,
    ours: Mapping[str, Values],
    loaded: Loaded,
    text: Text | None,
    windows: tuple[int, int],
) -> list[Comparison]:
    """Published figures of what was evaluated, as --published asks for.

    Args:
        text: what the loss is of; None: some text that is not known by name.
        windows: of a loss: tokens in one, and how far apart they begin.
    """
    from regpt.models.count import count_parameters

    if args.published == "none":
        return []
    run = Run(
        parameters=count_parameters(loaded.config, loaded.tokenizer.vocab_size).total,
        corpus=text.corpus if text else None,
        held_out=text.held_out if text else None,
        windows=windows,
        tokenizer=tokens_of(loaded.tokenizer.kind, loaded.tokenizer.vocab_size),
    )
    return beside(ours, run, every=args.published == "all")


def table(
    args: BesideArgs, results: Sequence[TaskResult], found: Sequence[Comparison], windows: tuple[int, int]
) -> str:
    """A line for every figure of ours, with its interval and published ones beside it; below what was scored, and sources."""
    lines = [aligned(columns(results, found if args.published == "nearest" else []))]
    for r in results:
        how = f", windows of {windows[0]:,}, {windows[1]:,} apart" if r.task == LOSS else ""
        lines.append(f"{r.task}: {r.rows:,} {r.counted}{how}, in {duration(r.seconds)}")
    if found and args.published == "all":
        lines += ["", comparisons(found)]
    if found:
        lines += ["", "published:", *(f"  {line}" for line in sources(found))]
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Text:
    """What a loss over a run's own validation split is of."""

    corpus: str
    """As data.source names it; of a file with the bytes of a named set that one's name."""
    held_out: str
    """Which part of it."""


def text_of(data: Mapping[str, Any]) -> Text | None:
    """The text that settings (data.*) mean; None where they name none."""
    from regpt.data.named import NAMED_SETS
    from regpt.data.sources import known_text

    source = data.get("source")
    if not isinstance(source, str) or not source:
        return None
    corpus = known_text(source)
    named = NAMED_SETS.get(corpus)
    return Text(corpus=corpus, held_out=held_out(data, named.val_split if named else None))


def text_of_run(loaded: Loaded) -> Text | None:
    """The text of a run's own validation split; None where the run does not say."""
    from regpt.errors import CheckpointError
    from regpt.train.run import RunDirectory

    try:
        settings = RunDirectory(Path(loaded.path).absolute().parent.parent).config
    except CheckpointError:
        return None
    return text_of(settings.get("data", {}))
