"""What the fault tests share: the run that is disturbed, and what two runs must have in common to the bit."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regpt.config import Config, SaveConfig


def exact(config: Config, **train: Any) -> Config:
    """With train settings, each rank on one thread, and sums in an order that any number of ranks keeps."""
    changed = dataclasses.replace(config.train, threads=1, micro_rows=2, reduction="exact", **train)
    return dataclasses.replace(config, train=changed, save=SaveConfig(keep=2, every=2))


def entries(out: str | Path, *events: str) -> list[dict[str, Any]]:
    """The lines of the log of these events, in order."""
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] in events]


def outcome(out: str | Path) -> tuple[list[tuple[str, int, str]], bytes, bytes]:
    """Every loss to the bit, each once and in order, and the last weights and moments."""
    losses = [
        (e["event"], e["step"], e.get("loss_hex") or e["val_loss_hex"]) for e in entries(out, "step", "eval")
    ]
    last = Path(out) / "checkpoints" / f"step-{losses[-1][1]:06d}"
    return losses, (last / "model.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()


def debris(out: str | Path) -> list[str]:
    """What stands among the checkpoints and is none."""
    return [p.name for p in (Path(out) / "checkpoints").iterdir() if not p.name.startswith("step-")]


def steps(out: str | Path) -> Sequence[int]:
    """Checkpoints that are there, by step."""
    return sorted(int(p.name.removeprefix("step-")) for p in (Path(out) / "checkpoints").glob("step-*"))
