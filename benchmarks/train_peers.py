"""Training steps of peers and of regpt, in turn, in one run: time, tokens, share of the machine, memory.

    python benchmarks/train_peers.py --shape 4x128 --nanogpt CLONE [--rounds 3] [--dtypes float32,bfloat16] [--compile]
        [--rows N] [--micro-batches N] [--dropout P] [--steps N] [--threads N] [--path DIR …]
        [--peers regpt,nanogpt,transformers,litgpt] [--json FILE]

Each figure is of a process of its own; processes follow one another in turn, as often as --rounds says, and medians are shown.
All train the same shape on batches of the same size, cut from the same random ids, with weights in float32 and products in
the dtype named (autocast for bfloat16): forward and backward passes of each micro-batch, gradient norm clipped at 1, AdamW.
Three steps warm up; then as many are timed as --steps says, or as take ten seconds (at least five).

regpt         `regpt bench train`, model.arch=gpt2, without biases
nanogpt       model.py and configure_optimizers of CLONE (github.com/karpathy/nanoGPT), and the loop of its train.py; no biases
transformers  GPT2LMHeadModel under Hugging Face's Trainer, with its defaults; it has biases (needs `accelerate`)
litgpt        its GPT in a plain loop, with the loss, clipping and optimizer of its pretrain.py; rotary positions and a head of
              its own, as it has no others; no dropout, so it is left out where there is some

Vocabularies as each has them: 65 characters, which regpt rounds up to 128 rows, or 50,304. The share of the machine is by the
same FLOPs for all, 6 N + 12 L C T a token, over the rate of a square product in that dtype, which `regpt bench` measures.
Peers that are not installed are left out with a word. --path adds a folder of packages for the peers alone, as `pip install
--no-deps --target DIR litgpt lightning lightning-utilities torchmetrics jsonargparse accelerate psutil` makes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_STEPS, LEAST_STEPS, TIMED_S = 3, 5, 10.0  # as `regpt bench train` has them
SEED, RANDOM_IDS = 1337, 1 << 20
LR, BETAS, DECAY, CLIP = 1e-3, (0.9, 0.99), 0.1, 1.0


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    rows: int
    vocab_size: int
    tokenizer: str
    """What regpt calls a tokenizer of so many entries."""
    dropout: float = 0.0
    micro_batches: int = 1
    """Of `rows` each, whose gradients one step adds up."""

    @property
    def batch_tokens(self) -> int:
        """Of one step."""
        return self.rows * self.micro_batches * self.block_size

    @property
    def flops_per_token(self) -> int:
        """Forward and backward: 6 N + 12 L C T, N without what is looked up."""
        C = self.n_embd
        n = 12 * self.n_layer * C * C + self.vocab_size * C
        return 6 * n + 12 * self.n_layer * C * self.block_size


SHAPES = {
    "4x128": Shape(4, 4, 128, 64, 12, 65, "chars"),
    "6x384": Shape(6, 6, 384, 256, 64, 65, "chars", dropout=0.2),
    "124m": Shape(12, 12, 768, 1024, 4, 50304, "gpt2"),
    "tiny": Shape(2, 2, 32, 32, 4, 65, "chars"),  # to try this script
}


@dataclass(frozen=True)
class Job:
    """What one process measures."""

    peer: str
    dtype: str
    compiled: bool
    shape: Shape
    steps: int | None

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{self.peer} {self.dtype}{' compiled' if self.compiled else ''}"


# --- in a process of its own ------------------------------------------------------------------------------------------


def measure(step: Callable[[], object], steps: int | None) -> list[float]:
    """Seconds of each timed step."""
    times: list[float] = []
    for _ in range(WARM_UP_STEPS):
        step()
    while len(times) < (steps or LEAST_STEPS) or (steps is None and sum(times) < TIMED_S):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return times


def batches(shape: Shape, device: str) -> Callable[[], tuple[Any, Any]]:
    """nanoGPT's get_batch on random ids."""
    import numpy as np
    import torch

    data = np.random.default_rng(SEED).integers(shape.vocab_size, size=RANDOM_IDS, dtype=np.uint32)
    T = shape.block_size

    def get_batch() -> tuple[Any, Any]:
        ix = torch.randint(len(data) - T, (shape.rows,))
        x = torch.stack([torch.from_numpy(data[i : i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + T].astype(np.int64)) for i in ix])
        if device == "cuda":
            return x.pin_memory().to(device, non_blocking=True), y.pin_memory().to(device, non_blocking=True)
        return x, y

    return get_batch


def autocast(device: str, dtype: str) -> Any:
    """As nanoGPT's train.py has it."""
    import contextlib

    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.amp.autocast(device_type=device, dtype=getattr(torch, dtype))


