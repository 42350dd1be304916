"""Train a model: prepare the text if needed, train, evaluate, sample. The same command again continues a stopped run."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from regpt.cli.parse import CommonArgs, Output, parse, preset_and_rest, program
from regpt.config import Config, load_preset
from regpt.durations import duration
from regpt.errors import Interrupted, TrainingDiverged
from regpt.evals.names import HEADLINES
from regpt.paths import user_path
from regpt.report.terminal import LossPlot


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt train [PRESET]`."""

    out: str | None = None
    """The run directory. None: runs/<preset>."""
    fresh: bool = False
    """Begin anew; what stands in the run directory is moved aside."""
    nproc: int = 1
    """Processes on this machine: one for each GPU, as torchrun would start them. Several machines: torchrun itself."""
    no_plot: bool = False
    """No plot of the loss over the progress bar. There is one on a terminal only, of 32 x 14 characters or more."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=Config
    )


def main(argv: list[str]) -> int:
    """`regpt train`."""
    name, rest = preset_and_rest(argv)
    preset = load_preset(name)
    args = parse(
        Args,
        rest,
        prog="regpt train",
        description=f"{__doc__}\n\nPreset {preset.name}: {preset.about.summary}. Other presets: regpt presets",
        default=Args(config=preset.config),
    )
    if args.nproc != 1 and "RANK" not in os.environ:
        from regpt.train.launch import launch

        return launch(args.nproc, ["train", *argv])
    out = user_path(args.out or f"runs/{preset.name}")
    main_rank = (
        os.environ.get("RANK", "0") == "0"
    )  # the others are not heard, unless something is wrong with them
    heard = args if main_rank else dataclasses.replace(args, quiet=True)
    screen = Screen(Output(heard), args.config, plot=not args.no_plot)
    screen.out.info(f"regpt train {preset.name}: {preset.about.summary}")
    from regpt.train.session import train  # torch only from here on

    with screen:
        try:
            result = train(args.config, out, fresh=args.fresh, preset=preset, listen=screen.hear)
        except (Interrupted, TrainingDiverged):
            if main_rank:
                write_run_report(out, screen.out)
            raise
    if not main_rank:
        return 0
    report = write_run_report(out, screen.out)
    lines = [f"trained {result.step} steps on {result.tokens:,} tokens in {duration(result.seconds)}"]
    if result.val_loss is not None:
        lines[0] += f"; validation loss {result.val_loss:.4f}, {result.val_bits_per_byte:.4f} bits per byte"
    if not screen.sampled and (
        sample := last_sample(out)
    ):  # a finished run, called again, still ends with its text
        lines.insert(0, sample)
    lines += [
        f"the run lies in {out}" + (f", its report in {report}" if report else ""),
        f"next:  {program()} sample {shlex.quote(str(out))}{_some_prompt(args.config)}",
    ]
    screen.out.result(dataclasses.asdict(result), "\n".join(lines))
    return 0


def write_run_report(run: Path, out: Output) -> Path | None:
    """report.html in the run, as far as it came. A report that fails is a note: what was trained is safe."""
    if not (run / "log.jsonl").exists():  # it ended before the first step
        return None
    from regpt.report.history import read_histories
    from regpt.report.write import report_place, write_report

    try:
        place = report_place([run], None)
        write_report(read_histories([run]), place)
    except Exception as e:  # whatever it is, the training was not at fault
        out.warn(f"the run has no report: {e}")
        return None
    return place


def last_sample(run: Path) -> str:
    """The last text that the run generated while it was trained; empty if there is none."""
    from regpt.train.run import JsonLines

    entries = list(JsonLines(run / "samples.jsonl").entries())
    return quoted(entries[-1]) if entries else ""


def quoted(sample: dict[str, Any]) -> str:
    """A generated text, each line marked."""
    text = (sample["prompt"] + sample["text"]).strip("\n")
    return "\n".join("  | " + line for line in text.splitlines())


def _headline(task: str, figures: dict[str, Any]) -> str:
    """The figure that stands for a task, with its standard error; `regpt eval` and the log have all of them."""
    name = HEADLINES[task]
    error = figures.get(f"{name}_stderr")
    return f"{name} {figures[name]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _some_prompt(config: Config) -> str:
    """Of the run's own kind; nothing where it begins documents."""
    prompt = config.sample.prompt.strip()
    return f" {shlex.quote(prompt)}" if prompt else ""


def _room_for_a_plot(out: Output) -> bool:
    """Whether a frame can be drawn again and again in place, for a person who wants words."""
    return (
        not (out.quiet or out.json)
        and sys.stderr.isatty()
        and os.environ.get("TERM") not in ("dumb", "unknown")
    )


