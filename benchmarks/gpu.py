"""What regpt does on a GPU, correctness first, in one call for each part and one table.

    python benchmarks/gpu.py checks                                     # tests/gpu, which need pytest
    python benchmarks/gpu.py steps --nanogpt CLONE [--rounds 3] [--rows 32] [--micro-batches 16]
    python benchmarks/gpu.py losses --data SHARDS [--shares 0.2,0.25,0.35] [--batch-tokens 65536]

checks   tests/gpu on the device; nothing else is worth a table before they pass.
steps    a step of GPT-2 124M of 0.5 M tokens, compiled, in bfloat16, nanoGPT's own code and ours in turn: tokens a second,
         share of a matrix product's rate that was measured here, peak memory (benchmarks/train_peers.py). And the largest
         micro-batch that `regpt plan` finds to fit.
losses   faithful GPT-2 124M with AdamW for one pass of the text, then modern-124m for shares of its tokens, smallest first,
         until one ends at its loss or below: tokens and seconds of steps of both. Same data, same call.

--device cpu --small tries every part without a GPU, on a model that says nothing of speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SMALL = {"model.n-layer": 2, "model.n-head": 2, "model.n-embd": 64, "model.block-size": 64}
BASELINE, MODERN = "gpt2-124m-fineweb-edu", "modern-124m"
WARM_UP_SHARE = 0.04  # of the baseline's steps: 715 of 19,073 in its recipe


def call(*words: str) -> str:
    """What a program of ours prints on standard output; its standard error is shown. Exits where it fails."""
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}")
    return done.stdout


def checks(args: argparse.Namespace) -> None:
    """tests/gpu; on CUDA nothing may be skipped for want of a device."""
    said = call("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(HERE.parent / "tests" / "gpu"))
    print(said)
    if args.device == "cuda" and "no CUDA device" in said:
        raise SystemExit("no CUDA device: nothing of it was checked.")


def steps(args: argparse.Namespace) -> None:
    """The table of peers, compiled, and what fits."""
    peers = "regpt,nanogpt" if args.nanogpt else "regpt"
    words = ["--shape", "tiny" if args.small else "124m", "--peers", peers, "--rounds", str(args.rounds)]
    words += ["--dtypes", "bfloat16", "--rows", str(args.rows), "--micro-batches", str(args.micro_batches)]
    words += [] if args.small else ["--compile"]
    words += ["--nanogpt", str(args.nanogpt)] if args.nanogpt else []
    words += ["--steps", str(args.steps)] if args.steps else []
    print(call(str(HERE / "train_peers.py"), *words))
    largest = regpt("plan", BASELINE, args, {})["micro_rows"]
    print(f"the largest micro-batch that fits, as planned: {largest} rows of 1,024")


def regpt(command: str, preset: str, args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The JSON of a command of ours."""
    settings = settings | {"train.device": args.device} | (SMALL if args.small else {})
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    found: dict[str, Any] = json.loads(call("-m", "regpt", command, preset, "--json", *words))
    return found


def losses(args: argparse.Namespace) -> None:
    """One pass by the baseline, then the modern recipe until it is as good."""
    tokens = json.loads((args.data / "manifest.json").read_text())["splits"]["train"]["tokens"]
    whole = tokens // args.batch_tokens
    common = {
        "data.source": args.data,
        "train.batch-tokens": args.batch_tokens,
        "save.every": "none",
        "eval.tasks": "none",
    }
    with tempfile.TemporaryDirectory() as folder:

        def trained(preset: str, name: str, n: int, more: dict[str, Any]) -> dict[str, Any]:
            settings = common | {"train.steps": n, "eval.every": max(n // 8, 1)} | more
            found = regpt("train", preset, args, {"out": f"{folder}/{name}"} | settings)
            print(
                f"{name:<24} {found['step']:6,} steps  {found['tokens'] / 1e6:8.1f} M tokens  "
                f"{found['seconds']:8.1f} s of steps  loss {found['val_loss']:.4f}",
                flush=True,
            )
            return found

        base = trained(BASELINE, "gpt2, AdamW", whole, {"optim.warmup-steps": int(WARM_UP_SHARE * whole)})
        for share in args.shares:
            n = max(int(share * whole), 1)
            found = trained(MODERN, f"modern, {share:g} of it", n, {"optim.muon-momentum-steps": n // 4})
            if found["val_loss"] <= base["val_loss"]:
                print(
                    f"as good after {found['tokens'] / base['tokens']:.2f} of the tokens and "
                    f"{found['seconds'] / base['seconds']:.2f} of the time"
                )
                return
    print("not reached within these shares")


def main(argv: Sequence[str] | None = None) -> None:
    """One part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["checks", "steps", "losses"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a model that says nothing of speed")
    parser.add_argument("--nanogpt", type=Path, help="a clone of github.com/karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--data", type=Path, help="shards that regpt prepare wrote, with a validation split")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    parser.add_argument(
        "--shares", type=lambda text: [float(s) for s in text.split(",")], default=[0.2, 0.25, 0.35, 0.5]
    )
    args = parser.parse_args(argv)
    if args.part == "losses" and args.data is None:
        parser.error("losses needs --data")
    {"checks": checks, "steps": steps, "losses": losses}[args.part](args)


if __name__ == "__main__":
    main()
