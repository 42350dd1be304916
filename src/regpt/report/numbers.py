"""What a report says in figures: each run's last and best, which settings differ, and seeds as mean and spread."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from regpt.config import flat
from regpt.report.history import History, finite

NEUTRAL = (
    *("track.", "save.", "sample.", "eval."),
    # Where and how it is reckoned, which alters the rounding. Of the arithmetic the plan says what was taken.
    *("train.device", "train.micro_rows", "train.threads", "train.dtype", "train.compile", "train.reduction"),
    *("train.strategy", "train.shard_group", "train.checkpoint_activations"),
    # Where the text lies and how it is prepared; what it is says its fingerprint.
    *("data.dir", "data.workers", "data.verify", "data.keep_downloads", "tokenizer.files"),
)
"""Settings, or beginnings of their names, that do not change what is learned: runs that differ only here, or in the seed,
are one group. `FIXED` of train/session.py is another list: what a run may not change on its way. A learning rate is in
neither: a run may go on with another one, and learns otherwise."""
NUMBERS = {  # the name in --json: what a person reads
    "val_loss": "validation loss",
    "best_val_loss": "best validation loss",
    "val_bits_per_byte": "bits per byte",
    "train_loss": "training loss, last logged",
    "step": "steps",
    "tokens": "tokens",
    "flops": "FLOPs",
    "tokens_per_second": "tokens a second, median",
    "mfu": "MFU, median",
    "memory_bytes": "peak memory",
    "time_s": "training time",
    "elapsed_s": "with evaluations and saves",
    "cost": "cost",
}


def summary(history: History, price: float | None = None) -> dict[str, Any]:
    """The run in figures: what `regpt report --json` prints. None where the log does not say.

    Args:
        price: money an hour of the machine costs.
    """
    plan, series = history.part("plan"), history.series
    preset = history.part("preset")
    total = history.total_steps
    longest = max(series.values(), key=lambda s: s.step[-1], default=None)
    val = series.get("val_loss")
    best = None
    if val is not None and np.isfinite(val.value).any():
        best = int(np.nanargmin(val.value))
    tokens = float(longest.tokens[-1]) if longest else 0.0
    per_token = history.flops_per_token
    return {
        "run": str(history.path),
        "label": history.label,
        "preset": preset.get("name"),
        "seed": history.part("config").get("seed"),
        "step": history.last_step,
        "total_steps": total,
        "finished": total is not None and history.last_step >= total,
        "tokens": round(tokens),
        "flops": tokens * per_token if per_token is not None else None,
        "parameters": plan.get("parameters") if finite(plan.get("parameters")) is not None else None,
        "train_loss": _last(history, "loss"),
        "val_loss": _last(history, "val_loss"),
        "val_bits_per_byte": _last(history, "val_bits_per_byte"),
        "best_val_loss": float(val.value[best]) if val is not None and best is not None else None,
        "best_step": int(val.step[best]) if val is not None and best is not None else None,
        "tokens_per_second": _median(history, "tokens_per_second"),
        "mfu": _median(history, "mfu"),
        "memory_bytes": _highest(history, "memory_bytes"),
        "time_s": float(longest.time_s[-1]) if longest else None,
        "elapsed_s": history.elapsed_s,
        "cost": finite(price * history.elapsed_s / 3600) if price is not None and history.elapsed_s else None,
        "tasks": tasks(history),
        "damaged_lines": history.damaged_lines,
    }


def tasks(history: History) -> dict[str, dict[str, float | None]]:
    """The last figures of every task: {"hellaswag": {"acc_norm": 0.2945, …}}."""
    found: dict[str, dict[str, float | None]] = {}
    for name, series in history.series.items():
        task, dot, figure = name.partition(".")
        if dot:
            found.setdefault(task, {})[figure] = series.last
    return found


def _last(history: History, name: str) -> float | None:
    return history.series[name].last if name in history.series else None


def _median(history: History, name: str) -> float | None:
    return float(np.nanmedian(history.series[name].value)) if name in history.series else None


def _highest(history: History, name: str) -> float | None:
    return float(np.nanmax(history.series[name].value)) if name in history.series else None


def flat_settings(history: History) -> dict[str, Any]:
    """Every setting of the run under its dotted name; a later version of regpt may have others than this one."""
    return flat(history.part("config"))


def flat_figures(s: dict[str, Any]) -> dict[str, Any]:
    """All figures of a summary under one name each: {"val_loss": 3.1, "hellaswag.acc_norm": 0.2945, …}; None: it has none."""
    of_tasks = {
        f"{task}.{figure}": value
        for task, scores in s["tasks"].items()
        for figure, value in scores.items()
        if not figure.endswith("_stderr")  # of one run's rows: not a figure that seeds scatter
    }
    return {name: s[name] for name in NUMBERS} | of_tasks


def differing(histories: Sequence[History]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: {"optim.lr": [0.001, 0.003]}, in the order of the runs."""
    flats = [flat_settings(h) for h in histories]
    names = dict.fromkeys(name for flat in flats for name in flat)
    values = {name: [flat.get(name) for flat in flats] for name in names}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def groups(histories: Sequence[History], price: float | None = None) -> list[dict[str, Any]]:
    """Runs that differ in nothing but the seed, each group with its figures as mean and spread.

    Returns:
        For each group: its runs' labels and seeds; `n`, the runs that are counted: the finished ones, of one seed the last;
        how many are `unfinished` and how many `repeated`; {figure: {"mean", "spread"}}, empty where n is 0. The spread is
        the sample standard deviation (n - 1), None for one run.
    """
    by_settings: dict[str, list[History]] = {}
    for history in histories:
        settings = flat_settings(history)
        kept = {k: v for k, v in settings.items() if k != "seed" and not k.startswith(NEUTRAL)}
        kept["data"] = history.part("facts").get("data_fingerprint")
        kept["dtype"] = history.part("plan").get("dtype") or settings.get("train.dtype")
        by_settings.setdefault(json.dumps(kept, sort_keys=True), []).append(history)
    return [_group(members, price) for members in by_settings.values()]


