"""Runs as files, without training: a record and a log with the numbers that a test chooses."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from regpt.config import Config, TokenizerConfig, to_dict

TOKENS = 2048
EXTREMES = (
    *(
        0.0,
        -0.0,
        5e-324,
        -5e-324,
        1e-310,
        2.2250738585072014e-308,
        1e-300,
        1e-290,
        1e-200,
        -1.0,
        1.0,
        1 + 2**-52,
    ),
    *(1e12, 2**53, 2**64, 1e290, 1e299, 1e300, -1e300, 1.7e308, -1.7e308, 10**400, -(10**400)),
    *(math.inf, -math.inf, math.nan, None, True, "", "x", [], {}),
)
"""Values that break what reckons with numbers, or that are none."""


def steps(n: int, *, every: int = 1, loss: float = 6.0) -> list[dict[str, Any]]:
    """`n` step lines, whose loss falls as 1/√step."""
    return [
        {
            "event": "step",
            "step": s,
            "loss": loss / s**0.5,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "tokens": s * TOKENS,
            "tokens_per_second": 1000.0,
            "time_s": s * 2.0,
            "elapsed_s": s * 3.0,
            "memory_bytes": 2**30,
        }
        for s in range(every, n * every + 1, every)
    ]


def evaluation(step: int, loss: float) -> dict[str, Any]:
    """One line of an evaluation."""
    return {"event": "eval", "step": step, "val_loss": loss, "val_bits_per_byte": loss / 2}


def write_run(
    folder: Path,
    entries: Iterable[dict[str, Any]],
    *,
    samples: Iterable[dict[str, Any]] = (),
    total_steps: int = 10,
    fingerprint: str = "aa",
    config: Config | None = None,
    **changes: Any,
) -> Path:
    """A run in `folder`; `changes` go into its settings by section: optim={"lr": 1}."""
    settings = to_dict(config or Config(tokenizer=TokenizerConfig(name="bytes")))
    for name, value in changes.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    record = {
        "format": 1,
        "sittings": ["2026-01-01T00:00:00+00:00"],
        "config": settings,
        "preset": {"name": "demo", "differs": {"optim.lr": [0.002, 0.001]}},
        "plan": {
            "steps": total_steps,
            "flops_per_token": 1000,
            "parameters": 124_000_000,
            "vocab_size": 256,
            "epochs": 1.5,
        },
        "facts": {"tokenizer_fingerprint": fingerprint, "data_fingerprint": "dd", "tokens": {"train": 12345}},
        "machine": {"name": "a machine", "memory_bytes": 2**34, "threads": 2},
        "versions": {"regpt": "0.1.0", "torch": "2.13", "commit": "abc"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    for name, lines in (("log.jsonl", entries), ("samples.jsonl", samples)):
        (folder / name).write_text("".join(json.dumps(e) + "\n" for e in lines), encoding="utf-8")
    return folder


def extreme_run(folder: Path, rng: random.Random) -> Path:
    """A run some of whose numbers are of EXTREMES, or of any size, next to ordinary ones."""
    share = rng.random()

    def value() -> object:
        return (
            rng.choice(EXTREMES)
            if rng.random() < share
            else rng.uniform(-3, 3) * 10 ** rng.randint(-320, 300)
        )

    scored: dict[str, Any] = {"event": "tasks", "step": 4, "x": {}}
    scored["x"] = {"acc": value(), "acc_stderr": value(), "rows": value()}
    lines = [*steps(4), evaluation(4, 1.0), scored]
    for line in lines:
        line |= {k: value() for k in line if k not in ("event", "step", "x") and rng.random() < 0.7}
    write_run(folder, lines)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for part in ("plan", "machine", "facts"):
        record[part] = {k: value() if rng.random() < share / 2 else v for k, v in record[part].items()}
    (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return folder
