"""Held-out loss over the time of training steps, of several runs, as an SVG. Needs matplotlib (the extra `bench`).

    python benchmarks/curves.py RUN[=LABEL] … --draw FILE [--line 1.898=LABEL] [--log]

The time is `time_s` of the log: of steps alone, without evaluations and samples. Evaluate often: --eval.every.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def curve(run: Path) -> tuple[list[float], list[float]]:
    """Seconds of training, and held-out losses."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    time_s = {e["step"]: e["time_s"] for e in lines if e["event"] == "step"}
    evals = [e for e in lines if e["event"] == "eval" and e["step"] in time_s]
    return [time_s[e["step"]] for e in evals], [e["val_loss"] for e in evals]


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--draw", type=Path, required=True)
    parser.add_argument("--line", default="", help="a loss to draw a line at")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis of time")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "regpt"
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(7, 4))
    for word in options.runs:
        path, _, label = word.partition("=")
        ax.plot(*curve(Path(path)), marker=".", label=label or Path(path).name)
    if options.line:
        loss, _, label = options.line.partition("=")
        ax.axhline(float(loss), color="gray", linestyle="dashed", linewidth=1, label=label)
    ax.set(xlabel="seconds of training steps", ylabel="held-out loss, nats a token")
    if options.log:
        ax.set_xscale("log")
    ax.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(options.draw, metadata={"Date": None})


if __name__ == "__main__":
    main()
