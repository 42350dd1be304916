"""Evaluate a trained model: its loss over a whole split, and tasks that other programs score, too, each with its interval."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from regpt.cli.beside import (
    BesideArgs,
    harness_table,
    open_harness,
    published_beside,
    run_harness,
    table,
    text_of_run,
)
from regpt.cli.parse import Output, finite, parse
from regpt.errors import ConfigError, DataError, did_you_mean
from regpt.evals.names import LOSS, TASK_NAMES
from regpt.paths import user_path
from regpt.tokenizers.files import write_file

if TYPE_CHECKING:
    from regpt.adapters.lm_eval import HarnessTasks
    from regpt.data.split import TokenSet, TokenSplit
    from regpt.evals.compare import Values
    from regpt.evals.figures import TaskResult
    from regpt.evals.task import Parts, Task
    from regpt.train.dist import Ranks
    from regpt.train.load import Loaded
    from regpt.train.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Args(BesideArgs):
    """Arguments of `regpt eval RUN`."""

    run: tyro.conf.Positional[str]
    """A run directory, or one of its checkpoints."""
    tasks: str | None = None
    """With commas between: loss, wikitext, lambada, hellaswag, arc_easy, piqa. None: loss, or with --harness none of them."""
    data: str | None = None
    """The tasks' file, or a folder with theirs (docs/evaluation.md). None: downloaded once into regpt's cache."""
    rows: int | None = None
    """Of each task, the first so many rows only: questions, passages, or WikiText's pages."""
    split: str | None = None
    """Of the loss: a shard directory[:split], or a text file. None: the run's own validation split."""
    context: int | None = None
    """Of the loss: tokens of a window. None: the model's context."""
    stride: int | None = None
    """Of the loss: tokens by which windows are moved on, each scoring its last so many. None: the context."""
    which: Literal["best", "last"] = "best"
    """The checkpoint with the lowest validation loss, or the newest."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of matrix products; softmax and sums are in float32 or wider."""
    batch_tokens: int | None = None
    """Tokens in one forward pass. None: what suits the device. Figures do not depend on it beyond rounding."""
    nproc: int = 1
    """Processes on this machine that share the work. Several machines: torchrun."""
    out: str | None = None
    """Also write the figures to this file, as JSON."""


def main(argv: list[str]) -> int:
    """`regpt eval`."""
    args = parse(Args, argv, prog="regpt eval", description=__doc__ or "")
    names = check(args)
    if args.nproc != 1 and "RANK" not in os.environ:
        from regpt.train.launch import launch

        return launch(args.nproc, ["eval", *argv])
    from regpt.train.allocator import keep_memory
    from regpt.train.dist import joined
    from regpt.train.machine import probe, using

    keep_memory()
    main_rank = os.environ.get("RANK", "0") == "0"
    out = Output(args if main_rank else dataclasses.replace(args, quiet=True))
    machine = probe(args.device, setting="--device")
    with using(machine, exact=True), joined(machine.kind) as ranks:
        harness = ranks.together(lambda: open_harness(args, out) if main_rank else None)
        evaluation = ranks.first_on_each_host(lambda: Evaluation(args, names, machine, ranks, out))
        results = evaluation.results()
    if not main_rank:
        return 0
    loaded = evaluation.loaded
    values: dict[str, Any] = {"run": args.run, "checkpoint": loaded.path.name, "step": loaded.step}
    values |= {result.task: result.as_dict() | evaluation.about(result.task) for result in results}
    if harness is not None:
        with using(machine, exact=True):
            values["harness"] = evaluation.by_harness(harness)
    ours = {result.task: values[result.task] for result in results}
    text = text_of_run(loaded) if args.split is None else None
    windows = (evaluation.context, evaluation.stride)
    found = published_beside(args, ours, loaded, text, windows)
    values["published"] = [comparison.as_dict() for comparison in found]
    lines = [table(args, results, found, windows)] if results else []
    lines += [harness_table(values["harness"])] if harness is not None else []
    out.info(f"{loaded.path.name} of {args.run}, {machine.device} {args.dtype}")
    out.result(values, "\n".join(lines))
    return 0 if args.out is None else written_to(user_path(args.out), values, out)


def written_to(path: Path, values: dict[str, Any], out: Output) -> int:
    """Write figures that have been shown; the exit status. Where the disk says no, standard output has them all the same."""
    try:
        write_file(path, json.dumps(finite(values), indent=1).encode() + b"\n")
    except DataError as e:
        out.warn(f"{e}\n  The figures stand above.")
        return e.exit_status
    return 0


