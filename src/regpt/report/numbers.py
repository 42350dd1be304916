"""What a report says in figures: each run's last and best, which settings differ, and seeds as mean and spread."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from regpt.report.history import History

# Settings that do not change what is learned, so that runs which differ only here are one group.
NEUTRAL = (
    *("track.", "save.", "sample.", "eval.micro_rows", "data.dir", "data.workers", "data.verify"),
    *("data.keep_downloads", "train.threads"),
)
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
    longest = max(series.values(), key=lambda s: s.step[-1], default=None)
    val = series.get("val_loss")
    best = None
    if val is not None and np.isfinite(val.value).any():
        best = int(np.nanargmin(val.value))
    tokens = float(longest.tokens[-1]) if longest else 0.0
    per_token = plan.get("flops_per_token")
    total = plan.get("steps")
    return {
        "run": str(history.path),
        "label": history.label,
        "preset": preset.get("name"),
        "seed": history.part("config").get("seed"),
        "step": history.last_step,
        "total_steps": total,
        "finished": isinstance(total, int) and history.last_step >= total,
        "tokens": round(tokens),
        "flops": tokens * per_token if isinstance(per_token, int | float) else None,
        "parameters": plan.get("parameters"),
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
        "cost": price * history.elapsed_s / 3600 if price is not None and history.elapsed_s else None,
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
    found: dict[str, Any] = {}

    def walk(part: dict[str, Any], prefix: str) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = value

    walk(history.part("config"), "")
    return found


def differing(histories: Sequence[History]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: {"optim.lr": [0.001, 0.003]}, in the order of the runs."""
    flats = [flat_settings(h) for h in histories]
    names = dict.fromkeys(name for flat in flats for name in flat)
    values = {name: [flat.get(name) for flat in flats] for name in names}
    return {name: v for name, v in values.items() if any(x != v[0] for x in v)}


def groups(histories: Sequence[History], price: float | None = None) -> list[dict[str, Any]]:
    """Runs that differ in nothing but the seed, each group with its figures as mean and spread.

    Returns:
        For each group: its runs' labels and seeds, `n` finished ones that are counted, and
        {figure: {"mean", "spread"}}, where spread is the sample standard deviation (n - 1), None for one run.
    """
    by_settings: dict[str, list[History]] = {}
    for history in histories:
        settings = flat_settings(history)
        kept = {k: v for k, v in settings.items() if k != "seed" and not k.startswith(NEUTRAL)}
        facts = history.part("facts")
        kept["data"] = facts.get("data_fingerprint")
        by_settings.setdefault(json.dumps(kept, sort_keys=True), []).append(history)
    return [_group(members, price) for members in by_settings.values()]


def _group(members: Sequence[History], price: float | None) -> dict[str, Any]:
    of_all = [summary(h, price) for h in members]
    counted = [s for s in of_all if s["finished"]] or of_all  # one that is on its way has no final figure
    figures = {name: _mean_and_spread([s[name] for s in counted]) for name in NUMBERS}
    scores: dict[str, list[Any]] = {}
    for s in counted:
        for task, of_task in s["tasks"].items():
            for figure, value in of_task.items():
                if figure.endswith("stderr"):  # of one run's rows: not a figure that seeds scatter
                    continue
                scores.setdefault(f"{task}.{figure}", []).append(value)
    figures |= {name: _mean_and_spread(v) for name, v in scores.items() if len(v) == len(counted)}
    return {
        "runs": [h.label for h in members],
        "seeds": [s["seed"] for s in of_all],
        "n": len(counted),
        "unfinished": sum(not s["finished"] for s in of_all),
        "figures": {k: v for k, v in figures.items() if v is not None},
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
