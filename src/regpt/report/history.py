"""What a run wrote of itself, read back as series over steps: a torn or foreign line is passed over and counted."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.errors import CheckpointError, UsageError
from regpt.evals.names import NOT_FIGURES
from regpt.train.run import RunDirectory, parse_line

Numbers = NDArray[np.float64]
OF_STEP = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "memory_bytes")
PLACED = ("tasks", "eval", "step")  # a step's own line counts last
OF_EVAL = ("val_loss", "val_bits_per_byte")
# Outside of these a number is none, or 0: what is added up, scaled and divided into ticks stays a float of full precision.
LARGEST, SMALLEST = 1e300, 1e-290


@dataclass(frozen=True, kw_only=True)
class Series:
    """One number over a run: four arrays [n] of float64, in the order of the steps."""

    step: Numbers
    tokens: Numbers
    """Trained on up to there."""
    time_s: Numbers
    """Of training steps, evaluations and saves left out."""
    value: Numbers
    """NaN where the log has null: it was not finite."""

    @property
    def last(self) -> float | None:
        """The last value; None where it is not finite."""
        return float(self.value[-1]) if np.isfinite(self.value[-1]) else None


@dataclass(frozen=True, kw_only=True)
class History:
    """One run, as its files have it."""

    path: Path
    label: str
    record: dict[str, Any]
    """run.json."""
    series: dict[str, Series]
    """By the log's own names: loss, val_loss, lr …; a task's figure is `hellaswag.acc_norm`."""
    samples: list[dict[str, Any]]
    """Each with step, prompt and text."""
    notes: list[tuple[int, str]]
    """What was said on the way, with its step."""
    elapsed_s: float | None
    """Of everything, over all sittings."""
    rows: dict[str, int]
    """Of each task, how many were scored last."""
    logged_total_steps: int | None
    """How many steps the run was to have when its last step was logged: with train.minutes that moves."""
    damaged_lines: int
    """Lines of log.jsonl that could not be read."""

    def part(self, name: str) -> dict[str, Any]:
        """A part of run.json (config, plan, machine …), empty where it has none."""
        part = self.record.get(name)
        return part if isinstance(part, dict) else {}

    @property
    def total_steps(self) -> int | None:
        """How many steps the run has when it is finished, as far as it says."""
        planned = self.part("plan").get("steps")
        return self.logged_total_steps or (planned if type(planned) is int else None)

    @property
    def flops_per_token(self) -> float | None:
        """As the model counts them; None where the record does not say, or says what cannot be."""
        each = finite(self.part("plan").get("flops_per_token"))
        tokens = max((float(np.abs(s.tokens).max()) for s in self.series.values()), default=0.0)
        return each if each is not None and abs(each) * tokens < LARGEST else None

    @property
    def last_step(self) -> int:
        """The last step that the log knows of."""
        return int(max((s.step[-1] for s in self.series.values()), default=0))


def read_histories(paths: Sequence[Path], *, may_be_empty: bool = False) -> list[History]:
    """The runs in `paths`, each with a name that no other has.

    Args:
        may_be_empty: take a run that has logged nothing yet.

    Raises:
        CheckpointError: no run is there, its record is damaged, or its log has nothing to show.
        UsageError: one run is given twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UsageError(f"the run {path} is given twice.", hint="name each run once")
        seen.add(path.resolve())
    labels = _labels([path.resolve() for path in paths])
    return [_read(path, label, may_be_empty) for path, label in zip(paths, labels, strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    """Of each path its last parts, as many as it takes to tell it from the others."""
    depth = [1] * len(paths)
    while True:
        names = ["/".join(p.parts[-d:]) for p, d in zip(paths, depth, strict=True)]
        same = [i for i, n in enumerate(names) if names.count(n) > 1 and depth[i] < len(paths[i].parts)]
        if not same:
            return names
        for i in same:
            depth[i] += 1


def _read(path: Path, label: str, may_be_empty: bool) -> History:
    run = RunDirectory(path)
    if not run.begun:
        what = f"{path} is not a run: it has no run.json." if path.exists() else f"there is no run at {path}."
        raise CheckpointError(what, expected="a folder that regpt train wrote", hint="regpt train --out DIR")
    record = run.read()
    entries, damaged = _lines(run.lines.path)
    if not entries and not may_be_empty:
        if damaged:
            what, hint = f"no line of {run.lines.path} can be read.", "put it back from a backup"
        else:
            what, hint = (
                f"the run {path} has logged nothing yet.",
                f"regpt report {path} --watch waits for it",
            )
        raise CheckpointError(what, got=f"{damaged} damaged lines" if damaged else None, hint=hint)
    series = _series(entries)
    if not series and not may_be_empty:
        raise CheckpointError(f"{run.lines.path} has no step and no evaluation.", hint="train it further")
    samples = [
        e for e in _lines(run.samples.path)[0] if all(isinstance(e.get(k), str) for k in ("prompt", "text"))
    ]
    notes = [
        (e["step"], e["text"]) for e in entries if e.get("event") == "note" and isinstance(e.get("text"), str)
    ]
    elapsed = [_number(e.get("elapsed_s")) for e in entries if e.get("event") in PLACED]
    totals = [n for e in entries if e.get("event") == "step" and type(n := e.get("total_steps")) is int]
    return History(
        path=path,
        label=label,
        record=record,
        series=series,
        samples=sorted(samples, key=lambda e: e["step"]),
        notes=notes,
        elapsed_s=max((e for e in elapsed if math.isfinite(e)), default=None),
        rows=_rows(entries),
        logged_total_steps=totals[-1] if totals else None,
        damaged_lines=damaged,
    )


def _lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Every whole line of a log, and how many others there are; one that is being written is neither."""
    try:
        raw = path.read_bytes() if path.exists() else b""
    except OSError as e:
        raise CheckpointError(f"{path} cannot be read: {e.strerror or e}.") from None
    whole = raw[: raw.rfind(b"\n") + 1].splitlines()
    entries = [entry for line in whole if (entry := parse_line(line)) is not None]
    return entries, len(whole) - len(entries)


def _number(value: object) -> float:
    """A JSON number as a float; NaN for whatever else, and for what is too large to be drawn."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return math.nan
    return 0.0 if abs(value) < SMALLEST else float(value)


def finite(value: object) -> float | None:
    """A number of a record, where it is one that can be reckoned with."""
    number = _number(value)
    return number if math.isfinite(number) else None


def _series(entries: Iterable[dict[str, Any]]) -> dict[str, Series]:
    """The log by name of number. Of two lines of one step the later counts."""
    by_event: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for entry in entries:
        if isinstance(event := entry.get("event"), str):
            by_event[event][entry["step"]] = entry
    # Every event that says how far training had come; of an older run, its steps alone.
    placed = {e["step"]: e for event in PLACED for e in by_event[event].values() if "tokens" in e}
    places = [placed[s] for s in sorted(placed)]
    clock = {
        k: np.array([0, *(_number(e.get(k)) for e in places)], np.float64)
        for k in ("step", "tokens", "time_s")
    }
    found: dict[str, Series] = {}

    def add(name: str, lines: Sequence[dict[str, Any]], values: Sequence[float]) -> None:
        if not np.isfinite(values).any():
            return
        at = np.array([e["step"] for e in lines], np.float64)
        tokens, time_s = (_at(at, clock["step"], clock[k]) for k in ("tokens", "time_s"))
        found[name] = Series(step=at, tokens=tokens, time_s=time_s, value=np.array(values, np.float64))

    for event, names in (("step", OF_STEP), ("eval", OF_EVAL)):
        for name in names:
            lines = [e for _, e in sorted(by_event[event].items()) if name in e]
            add(name, lines, [_number(e[name]) for e in lines])
    scored = [e for _, e in sorted(by_event["tasks"].items())]
    figures = {
        (task, figure): None
        for entry in scored
        for task, of_task in entry.items()
        if isinstance(of_task, dict)
        for figure in of_task
        if figure not in NOT_FIGURES
    }
    for task, figure in figures:
        lines = [e for e in scored if isinstance(e.get(task), dict) and figure in e[task]]
        add(f"{task}.{figure}", lines, [_number(e[task][figure]) for e in lines])
    return found


def _rows(entries: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Of each task, the rows that its last evaluation scored."""
    found: dict[str, int] = {}
    for entry in entries:
        if entry.get("event") == "tasks":
            found |= {
                t: of["rows"]
                for t, of in entry.items()
                if isinstance(of, dict) and type(of.get("rows")) is int
            }
    return found


def _at(step: Numbers, known_step: Numbers, known: Numbers) -> Numbers:
    """What the log's own steps say of `step`; between two of them on a straight line."""
    there = np.isfinite(known)
    return np.interp(step, known_step[there], known[there])