def nanogpt(job: Job, device: str) -> list[float]:
    """nanoGPT's model and optimizer, and what its train.py does between two log lines."""
    import torch
    from model import GPT, GPTConfig

    s = job.shape
    sizes = {f: getattr(s, f) for f in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout")}
    model = GPT(GPTConfig(**sizes, bias=False)).to(device)
    optimizer = model.configure_optimizers(DECAY, LR, BETAS, device)
    compute = torch.compile(model) if job.compiled else model
    ctx, get_batch = autocast(device, job.dtype), batches(s, device)
    x, y = get_batch()

    def step() -> float:
        nonlocal x, y
        for _ in range(s.micro_batches):
            with ctx:
                _, loss = compute(x, y)
                loss = loss / s.micro_batches
            x, y = get_batch()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return measure(step, job.steps)


def litgpt(job: Job, device: str) -> list[float]:
    """LitGPT's model; the loop is plain PyTorch, after its pretrain.py."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    s = job.shape
    if s.dropout:
        raise SystemExit("LitGPT's model has no dropout")
    config = Config(
        block_size=s.block_size,
        padded_vocab_size=s.vocab_size,
        n_layer=s.n_layer,
        n_head=s.n_head,
        n_embd=s.n_embd,
        bias=False,
        parallel_residual=False,
        gelu_approximate="tanh",
    )
    model = GPT(config).to(device)
    model.apply(model._init_weights)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY, fused=device == "cuda"
    )
    compute = torch.compile(model) if job.compiled else model
    ctx, get_batch = autocast(device, job.dtype), batches(s, device)

    def step() -> float:
        for _ in range(s.micro_batches):
            x, y = get_batch()
            with ctx:
                loss = chunked_cross_entropy(compute(x), y) / s.micro_batches
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return measure(step, job.steps)


def transformers(job: Job, device: str) -> list[float]:
    """Hugging Face's GPT-2 under its Trainer, timed from the end of a step to that of the next."""
    import numpy as np
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

    s = job.shape
    config = GPT2Config(
        vocab_size=s.vocab_size,
        n_positions=s.block_size,
        n_embd=s.n_embd,
        n_layer=s.n_layer,
        n_head=s.n_head,
        resid_pdrop=s.dropout,
        embd_pdrop=s.dropout,
        attn_pdrop=s.dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    data = np.random.default_rng(SEED).integers(s.vocab_size, size=RANDOM_IDS, dtype=np.int64)
    whole = torch.from_numpy(data)[: RANDOM_IDS // s.block_size * s.block_size].view(-1, s.block_size)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            n = len(marks) - WARM_UP_STEPS
            enough = job.steps is not None or (n > 0 and marks[-1] - marks[WARM_UP_STEPS - 1] >= TIMED_S)
            control.should_training_stop = n >= (job.steps or LEAST_STEPS) and enough

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=1_000_000,
            per_device_train_batch_size=s.rows,
            gradient_accumulation_steps=s.micro_batches,
            learning_rate=LR,
            weight_decay=DECAY,
            adam_beta2=BETAS[1],
            max_grad_norm=CLIP,
            bf16=job.dtype == "bfloat16",
            tf32=True if device == "cuda" and job.dtype == "float32" else None,
            use_cpu=device == "cpu",
            torch_compile=job.compiled,
            report_to=[],
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"input_ids": row, "labels": row} for row in whole]
        trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.train()
    return [b - a for a, b in itertools.pairwise(marks[WARM_UP_STEPS - 1 :])]


PEERS: dict[str, Callable[[Job, str], list[float]]] = {
    "nanogpt": nanogpt,
    "transformers": transformers,
    "litgpt": litgpt,
}


def child(text: str) -> None:
    """Measure the job that `text` describes; the last line of output is what was found."""
    import torch

    values = json.loads(text)
    job = Job(**values | {"shape": Shape(**values["shape"])})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    times = PEERS[job.peer](job, device)
    on_device = torch.cuda.max_memory_allocated() if device == "cuda" else None
    print(json.dumps({"step_s": statistics.median(times), "steps": len(times), "device_bytes": on_device}))


# --- here --------------------------------------------------------------------------------------------------------------


def ours(job: Job) -> list[str]:
    """The command that measures regpt."""
    s = job.shape
    settings = {
        "model.n-layer": s.n_layer,
        "model.n-head": s.n_head,
        "model.n-embd": s.n_embd,
        "model.block-size": s.block_size,
        "model.dropout": s.dropout,
        "tokenizer.name": s.tokenizer,
        "train.batch-tokens": s.batch_tokens,
        "train.micro-rows": s.rows,
        "train.dtype": job.dtype,
        "train.compile": "on" if job.compiled else "off",
        "seed": SEED,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    steps = ["--steps", str(job.steps)] if job.steps else []
    return ["-m", "regpt", "bench", "train", "shakespeare-char-cpu", "--json", "--quiet", *steps, *words]


def run(job: Job, env: dict[str, str], folder: str) -> dict[str, Any]:
    """What one process found, with its peak memory; {"failed": why} where it found nothing."""
    described = json.dumps(dataclasses.asdict(job))
    words = ours(job) if job.peer == "regpt" else [str(Path(__file__).resolve()), "--child", described]
    with open(Path(folder) / "out", "w+") as out, open(Path(folder) / "err", "w+") as err:
        process = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        lines, said = out.read().splitlines(), err.read().strip().splitlines()
    if process.returncode or not lines:
        return {"failed": said[-1] if said else f"exit status {process.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    if job.peer == "regpt":
        on_gpu = found["machine"]["device"].startswith("cuda")
        found["device_bytes"] = found["peak_memory_bytes"] if on_gpu else None
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return found | {"memory_bytes": found["device_bytes"] or peak}


def table(shape: Shape, jobs: Sequence[Job], rows: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds; ratios are of a round's own pair."""
    tokens = shape.batch_tokens
    ceilings: dict[str, float] = {}
    of_ours: dict[str, list[float]] = {}
    for job in (j for j in jobs if j.peer == "regpt" and rows.get(j.name)):
        rates = (f["ceiling_flops_per_second"] for f in rows[job.name])
        ceilings[job.dtype] = max([*rates, ceilings.get(job.dtype, 0.0)])
        of_ours[f"{job.dtype} {job.compiled}"] = [f["step_s"] for f in rows[job.name]]
    lines = [
        "| | ms/step | tokens/s | of the machine | peak memory | its time over regpt's |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for job in (j for j in jobs if rows.get(j.name)):
        found = rows[job.name]
        step_s = statistics.median(f["step_s"] for f in found)
        memory = statistics.median(f["memory_bytes"] for f in found)
        share, ratio = "", ""
        if job.dtype in ceilings:
            share = f"{tokens / step_s * shape.flops_per_token / ceilings[job.dtype]:.0%}"
        if pair := of_ours.get(f"{job.dtype} {job.compiled}"):
            ratio = f"{statistics.median(f['step_s'] / o for f, o in zip(found, pair, strict=False)):.2f}"
        lines.append(
            f"| {job.name} | {1e3 * step_s:,.2f} | {tokens / step_s:,.0f} | {share} | {memory / 2**20:,.0f} MiB | {ratio} |"
        )
    for dtype, flops in ceilings.items():
        lines.append(f"a square product in {dtype}: {flops / 1e9:,.1f} GFLOP/s")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="4x128")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--peers", default=",".join(["regpt", *PEERS]))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--compile", action="store_true", help="each also compiled")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch")
    parser.add_argument("--micro-batches", type=int, help="of one step")
    parser.add_argument("--dropout", type=float)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--path", action="append", default=[], help="a folder of packages for the peers")
    parser.add_argument("--json", type=Path, help="a file for every figure")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return child(args.child)
    shape = SHAPES[args.shape]
    given = {name: getattr(args, name) for name in ("rows", "micro_batches", "dropout")}
    shape = dataclasses.replace(shape, **{name: value for name, value in given.items() if value is not None})
    names = args.peers.split(",")
    if unknown := set(names) - {"regpt", *PEERS}:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}; there are regpt, {', '.join(PEERS)}")
    if "nanogpt" in names and args.nanogpt is None:
        print("nanogpt left out: --nanogpt names no checkout", flush=True)
        names.remove("nanogpt")
    jobs = [
        Job(name, dtype, compiled, shape, args.steps)
        for dtype in args.dtypes.split(",")
        for compiled in ([False, True] if args.compile else [False])
        for name in names
    ]
    env = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    places = [*([args.nanogpt] if args.nanogpt else []), *args.path, env.get("PYTHONPATH")]
    peers_env = env | {"PYTHONPATH": os.pathsep.join(str(Path(p).resolve()) for p in places[:-1])}
    if places[-1]:
        peers_env["PYTHONPATH"] += os.pathsep + str(places[-1])
    rows = rounds(jobs, args.rounds, dict(env), peers_env)
    print(f"\n{args.shape}: {shape}\n")
    print(table(shape, jobs, rows))
    if args.json:
        args.json.write_text(json.dumps({"shape": dataclasses.asdict(shape), "rows": rows}))


def rounds(
    jobs: Sequence[Job], n: int, env: dict[str, str], peers_env: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """Every job in turn, n times; one that fails is left out from then on."""
    rows: dict[str, list[dict[str, Any]]] = {job.name: [] for job in jobs}
    failed: set[str] = set()
    for i in range(n):
        for job in (j for j in jobs if j.name not in failed):
            with tempfile.TemporaryDirectory() as folder:
                found = run(job, env if job.peer == "regpt" else peers_env, folder)
            if "failed" in found:
                failed.add(job.name)
                print(f"{job.name} left out: {found['failed']}", flush=True)
                continue
            rows[job.name].append(found)
            mib = found["memory_bytes"] / 2**20
            print(
                f"round {i + 1}  {job.name:<30} {1e3 * found['step_s']:10,.2f} ms  {mib:7,.0f} MiB",
                flush=True,
            )
    return rows


if __name__ == "__main__":
    main()
