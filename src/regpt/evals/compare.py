"""A run's figures beside published ones: how far apart, whether that is more than chance, and why, where that is known.

Chance means two things. A share of right answers, or a perplexity over rows, is an estimate from so many rows: two of them
are told apart where the interval of their difference does not hold 0 (`chance.py`). A loss over a whole split is exact for
one run, and differs between runs that differ in nothing but the seed: it is told apart by the spread of such runs, where
somebody measured it. Where neither is known the answer is that nobody knows. And what is no measure of the same thing
(other text, other tokens, another held-out part, another rule) is not judged at all. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regpt.config import VAL_FRACTION
from regpt.evals.chance import NORMAL_95, Interval, ratio_interval, share_difference
from regpt.evals.figures import TaskResult
from regpt.evals.names import LOSS
from regpt.evals.published import LOWER_IS_BETTER, SHARES, Published, figures, nearest_gpt2

SAME_SIZE = 1.03  # times as large, at most: padding and biases do not make another size
ALIKE = 2.0  # times as large, at most: what stands beside a run where no GPT-2 was measured on its text
SAME_TOKENS = 0.02
# Settings that decide which targets a loss is the mean of: with others it is a loss of something else.
TARGETS = ("tokenizer.", "data.val_", "data.dedup")
Values = Mapping[str, Any]
"""Of one task, as `TaskResult.as_dict` gives them: NAME, NAME_stderr, rows."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What must be known of a run to compare it."""

    parameters: int
    corpus: str | None = None
    """What its validation loss is of: data.source."""
    tokenizer: str | None = None
    """What its tokens are, as `tokens_of` says it."""
    held_out: str | None = None
    """Which part of the text was held out, as `held_out` says it."""
    windows: tuple[int, int] | None = None
    """Of a loss: tokens in a window, and how far apart windows begin."""
    tokens: int | None = None
    """That it was trained on."""
    changed: Mapping[str, tuple[Any, Any]] | None = None
    """Settings that decide what is learned: the recipe's value, the run's."""


def tokens_of(kind: str, vocab_size: int) -> str:
    """A tokenizer as published.toml names it. Of one text there is one `chars`; of `bpe` there is one for every size."""
    return f"{kind} of {vocab_size:,}" if kind == "bpe" else kind


def held_out(data: Mapping[str, Any], own_split: str | None) -> str:
    """The held-out part that these settings (data.*) mean, as published.toml names it.

    Args:
        own_split: the validation split that a named set comes with.
    """
    if (source := data.get("val_source")) is not None:
        return f"{source} {data.get('val_split') or 'validation'}"
    fraction = data.get("val_fraction")
    split = data.get("val_split") or (own_split if fraction is None else None)
    return str(split) if split is not None else f"{VAL_FRACTION if fraction is None else fraction:g}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One published figure and the run's own."""

    published: Published
    ours: float | None
    """None: not evaluated."""
    stderr: float | None
    interval: Interval | None
    """Where the difference lies with 95 % confidence, by chance alone; None: nobody knows."""
    why: tuple[str, ...]
    """What makes the two differ, as far as it is known."""
    comparable: bool = True
    """Whether both measure the same thing, and something stands behind the published one."""

    @property
    def difference(self) -> float | None:
        """Ours minus theirs."""
        return None if self.ours is None else self.ours - self.published.value

    @property
    def within_noise(self) -> bool | None:
        """Whether chance explains the difference; None: nobody knows, or ours is no number."""
        if self.difference is None or self.interval is None:
            return None
        if not all(map(math.isfinite, (self.difference, *self.interval))):
            return None
        return self.interval[0] <= 0 <= self.interval[1]

    @property
    def better(self) -> bool | None:
        """Whether ours is; None: not evaluated, or no number."""
        if self.difference is None or not math.isfinite(self.difference):
            return None
        return (self.difference < 0) == (self.published.figure in LOWER_IS_BETTER) and self.difference != 0

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        p = self.published
        return {
            **{name: getattr(p, name) for name in ("model", "task", "figure")},
            "published": p.value,
            "ours": self.ours,
            "stderr": self.stderr,
            "difference": self.difference,
            "interval": self.interval,
            "comparable": self.comparable,
            "within_noise": self.within_noise,
            "why": list(self.why),
            **{name: getattr(p, name) for name in ("standing", "data", "method", "source")},
        }


def compare(
    published: Iterable[Published], ours: Mapping[str, Values], run: Run, skipped: Mapping[str, str]
) -> list[Comparison]:
    """Every published figure beside the run's own of the same name.

    Args:
        ours: figures by task.
        skipped: tasks that were not evaluated, and why.
    """
    return [_compared(p, ours.get(p.task), run, skipped) for p in published]


