"""A series of small models of several lengths of training, and the law L = E + A / N^alpha + B / D^beta through their losses.

    python benchmarks/scaling.py --text SOURCE [--workers 2] [--out runs/scaling.jsonl] [--draw docs/scaling.svg]

SOURCE is what `regpt prepare` takes, of which a byte-level BPE is trained, or a folder that it wrote. Every run is `regpt
train` in a process of one thread, with a rate schedule of its own length; the text should be so long that none sees it twice.
N is what a token meets in matrix products, D the tokens trained on, L nats a token over the whole validation split. The fit is
Hoffmann et al.'s third (2022, equation 10): the least Huber loss between the logarithms, from many beginnings. What is there
is not run again; --fit only fits. The printed laws are those of `train/sizing.py`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from regpt.config import ModelConfig, load_preset
from regpt.models.count import count_parameters
from regpt.train.sizing import Law

VOCAB = 1024  # of the byte-level BPE trained on the text
BLOCK = 128
BATCH_TOKENS = 2048
SIZES = ((2, 64), (2, 128), (3, 192), (4, 256))  # layers, channels
TOKENS = (2**18, 2**19, 2**20, 2**21)
MOST_FLOPS = 1.1e13  # 6 N D of one run
HUBER = 1e-3  # of the logarithms, as Hoffmann et al.
ARCHS = ("gpt2", "modern")
# `optim.lr` at 128 channels; it goes with 1 / sqrt(channels). What else the preset's recipe has stays as it is.
RATES = {"gpt2": 3e-3, "modern": 1e-2}


def settings(arch: str, layers: int, channels: int, tokens: int) -> dict[str, Any]:
    """Of one run, beside its text."""
    steps = tokens // BATCH_TOKENS
    rate = float(f"{RATES[arch] * math.sqrt(128 / channels):.2g}")
    shape = {"n-layer": layers, "n-head": channels // (64 if channels >= 192 else 32), "n-embd": channels}
    flags: dict[str, Any] = {f"model.{name}": value for name, value in shape.items()}
    flags |= {"model.block-size": BLOCK, "optim.lr": rate, "train.steps": steps}
    if arch == "modern":
        # A table of pairs would have a million rows.
        flags |= {"model.modern.bigram": "False", "optim.muon-momentum-steps": min(steps // 5, 300)}
    else:
        flags |= {"optim.min-lr": 0.0, "optim.warmup-steps": max(steps // 20, 10), "optim.schedule": "linear"}
        flags |= {"optim.decay-fraction": 0.8, "model.dropout": 0.0}
    return flags


def preset(arch: str) -> str:
    """Whose recipe is scaled."""
    return {"gpt2": "shakespeare-char-cpu", "modern": "modern-char"}[arch]


def size(arch: str, layers: int, channels: int) -> int:
    """N: the parameters in products."""
    config = load_preset(preset(arch)).config.model
    modern = dataclasses.replace(config.modern, bigram=False)
    shape = {"n_layer": layers, "n_head": 1, "n_embd": channels, "block_size": BLOCK, "modern": modern}
    model: ModelConfig = dataclasses.replace(config, **shape)
    return count_parameters(model, VOCAB).multiplied


def series(archs: list[str]) -> list[tuple[str, int, int, int]]:
    """Architecture, layers, channels, tokens of every run, the cheapest first."""
    runs = [
        (arch, layers, channels, tokens)
        for arch, (layers, channels), tokens in itertools.product(archs, SIZES, TOKENS)
        if 6 * size(arch, layers, channels) * tokens <= MOST_FLOPS
    ]
    return sorted(runs, key=lambda r: size(*r[:3]) * r[3])


def prepared(text: str, shards: Path) -> Path:
    """The text as shards, made unless they are there."""
    if (Path(text) / "manifest.json").exists():
        return Path(text).resolve()
    command = [sys.executable, "-m", "regpt", "prepare", text, "--out", str(shards), "--tokenizer", "bpe"]
    command += ["--vocab-size", str(VOCAB), "--val-fraction", "0.01"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return shards


def train(run: tuple[str, int, int, int], shards: Path, folder: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    arch, layers, channels, tokens = run
    flags = settings(*run) | {
        "data.source": shards,
        "tokenizer.name": shards / "tokenizer",
        "train.batch-tokens": BATCH_TOKENS,
        "train.threads": 1,
        "train.compile": "off",
        "eval.every": "none",
        "sample.tokens": 0,
        "track.log-every": 50,
        "save.keep": 1,
    }
    out = folder / f"{arch}-{layers}x{channels}-{tokens}"
    words = [word for k, v in flags.items() for word in (f"--{k}", str(v))]
    command = [sys.executable, "-m", "regpt", "train", preset(arch), "--out", str(out), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    entry = {"arch": arch, "layers": layers, "channels": channels, "n": size(arch, layers, channels)}
    if done.returncode:
        return entry | {"d": tokens, "failed": done.stderr.strip().splitlines()[-1][:300]}
    result = json.loads(done.stdout)
    return entry | {"d": result["tokens"], "loss": result["val_loss"], "bits": result["val_bits_per_byte"]}


def fit(points: list[dict[str, Any]]) -> tuple[Law, float]:
    """The law by L-BFGS on log L, from a grid of beginnings, and the root mean square of what it leaves of log L."""
    n, d, loss = (torch.tensor([p[k] for p in points], dtype=torch.float64) for k in ("n", "d", "loss"))

    def predicted(x: torch.Tensor) -> torch.Tensor:
        parts = torch.stack((x[0].expand(len(n)), x[1] - x[3] * n.log(), x[2] - x[4] * d.log()))
        return parts.logsumexp(dim=0)

    best: tuple[float, torch.Tensor] | None = None
    for e, a, b, power in itertools.product((-1.0, 0.0, 0.5), (0.0, 5.0, 10.0), (0.0, 5.0, 10.0), (0.3, 0.6)):
        x = torch.tensor([e, a, b, power, power], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([x], max_iter=500, line_search_fn="strong_wolfe")

        def closure(x: torch.Tensor = x, optimizer: torch.optim.LBFGS = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            error = torch.nn.functional.huber_loss(predicted(x), loss.log(), reduction="sum", delta=HUBER)
            error.backward()  # type: ignore[no-untyped-call]
            return error

        optimizer.step(closure)
        error = float(closure().detach())
        if math.isfinite(error) and (best is None or error < best[0]):
            best = error, x.detach()
    assert best is not None
    x = best[1]
    e, a, b = x[:3].exp().tolist()
    law = Law(
        name="fitted",
        e=e,
        a=a,
        b=b,
        alpha=float(x[3]),
        beta=float(x[4]),
        counts_embeddings=False,
        fitted=(float(n.min()), float(n.max())),
        source="",
    )
    return law, float((predicted(x) - loss.log()).square().mean().sqrt())


def held_out(points: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """The three runs of most computing: what a law of the others says of them, and what they reached."""
    largest = sorted(points, key=lambda p: p["n"] * p["d"])[-3:]
    law, _ = fit([p for p in points if p not in largest])
    return [(law.loss(p["n"], p["d"]), p["loss"]) for p in largest]


def draw(path: Path, entries: list[dict[str, Any]], laws: dict[str, Law]) -> None:
    """Loss over tokens, a line of the law for every size."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "regpt"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(laws), figsize=(5.2 * len(laws), 4), sharey=True, squeeze=False)
    for ax, (arch, law) in zip(axes[0], laws.items(), strict=True):
        points = [e for e in entries if e["arch"] == arch]
        for n in sorted({p["n"] for p in points}):
            own = sorted((p for p in points if p["n"] == n), key=lambda p: float(p["d"]))
            (line,) = ax.plot(
                [p["d"] for p in own], [p["loss"] for p in own], "o", label=f"N = {n / 1e6:.2f} M"
            )
            ds = [own[0]["d"] * 1.1**i for i in range(40) if own[0]["d"] * 1.1**i <= 1.05 * own[-1]["d"]]
            ax.plot(ds, [law.loss(n, d) for d in ds], color=line.get_color())
        ax.set(xscale="log", title=arch, xlabel="tokens trained on")
        ax.legend(frameon=False)
    axes[0][0].set_ylabel("held-out loss, nats a token")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run what is missing, fit, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True)
    parser.add_argument("--arch", default=",".join(ARCHS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling.jsonl"))
    parser.add_argument("--draw", type=Path, help="an SVG; needs matplotlib")
    parser.add_argument("--fit", action="store_true", help="run nothing")
    options = parser.parse_args()
    archs = options.arch.split(",")
    shards = prepared(options.text, options.out.with_suffix(".shards").resolve())
    recipes = [load_preset(preset(arch)).config for arch in archs]
    of = (shards / "manifest.json").read_bytes() + repr((recipes, RATES)).encode()
    digest = hashlib.sha256(of).hexdigest()[:12]  # runs of another text or recipe do not count
    entries = (
        [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    )
    entries = [e for e in entries if e["text"] == digest and "loss" in e]
    there = {(e["arch"], e["layers"], e["channels"], e["d"]) for e in entries}
    missing = [] if options.fit else [run for run in series(archs) if run not in there]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        concurrent.futures.ThreadPoolExecutor(options.workers) as pool,
    ):
        waiting = [pool.submit(train, run, shards, Path(folder)) for run in missing]
        for done in concurrent.futures.as_completed(waiting):
            entry = done.result() | {"text": digest}
            with options.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
            print(json.dumps(entry), file=sys.stderr, flush=True)
            entries += [entry] if "loss" in entry else []
    laws = {}
    for arch in archs:
        points = [e for e in entries if e["arch"] == arch]
        if len(points) < 8:
            print(f"{arch}: {len(points)} runs are too few for a law")
            continue
        law, off = fit(points)
        laws[arch] = law
        numbers = {k: getattr(law, k) for k in ("e", "a", "b", "alpha", "beta")} | {"off": off}
        print(f"{arch}, {len(points)} runs: " + ", ".join(f"{k} = {v:.4g}" for k, v in numbers.items()))
        told = ", ".join(f"{a:.3f} ({b:.3f})" for a, b in held_out(points))
        print(f"  the three largest by a law of the others, and as they came out: {told}")
        for p in sorted(points, key=lambda p: (p["n"], p["d"])):
            print(f"  {p['layers']} x {p['channels']}  N {p['n']:>9,}  D {p['d']:>9,}  loss {p['loss']:.4f}")
    if options.draw and laws:
        draw(options.draw, entries, laws)


if __name__ == "__main__":
    main()
