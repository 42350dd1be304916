"""What every command shares: its common flags, how its arguments are parsed, and where its words go.

Results go to standard output; progress, notes and errors to standard error. With --json standard output holds exactly
one JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from regpt.config import DEFAULT_PRESET, type_name
from regpt.durations import duration
from regpt.errors import ConfigError, UsageError, nearest

if TYPE_CHECKING:
    from rich.console import RenderableType

BAR_FRAMES_PER_S = 10.0
PLOT_FRAMES_PER_S = 2.0  # a plot of many lines flickers where it is drawn more often, over a slow connection


@dataclass(frozen=True, kw_only=True)
class CommonArgs:
    """The flags of every command."""

    json: bool = False
    """Print one JSON object on standard output, everything else on standard error."""
    quiet: bool = False
    """No progress and no notes on standard error."""
    debug: bool = False
    """Show tracebacks."""


T = TypeVar("T")
# What stands over tyro's boxes, in the frame or, without unicode, in the first line.
TITLES = {
    "Value error",
    "Invalid choice",
    "Missing argument",
    "Parsing error",
    "Unrecognized options",
    "Required options",
}


def options(make: type, prefix: str = "") -> dict[str, Any]:
    """The long options of an arguments class with their types: {"--json": bool, "--model.n-layer": int, …}."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(make, include_extras=True)
    for f in dataclasses.fields(make):
        kind: Any = hints[f.name]
        marks: list[Any] = []
        if typing.get_origin(kind) is typing.Annotated:
            kind, *marks = typing.get_args(kind)
        if "positional" in repr(marks).lower():
            continue
        if dataclasses.is_dataclass(kind):
            bare = any(getattr(m, "name", None) == "" for m in marks)
            found |= options(typing.cast(type, kind), prefix if bare else f"{prefix}{f.name}.")
        else:
            names = ["--" + (prefix + f.name).replace("_", "-")]
            names += [
                alias for m in marks for alias in getattr(m, "aliases", None) or () if alias.startswith("--")
            ]
            found |= dict.fromkeys(names, kind)
    return found


def parse(
    make: type[T], argv: Sequence[str], *, prog: str, description: str = "", default: T | None = None
) -> T:
    """`argv` as a `make`, parsed by tyro; its complaints become our own errors.

    Args:
        make: a frozen dataclass; attribute docstrings are its help.
        default: an instance whose values hold where `argv` says nothing (a preset).

    Raises:
        ConfigError: an unknown setting (the message names the nearest) or an unusable value.
    """
    import tyro

    extra: dict[str, Any] = {"config": (tyro.conf.FlagCreatePairsOff,)}
    if default is not None:
        extra["default"] = default
    complaint, known = io.StringIO(), options(make)
    try:
        with contextlib.redirect_stderr(complaint):
            made = tyro.cli(make, args=_normalised(argv, known), prog=prog, description=description, **extra)
            return typing.cast(T, made)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
    raise _error(complaint.getvalue(), argv, known, prog, has_preset=default is not None)


def _normalised(argv: Sequence[str], known: dict[str, Any]) -> list[str]:
    """`true` and `none` as tyro writes them, where the setting's type has them: --model.bias false -> False."""

    def value_of(option: str, value: str) -> str:
        kind = known.get(option.replace("_", "-"))
        kinds = (kind, *typing.get_args(kind))
        if "." not in option and str in kinds:  # free text: a prompt file may be called none
            return value
        words = {"true": "True", "false": "False"} if bool in kinds else {}
        if type(None) in kinds:
            words |= {"none": "None", "null": "None"}
        return words.get(value.lower(), value)

    out: list[str] = []
    for before, word in zip(["", *argv], argv, strict=False):
        name, equals, value = word.partition("=")
        out.append(f"{name}={value_of(name, value)}" if equals else value_of(before, word))
    return out


# What other tools and papers call our settings.
ELSEWHERE = {
    "learning-rate": "--optim.lr",
    "max-iters": "--train.steps",
    "max-steps": "--train.steps",
    "batch-size": "--train.micro-rows",
    "gradient-accumulation-steps": "--train.batch-tokens",
    "eval-interval": "--eval.every",
    "save-interval": "--save.every",
    "out-dir": "--out",
    "grad-clip": "--optim.clip-norm",
    "warmup-iters": "--optim.warmup-steps",
    "context-length": "--model.block-size",
    "max-tokens": "--max-new-tokens",
}


def _meant(option: str, known: dict[str, Any]) -> str | None:
    """The option that a wrong one most likely stands for: by its last word in full, by another tool's name, by spelling."""
    last = option.lstrip("-").rpartition(".")[2]
    same = [name for name in known if name.lstrip("-").rpartition(".")[2] == last]
    other = ELSEWHERE.get(last)
    if len(same) == 1 or (other is not None and other in known):
        return same[0] if len(same) == 1 else other
    return nearest(option, [*known, "--help"])


