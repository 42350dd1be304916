"""What `train.reduction=exact` costs: the same training on the same ranks, summed in PyTorch's order and in ours, in turn.

    python benchmarks/reduction.py --text tinyshakespeare.txt

Each pair is two whole `regpt train --nproc` runs; a run counts as the median time of its steps after the first ten. Printed
is the ratio exact / fast of every pair and their median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {  # layers, channels, heads, context, rows of a micro-batch, micro-batches a rank, steps
    "4 x 128": (4, 128, 4, 64, 16, 2, 120),
    "6 x 384": (6, 384, 6, 128, 8, 2, 30),
}


def main() -> None:
    """Print one table."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--text", required=True, type=Path)
    arguments.add_argument("--nproc", type=int, default=2)
    arguments.add_argument("--pairs", type=int, default=5)
    options = arguments.parse_args()
    print(f"{options.nproc} ranks, {options.pairs} pairs in turn\n")
    print("| model | exact / fast, each pair | median |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in SHAPES.items():
            ratios = []
            for pair in range(options.pairs):
                order = ("fast", "exact") if pair % 2 == 0 else ("exact", "fast")
                took = {r: step_s(r, shape, options, Path(folder) / f"{name}-{pair}-{r}") for r in order}
                ratios.append(took["exact"] / took["fast"])
            each = ", ".join(f"{r:.2f}" for r in ratios)
            print(f"| {name} | {each} | {statistics.median(ratios):.2f} |", flush=True)


def step_s(reduction: str, shape: tuple[int, ...], options: argparse.Namespace, out: Path) -> float:
    """The median time of a step of one run."""
    n_layer, n_embd, n_head, block, rows, n_micro, steps = shape
    settings = {
        "data.source": options.text.resolve(),
        "tokenizer.name": "chars",
        "data.dir": out.parent / "shards",
        "model.n_layer": n_layer,
        "model.n_embd": n_embd,
        "model.n_head": n_head,
        "model.block_size": block,
        "train.batch_tokens": options.nproc * rows * n_micro * block,
        "train.micro_rows": rows,
        "train.steps": steps,
        "train.reduction": reduction,
        "eval.every": "none",
        "sample.tokens": 0,
        "optim.warmup_steps": 1,
        "track.log_every": 1,
    }
    command = [sys.executable, "-m", "regpt", "train", "demo", "--nproc", str(options.nproc), "--quiet"]
    command += ["--out", str(out)]
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.median(
        settings["train.batch_tokens"] / e["tokens_per_second"]
        for e in lines
        if e["event"] == "step" and e["step"] > 10
    )


if __name__ == "__main__":
    main()