class Screen:
    """Turns the events of a run into words on standard error: a live bar on a terminal, plain lines elsewhere."""

    LINE_EVERY_S = 5.0

    def __init__(self, out: Output, config: Config, *, plot: bool = True) -> None:
        self.out, self.config = out, config
        self.plot = LossPlot() if plot and _room_for_a_plot(out) else None
        self.bar: Any = None
        self.bar_context: Any = None
        self.last_line = 0.0
        self.described = ""
        self.sampled = False
        self.rate_at: tuple[int, float] | None = None

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *what: object) -> None:
        self._close_bar()

    def hear(self, event: str, step: int, values: dict[str, Any]) -> None:
        """One event of the run."""
        if self.plot is not None:
            self.plot.hear(event, step, values)
        handler = getattr(self, f"on_{event}", None)
        if handler is not None:
            handler(step, values)

    def on_note(self, step: int, values: dict[str, Any]) -> None:
        self.out.warn(values["text"])

    def on_info(self, step: int, values: dict[str, Any]) -> None:
        self.out.info(values["text"])

    def on_progress(self, step: int, values: dict[str, Any]) -> None:
        """Preparation: values are description, done, total, unit."""
        if values["description"] != self.described:
            self._close_bar()
            self._open_bar(values["description"], values["total"], values["unit"])
            self.described = values["description"]
        self.bar.update(values["done"])

    def on_plan(self, step: int, values: dict[str, Any]) -> None:
        from regpt.cli.plan import describe

        self._close_bar()
        found = dataclasses.replace(self.config.eval, tasks=",".join(values["tasks"]) or None)
        config = dataclasses.replace(self.config, eval=found)  # without what could not be downloaded
        self.out.info(describe(config, values["plan"], values["machine"], values["shards"]))

    def on_resume(self, step: int, values: dict[str, Any]) -> None:
        if self.plot is not None:
            from regpt.train.run import RunDirectory

            self.plot.read(RunDirectory(Path(values["run"])).lines.entries())
        if step >= values["total_steps"]:
            longer = "--train.steps N" if self.config.train.minutes is None else "--train.minutes N"
            self.out.info(
                f"{values['run']} is finished (step {step}); {longer} goes on, --fresh begins anew."
            )
        else:
            self.out.info(f"continuing {values['run']} from step {step}.")

    def on_step(self, step: int, values: dict[str, Any]) -> None:
        total, minutes = values["total_steps"], self.config.train.minutes
        if self.bar is None and sys.stderr.isatty():
            amount, unit = (total, "steps") if minutes is None else (60 * minutes, "s")
            self._open_bar("training", amount, unit, above=self.plot)
        numbers = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tok/s"
        if "mfu" in values:
            numbers += f"  MFU {values['mfu']:.1%}"
        numbers += f"  {values['memory_bytes'] / 2**30:.2f} GiB"
        if self.bar is not None:
            self.bar.update(step if minutes is None else values["elapsed_s"], numbers)
            return
        now, last = time.monotonic(), step == total
        if self.rate_at is None:
            self.rate_at = (step, now)
        elif now - self.last_line < self.LINE_EVERY_S and not last:
            return
        self.last_line = now
        first, began = self.rate_at
        left = ""
        if step > first and not last:
            left = f"  {duration((now - began) / (step - first) * (total - step))} left"
        self.out.info(f"step {step:>6}/{total}  {numbers}  lr {values['lr']:.2e}{left}")

    def on_eval(self, step: int, values: dict[str, Any]) -> None:
        best = "  best so far" if values["best"] else ""
        self.out.info(
            f"step {step:>6}  validation loss {values['val_loss']:.4f}  "
            f"perplexity {values['val_perplexity']:,.2f}  {values['val_bits_per_byte']:.4f} bits per byte{best}"
        )

    def on_tasks(self, step: int, values: dict[str, Any]) -> None:
        for task, figures in values.items():
            if isinstance(figures, dict):
                self.out.info(f"step {step:>6}  {task} {_headline(task, figures)}")

    def on_sample(self, step: int, values: dict[str, Any]) -> None:
        self.sampled = True
        self.out.info(quoted(values))

    def _open_bar(self, description: str, total: float, unit: str, *, above: LossPlot | None = None) -> None:
        self.bar_context = self.out.progress(description, total, unit, above=above)
        self.bar = self.bar_context.__enter__()

    def _close_bar(self) -> None:
        if self.bar_context is not None:
            self.bar_context.__exit__(None, None, None)
        self.bar = self.bar_context = None