def _compared(p: Published, values: Values | None, run: Run, skipped: Mapping[str, str]) -> Comparison:
    if values is None or values.get(p.figure) is None:
        why = skipped.get(p.task, f"this evaluation gives no {p.figure}")
        return Comparison(published=p, ours=None, stderr=None, interval=None, why=(f"not evaluated: {why}",))
    stderr, ours = values.get(f"{p.figure}_stderr"), float(values[p.figure])
    comparable = p.trusted and p.comparable and not _other_targets(p, run)
    return Comparison(
        published=p,
        ours=ours,
        stderr=stderr,
        interval=_interval(p, ours, stderr, values.get("rows")) if comparable else None,
        why=tuple(_reasons(p, values, run)),
        comparable=comparable,
    )


def _interval(p: Published, ours: float, stderr: float | None, rows: int | None) -> Interval | None:
    """Where the difference lies, ours minus theirs; None: nobody knows."""
    if not math.isfinite(ours):
        return None
    if p.task == LOSS:
        if p.seed_sd is None:
            return None
        # Of one more run, from the mean of so many: a prediction interval.
        reach = NORMAL_95 * p.seed_sd * math.sqrt(1 + 1 / p.runs)
        return ours - p.value - reach, ours - p.value + reach
    if p.figure in SHARES:
        return share_difference(ours, rows, p.value, p.rows) if rows and p.rows else None
    if stderr is None or not math.isfinite(stderr) or ours <= 0:
        return None
    low, high = ratio_interval(ours, stderr, p.value, p.error)
    return p.value * (low - 1), p.value * (high - 1)


def _other_targets(p: Published, run: Run) -> list[str]:
    """Why a loss is the mean over other targets than the published one's; nothing where it is not, as far as is known."""
    if p.task != LOSS:
        return []
    found = []
    if p.corpus != run.corpus:
        found.append(f"other data: theirs is {p.data}, this run's is {run.corpus or 'not known'}")
    if p.tokenizer != run.tokenizer:
        found.append(f"other tokens: theirs are {p.tokenizer}, this run's {run.tokenizer or 'not known'}")
    if p.held_out is not None and p.held_out != run.held_out:
        found.append(
            f"another part held out: theirs is {p.held_out}, this run's {run.held_out or 'not known'}"
        )
    if run.windows is not None and p.context is not None and run.windows != (p.context, p.context):
        length, apart = run.windows
        found.append(
            f"other windows: theirs of {p.context:,} tokens, end to end, this run's of {length:,}, {apart:,} apart"
        )
    changed = [name for name in run.changed or () if name.startswith(TARGETS)]
    if changed and not found:
        found.append(f"other targets than the recipe's: {', '.join(changed)}")
    return found


def _reasons(p: Published, values: Values, run: Run) -> Iterable[str]:
    """What is known to make a figure differ, the weightiest first."""
    if not p.trusted:
        yield f"{p.standing}: {p.caveat}"
    elif not p.comparable:
        yield f"not comparable: {p.caveat}"
    if not math.isfinite(float(values[p.figure])):
        yield f"this run's {p.figure} is not finite"
    yield from _other_targets(p, run)
    if _ratio(p, run) > SAME_SIZE:
        yield f"another size: {count(run.parameters)} parameters, theirs {count(p.parameters)}"
    if run.tokens is not None and p.tokens is not None and abs(run.tokens / p.tokens - 1) > SAME_TOKENS:
        word = "fewer" if run.tokens < p.tokens else "more"
        yield f"{word} tokens: trained on {count(run.tokens)}, theirs on {count(p.tokens)}"
    if run.changed:
        told = ", ".join(f"{name} {new} instead of {old}" for name, (old, new) in run.changed.items())
        yield f"other settings than the recipe's: {told}"
    if p.rows is not None and values.get("rows") not in (None, p.rows):
        yield f"other rows: {values['rows']:,} of them, theirs {p.rows:,}"
    if p.trusted and p.comparable and p.caveat:
        yield p.caveat
    if p.task == LOSS and p.trusted and p.seed_sd is None:
        yield "no spread over seeds is known"
    elif p.task != LOSS and p.trusted and p.comparable and p.error is None:
        yield "its standard error was not published: taken as ours in proportion"