def check(args: Args) -> list[str]:
    """The names of the tasks, once the arguments are known to be sound.

    Raises:
        ConfigError: naming the argument that is not.
    """
    asked = args.tasks if args.tasks is not None else LOSS if args.harness is None else ""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    for name in names:
        if name not in (known := (LOSS, *TASK_NAMES)):
            raise ConfigError(
                f"there is no task {name!r}.{did_you_mean(name, known)}", expected=", ".join(known)
            )
    if not names and args.tasks is not None:
        raise ConfigError("--tasks names none.", expected=", ".join((LOSS, *TASK_NAMES)))
    for option, value in (("--rows", args.rows), ("--batch-tokens", args.batch_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} is out of range.", got=value, expected="1 or more")
    for option, given in (("--context", args.context), ("--stride", args.stride), ("--split", args.split)):
        if given is not None and LOSS not in names:
            raise ConfigError(
                f"{option} belongs to the loss, which was not asked for.", hint="--tasks loss,…"
            )
    if args.rows is not None and args.harness is None and names == [LOSS]:
        raise ConfigError("--rows belongs to tasks; the loss is always of the whole split.", got=args.rows)
    if args.out is not None and not user_path(args.out).absolute().parent.is_dir():
        raise ConfigError(f"--out {args.out}: there is no folder {user_path(args.out).absolute().parent}.")
    if args.out is not None and user_path(args.out).is_dir():
        raise ConfigError(f"--out {args.out} is a folder.", expected="a file for JSON")
    return list(dict.fromkeys(names))


class Evaluation:
    """A model and all that it is asked, read and checked before anything slow begins."""

    def __init__(self, args: Args, names: list[str], machine: Machine, ranks: Ranks, out: Output) -> None:
        from regpt.evals.likelihood import tokens_of
        from regpt.evals.loss import check_windows
        from regpt.evals.task import require_tokenizer
        from regpt.evals.tasks import open_task
        from regpt.train.load import load_model

        self.args, self.names, self.machine, self.ranks, self.out = args, names, machine, ranks, out
        self.loaded = load_model(args.run, device=machine.device, which=args.which, say=out.warn)
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        require_tokenizer(model, tokenizer)
        self.batch_tokens = args.batch_tokens or tokens_of(machine.device)
        self.context = _given(args.context, self.loaded.config.block_size)
        self.stride = _given(args.stride, self.context)
        self.split: TokenSplit | None = None
        if LOSS in names:
            check_windows(model, self.context, self.stride)
            self.split = open_split(args, self.loaded)
        data = user_path(args.data) if args.data is not None else None
        self.tasks: dict[str, Task] = {}
        missing: list[DataError] = []
        for name in (n for n in names if n != LOSS):
            try:
                self.tasks[name] = open_task(name, data, args.rows)
            except DataError as e:
                missing.append(e)
        if missing:  # all of them at once
            more = "".join(f"\n  and: {e.what}" for e in missing[1:])
            raise DataError(
                missing[0].what + more, got=missing[0].got, expected=missing[0].expected, hint=missing[0].hint
            )
        self.parts: dict[str, Parts] = {
            name: task.requests(tokenizer, self.loaded.config.block_size) for name, task in self.tasks.items()
        }
        for name, task in self.tasks.items():
            task.check(model, self.parts[name])

    def results(self) -> list[TaskResult]:
        """Of every task, in the order asked for."""
        found = []
        for name in self.names:
            found.append(result := self._loss() if name == LOSS else self._task(name))
            self.out.info(f"{name} {result.headline}: {result.figures[result.headline].value:.4f}")
        return found

    def about(self, name: str) -> dict[str, Any]:
        """What belongs to a task's figures in JSON."""
        if name != LOSS or self.split is None:
            return {}
        return {"split": self.split.name, "context": self.context, "stride": self.stride}

    def by_harness(self, tasks: HarnessTasks) -> dict[str, Values]:
        """The figures of lm-eval's tasks."""
        return run_harness(
            tasks,
            self.args,
            self.loaded,
            self.out,
            rows=self.args.rows,
            device=self.machine.device,
            autocast=self._autocast,
            batch_tokens=self.args.batch_tokens,
        )

    def _task(self, name: str) -> TaskResult:
        task, parts = self.tasks[name], self.parts[name]
        requests = sum(len(row) for rows in parts.values() for row in rows)
        with self.out.progress(name, requests, "requests") as bar:
            result = task.evaluate(
                self.loaded.model,
                self.loaded.tokenizer,
                parts=parts,
                device=self.machine.device,
                autocast=self._autocast,
                batch_tokens=self.batch_tokens,
                progress=lambda done, total: bar.update(done),
                ranks=self.ranks,
            )
        if result.cut:
            self.out.warn(
                f"{name}: {result.cut:,} of {result.rows:,} rows do not fit into the model's context of "
                f"{self.loaded.config.block_size:,} tokens; their ends were scored."
            )
        return result

    def _loss(self) -> TaskResult:
        import time

        from regpt.data.loader import window_count
        from regpt.evals.figures import Figure, TaskResult
        from regpt.evals.loss import split_loss

        assert self.split is not None
        begun = time.perf_counter()
        windows = window_count(self.split, self.context, self.stride)
        with self.out.progress(LOSS, windows, "windows") as bar:
            found = split_loss(
                self.loaded.model,
                self.split,
                rows=max(self.batch_tokens // self.context, 1),
                context=self.context,
                stride=self.stride,
                device=self.machine.device,
                autocast=self._autocast,
                progress=lambda done, total: bar.update(done),
                ranks=self.ranks,
            )
        figures = {
            "nats": Figure(found.nats),
            "perplexity": Figure(found.perplexity),
            "bits_per_byte": Figure(found.bits_per_byte),
        }
        return TaskResult(
            task=LOSS,
            figures=figures,
            headline="nats",
            rows=found.tokens,
            seconds=time.perf_counter() - begun,
            counted="tokens",
        )

    @property
    def _autocast(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        from regpt.train.machine import autocast

        return lambda: autocast(self.machine, self.args.dtype)


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def open_split(args: Args, loaded: Loaded) -> TokenSplit:
    """The split that the loss is taken over.

    Raises:
        DataError: it is not here, or was written with another tokenizer than the model's.
    """
    from regpt.data.shards import MANIFEST, Shards
    from regpt.evals.loss import TextSplit

    if args.split is None:
        return own_split(args.run, loaded)
    path, name = user_path(args.split), ""
    if not path.exists() and ":" in args.split:
        before, _, name = args.split.rpartition(":")
        path = user_path(before)
    if (path / MANIFEST).exists():
        return require_same(Shards.open(path), loaded, path).split(name or "val")
    if path.is_file() and name:
        raise DataError(
            f"--split {args.split}: a text file has no splits.", got=name, hint=f"--split {path}: all of it"
        )
    if path.is_file():
        return TextSplit(path, loaded.tokenizer)
    raise DataError(
        f"--split {args.split} is nothing that can be evaluated.",
        expected="a shard directory, one with :train or :val behind it, or a text file",
    )


def own_split(run: str, loaded: Loaded) -> TokenSplit:
    """The validation split of the run's own text. Raises DataError where it is gone, or there is none."""
    from regpt.config import Config, build
    from regpt.data.corpus import known_corpus
    from regpt.train.run import RunDirectory

    folder = loaded.path.absolute().parent.parent
    run_directory = RunDirectory(folder)
    if not run_directory.begun:
        raise DataError(
            f"{run} does not say what it was trained on: {run_directory.record.name} is not there.",
            hint="--split with a shard directory or a text file",
        )
    config = build(Config, run_directory.config, where=str(run_directory.record))
    _, _, tokens = known_corpus(config)
    if tokens is None:
        raise DataError(
            f"the tokens that {run} was trained on are not here.",
            expected=f"shards of {config.data.source}, made as the run made them, in {Path.cwd()}",
            hint="--split with a shard directory or a text file, or the folder where the run was trained",
        )
    if "val" not in tokens.splits:
        raise DataError(
            f"the run {run} held no validation split out.",
            hint="--split with a shard directory or a text file",
        )
    return require_same(tokens, loaded, tokens.path).split("val")


def require_same(tokens: TokenSet, loaded: Loaded, path: Path) -> TokenSet:
    """`tokens`, once it is sure that the model's tokenizer wrote them. Raises DataError."""
    has = loaded.tokenizer
    if tokens.tokenizer.fingerprint != has.fingerprint:
        raise DataError(
            f"{path} was written with another tokenizer than the model's.",
            got=f"{tokens.tokenizer.kind} ({tokens.tokenizer.fingerprint[:8]})",
            expected=f"{has.kind} ({has.fingerprint[:8]})",
            hint="prepare the text with the tokenizer folder of the run",
        )
    return tokens
