"""Whole-process time and whole-split loss of our presets beside nanoGPT's own code, in turn, in one run.

    python benchmarks/shakespeare_cpu.py --nanogpt CLONE --text tinyshakespeare.txt [--runs 3]
        [--presets "shakespeare-char-cpu, modern-char --train.steps 90"]

CLONE is a checkout of nanoGPT (github.com/karpathy/nanoGPT). Each run of ours has another seed. Each counted run is: prepare
the text, train (nanoGPT the 2,000 steps of its README's CPU recipe), save; start-up included. All models are then measured on
the same whole validation split, in windows of 64 that do not overlap, with the model's own code.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SEEDS = (1337, 1, 2, 3, 4)
NANOGPT_FLAGS = [
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--log_interval=1",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]

# Runs inside nanoGPT's folder with its own model; the checkpoint is a plain dictionary of tensors and numbers.
NANOGPT_LOSS = """
import numpy as np, torch
from model import GPT, GPTConfig
saved = torch.load("out/ckpt.pt", map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])); model.load_state_dict(saved["model"]); model.eval()
ids = torch.from_numpy(np.fromfile("data/shakespeare_char/val.bin", dtype=np.uint16).astype(np.int64))
total = count = 0
with torch.no_grad():
    for i in range(0, len(ids) - 1, 64):
        x, y = ids[i : i + 64], ids[i + 1 : i + 65]
        x = x[: len(y)]
        total += model(x[None], y[None])[1].item() * len(y); count += len(y)
print(total / count)
"""


def timed(command: list[str], folder: Path, env: dict[str, str]) -> tuple[float, float]:
    """Seconds and peak MiB of a whole process."""
    began = time.perf_counter()
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed; see {folder / 'log.txt'}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def nanogpt(clone: Path, text: Path, folder: Path) -> tuple[float, float, float]:
    """Seconds, peak MiB and whole-split loss of nanoGPT's own code."""
    shutil.copytree(clone, folder, ignore=shutil.ignore_patterns(".git", "assets"))
    shutil.copy(text, folder / "data/shakespeare_char/input.txt")
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    prepared, _ = timed([sys.executable, "data/shakespeare_char/prepare.py"], folder, env)
    trained, mib = timed(
        [sys.executable, "train.py", "config/train_shakespeare_char.py", "--out_dir=out", *NANOGPT_FLAGS],
        folder,
        env,
    )
    loss = subprocess.run(
        [sys.executable, "-c", NANOGPT_LOSS], cwd=folder, capture_output=True, text=True, check=True
    )
    return prepared + trained, mib, float(loss.stdout.split()[-1])


def ours(text: Path, folder: Path, preset: list[str], extra: list[str]) -> tuple[float, float, float]:
    """Seconds, peak MiB and whole-split loss of regpt."""
    folder.mkdir()
    command = [
        sys.executable,
        "-m",
        "regpt",
        "train",
        *preset,
        "--data.source",
        str(text.resolve()),
    ]
    seconds, mib = timed([*command, "--out", "run", *extra], folder, dict(os.environ))
    last = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return seconds, mib, [line for line in last if line.get("event") == "eval"][-1]["val_loss"]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--presets", default="shakespeare-char-cpu", help="each with its settings, with commas between"
    )
    args, extra = parser.parse_known_args()
    presets = [name.strip() for name in args.presets.split(",")]
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("nanoGPT", *presets)}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(args.runs):
            rows["nanoGPT"].append(nanogpt(args.nanogpt, args.text, Path(scratch) / f"nanogpt-{i}"))
            for preset in presets:
                flags = ["--seed", str(SEEDS[i % len(SEEDS)]), *extra]
                rows[preset].append(ours(args.text, Path(scratch) / f"{preset}-{i}", preset.split(), flags))
            for name in rows:
                s, mib, loss = rows[name][-1]
                print(f"run {i + 1}  {name:<20} {s:7.1f} s  {mib:6.0f} MiB  loss {loss:.4f}", flush=True)
    for preset in presets:
        ratios = [n[0] / r[0] for n, r in zip(rows["nanoGPT"], rows[preset], strict=True)]
        each = ", ".join(f"{x:.2f}" for x in ratios)
        print(f"nanoGPT's time over that of {preset}: {each}; median {statistics.median(ratios):.2f}")
    for name, values in rows.items():
        losses = [v[2] for v in values]
        print(
            f"{name}: loss median {statistics.median(losses):.4f}, {min(losses):.4f} to {max(losses):.4f}; "
            f"peak {statistics.median(v[1] for v in values):.0f} MiB"
        )


if __name__ == "__main__":
    main()