def count(n: int) -> str:
    """A number of tokens or parameters as a person says it: 124 M, 1.57 B."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return str(n)


# --- `regpt eval`: the published figures of the tasks that were evaluated ---------------------------------------------


def beside(ours: Mapping[str, Values], run: Run, *, every: bool = False) -> list[Comparison]:
    """Published figures to set beside those of `regpt eval`: of the GPT-2 nearest in size, or of every model.

    A loss is set beside those over the same targets alone: same text, same tokens, same part held out. Where that GPT-2
    has none, beside those of models of about its size.
    Where one figure was published twice the more comparable one stands for it, unless `every` asks for both.
    """
    near = nearest_gpt2(run.parameters)
    chosen = []
    for task, values in ours.items():
        found = [p for p in figures(task) if p.figure in values and not _other_targets(p, run)]
        if not every:
            of_gpt2 = [p for p in found if p.model == near]
            alike = [p for p in found if task == LOSS and p.trusted and _ratio(p, run) <= ALIKE]
            found = sorted(of_gpt2 or alike, key=lambda p: (not p.comparable, bool(p.caveat)), reverse=True)
            found = list({(p.model, p.figure): p for p in found}.values())
        chosen += found
    return compare(chosen, ours, run, {})


def _ratio(p: Published, run: Run) -> float:
    """How many times larger the larger of two models is."""
    return math.exp(abs(math.log(run.parameters / p.parameters)))


def columns(results: Iterable[TaskResult], found: Iterable[Comparison]) -> list[list[str]]:
    """The rows of the table of `regpt eval`, headings first: a run's figures, and a column for each model that has some."""
    found = list(found)
    models = list(dict.fromkeys(c.published.model for c in found))
    theirs = {(c.published.model, c.published.task, c.published.figure): c.published.value for c in found}
    rows = [["", "this run", "95 %", *models]]
    for result in results:
        for name, figure in result.figures.items():
            ends = figure.interval and ", ".join(written(name, end) for end in figure.interval)
            others = (theirs.get((m, result.task, name)) for m in models)
            rows.append(
                [
                    f"{result.task} {name}",
                    written(name, figure.value, figure.stderr),
                    f"[{ends}]" if ends else "",
                    *("" if v is None else written(name, v) for v in others),
                ]
            )
    return rows


def sources(found: Iterable[Comparison]) -> list[str]:
    """Where the figures come from and what stands against comparing them, a line each; what holds for all of them last."""
    found = list(found)
    shared = _shared(found)
    lines = [
        "; ".join([f"{_name(c)}: {c.published.source}", *(why for why in c.why if why not in shared)])
        for c in found
    ]
    return lines + [f"all of them: {why}" for why in shared]


# --- `regpt reproduce`: published, ours, the difference, and whether chance explains it -------------------------------

HEAD = ["", "published", "ours", "difference", "within noise?"]


def verdicts(found: Iterable[Comparison]) -> list[list[str]]:
    """The rows of the table, as words."""
    return [
        [
            f"{c.published.model}: {c.published.task} {c.published.figure}",
            written(c.published.figure, c.published.value)
            + ("" if c.published.trusted else f" ({c.published.standing})"),
            "not evaluated" if c.ours is None else written(c.published.figure, c.ours, c.stderr),
            "" if c.difference is None else f"{c.difference:+.4f}",
            _verdict(c),
        ]
        for c in found
    ]


def _verdict(c: Comparison) -> str:
    if c.difference is None:
        return ""
    if not math.isfinite(c.difference):
        return "not finite"
    if not c.comparable:
        return "not comparable"
    if c.within_noise is None:
        return "not known"
    assert c.interval is not None
    places = 2 if "perplexity" in c.published.figure else 4
    ends = ", ".join(f"{end:+.{places}f}" for end in c.interval)
    return ("yes" if c.within_noise else f"no: {'better' if c.better else 'worse'}") + f" [{ends}]"


def comparisons(found: Iterable[Comparison]) -> str:
    """Published, ours, the difference and the verdict, a line each."""
    return aligned([HEAD, *verdicts(found)])


def table(found: Iterable[Comparison]) -> str:
    """For a terminal, reasons below: what holds for all of them once."""
    found = list(found)
    shared = _shared(found)
    lines = [comparisons(found)]
    if shared:
        lines += ["why, for all of them", *(f"  {reason}" for reason in shared)]
    for c in found:
        if own := [reason for reason in c.why if reason not in shared]:
            lines += [f"why, {_name(c)}", *(f"  {reason}" for reason in own)]
    return "\n".join(lines)


def markdown(title: str, found: Iterable[Comparison]) -> str:
    """For a page: the table, then sources and reasons, those that hold for all of them first."""
    found = list(found)
    shared = _shared(found)
    rows = [HEAD, ["---"] * len(HEAD), *verdicts(found)]
    lines = [f"# {title}", "", *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows), ""]
    if shared:
        lines += ["Why they differ, for all of them:", "", *(f"- {reason}" for reason in shared), ""]
    for c in found:
        p = c.published
        lines.append(f"- **{_name(c)}** ({p.data}; {p.method}; {p.source})")
        lines += [f"  - {reason}" for reason in c.why if reason not in shared]
    return "\n".join(lines) + "\n"


def _shared(found: list[Comparison]) -> list[str]:
    """Reasons that every one of several comparisons has."""
    if len(found) < 2:
        return []
    return [reason for reason in found[0].why if all(reason in c.why for c in found)]


def _name(c: Comparison) -> str:
    p = c.published
    return f"{p.model}: {p.task} {p.figure} {written(p.figure, p.value)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def written(figure: str, value: float, stderr: float | None = None) -> str:
    """A figure for a person: shares and losses with four places, perplexities with two."""
    places = 2 if figure.endswith(("perplexity", "strided")) else 4
    return f"{value:.{places}f}" + (f" ± {stderr:.{places}f}" if stderr is not None else "")


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