def _group(members: Sequence[History], price: float | None) -> dict[str, Any]:
    of_all = [summary(h, price) for h in members]
    # One that is on its way has no final figure, and a seed that is run again gives the same one once more.
    finished = [(h, s) for h, s in zip(members, of_all, strict=True) if s["finished"]]
    of_seeds = {repr(s["seed"]): (h, s) for h, s in finished}
    counted = list(of_seeds.values())
    figures = [flat_figures(s) for _, s in counted]
    shared = [name for name in figures[0] if all(name in of for of in figures)] if figures else []
    alike = [name for name in shared if len({h.rows.get(name.partition(".")[0]) for h, _ in counted}) == 1]
    spreads = {name: _mean_and_spread([of[name] for of in figures]) for name in alike}
    return {
        "runs": [h.label for h in members],
        "seeds": [s["seed"] for s in of_all],
        "n": len(counted),
        "unfinished": len(members) - len(finished),
        "repeated": len(finished) - len(counted),
        "figures": {k: v for k, v in spreads.items() if v is not None},
    }


def _mean_and_spread(values: Sequence[Any]) -> dict[str, float | None] | None:
    """Mean and sample standard deviation; None where a run lacks the figure."""
    if any(not isinstance(v, int | float) or not math.isfinite(v) for v in values):
        return None
    return {"mean": statistics.fmean(values), "spread": statistics.stdev(values) if len(values) > 1 else None}


def cautions(histories: Sequence[History]) -> list[str]:
    """What makes the figures of these runs less comparable than they look."""

    def distinct(name: str) -> set[Any]:
        return {str(h.part("facts").get(name)) for h in histories}

    said: list[str] = []
    if len(distinct("tokenizer_fingerprint")) > 1:
        said.append(
            "These runs have different tokenizers, so their losses are per different tokens and cannot be compared. "
            "Bits per byte can."
        )
    elif len(distinct("data_fingerprint")) > 1:
        said.append(
            "These runs were trained and evaluated on different text: their losses are of different things."
        )
    for h in histories:
        if h.damaged_lines:
            said.append(f"{h.label}: {h.damaged_lines} damaged lines of its log were passed over.")
    return said


def report_values(histories: Sequence[History], price: float | None = None) -> dict[str, Any]:
    """Everything `regpt report --json` prints but the page's place."""
    values: dict[str, Any] = {"runs": [summary(h, price) for h in histories], "cautions": cautions(histories)}
    if len(histories) > 1:
        values |= {"differing": differing(histories), "groups": groups(histories, price)}
    return values