def _error(
    complaint: str, argv: Sequence[str], known: dict[str, Any], prog: str, *, has_preset: bool
) -> ConfigError | UsageError:
    """tyro's boxed complaint as one of our errors."""
    for word in argv:
        option = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and len(word) > 2 and option not in known and option != "--help":
            noun = "setting" if "." in option else "option"
            close = _meant(option, known)
            return ConfigError(
                f"there is no {noun} {option}.{f' Did you mean {close}?' if close else ''}",
                hint=f"{prog} --help",
            )
    lines: list[str] = []
    for line in complaint.splitlines():
        text = line.strip("│|╭╮╰╯+─- ") if set(line) <= set("+-|─│╭╮╰╯ ") else line.strip("│| ")
        if text.startswith(("Argument helptext", "For full helptext")):
            break
        if text.strip("─-╭╮╰╯+ ") and not line.startswith(("╭", "+")) and text.strip() not in TITLES:
            lines.append(text)
    said = " ".join(lines)
    if left := re.match(r"Unrecognized options: (\S+)", said):
        word = left[1]
        if has_preset and word in argv:
            others = list(argv)
            others.remove(word)
            return UsageError(
                f"unexpected argument {word!r}; a preset stands before every option.",
                hint=shlex.join([*prog.split(), word, *others]),
            )
        return UsageError(f"unexpected argument {word!r}.", hint=f"{prog} --help")
    named = re.search(r"(--[a-z][a-z0-9.-]*)", said)
    given = re.search(r"^invalid choice '([^']*)'|'([^']*)'\]?\.?$", said)
    if named and given and named[1] in known:
        value = given[1] if given[1] is not None else given[2]
        return ConfigError(
            f"{named[1]} cannot take this value.", got=repr(value), expected=type_name(known[named[1]])
        )
    kind = UsageError if "Missing" in said or "required" in complaint.lower() else ConfigError
    return kind(said or "the command line could not be understood.", hint=f"{prog} --help")


class Progress(Protocol):
    """A piece of work under way."""

    def update(self, done: float, note: str = "") -> None:
        """`done` of the total are finished; `note` stands behind the bar."""


def finite(values: Any) -> Any:
    """Values for JSON, with null for numbers that are not finite."""
    return json.loads(json.dumps(values), parse_constant=lambda name: None)


class Output:
    """Where a command's words go."""

    def __init__(self, args: CommonArgs) -> None:
        self.json, self.quiet = args.json, args.quiet

    def info(self, text: str = "") -> None:
        """A note to the person at the terminal, on standard error."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """A note that --quiet does not silence."""
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def result(self, values: dict[str, Any], text: str) -> None:
        """What was asked for, on standard output. In JSON a number that is not finite is null."""
        if self.json:
            text = json.dumps(finite(values), allow_nan=False)
        print(text, flush=True)

    @contextlib.contextmanager
    def progress(
        self, description: str, total: float, unit: str = "", *, above: RenderableType | None = None
    ) -> Iterator[Progress]:
        """A bar with percent and ETA on a terminal; elsewhere a plain line now and then; nothing with --quiet.

        Args:
            above: drawn over the bar, anew with each frame.
        """
        if self.quiet or not total:
            yield _Silent()
        elif sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            # The speed that the time left follows from is taken over an hour: one step may take minutes.
            console = Console(stderr=True)

            class Frame(RichProgress):
                def get_renderables(self) -> Iterator[RenderableType]:
                    yield from [] if above is None else [above]
                    yield self.make_tasks_table(self.tasks)

            frames_per_s = BAR_FRAMES_PER_S if above is None else PLOT_FRAMES_PER_S
            with Frame(
                *columns, console=console, speed_estimate_period=3600, refresh_per_second=frames_per_s
            ) as bar:
                yield _Bar(bar, bar.add_task(description, total=total, note=""))
        else:
            yield _Lines(description, total, unit)


class _Silent:
    def update(self, done: float, note: str = "") -> None:
        pass


class _Bar:
    def __init__(self, bar: Any, task: Any) -> None:
        self.bar, self.task = bar, task

    def update(self, done: float, note: str = "") -> None:
        self.bar.update(self.task, completed=done, note=note)


class _Lines:
    """One line at most every ten seconds, and one at the end."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.begun = self.said = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        if now - self.said < 10 and (done < self.total or now - self.begun < 2):
            return
        self.said = now
        left = (now - self.begun) * (self.total - done) / done if done else 0.0
        amount = f"{done:,.0f} of {self.total:,.0f} {self.unit}".strip()
        print(
            f"{self.description}: {amount}, {duration(left)} left {note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


def program() -> str:
    """How `regpt` can be called here: by its name, or by where it lies if it is not on the path."""
    script = Path(sys.argv[0])
    if shutil.which("regpt") or script.name != "regpt":
        return "regpt"
    with contextlib.suppress(ValueError):
        return str(script.absolute().relative_to(Path.cwd()))
    return str(script)


def preset_and_rest(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The preset that the command line names first, or the default one; and the other words."""
    if argv and not argv[0].startswith("-"):
        return argv[0], list(argv[1:])
    return DEFAULT_PRESET, list(argv)
