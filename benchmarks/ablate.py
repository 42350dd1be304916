"""Ablations: every switch of a modern preset turned over by itself, over several seeds, at equal tokens and at equal time.

    python benchmarks/ablate.py --text TEXT [--preset modern-char] [--seeds 3] [--only NAME,...] [--workers 1] [--out FILE]

Settings are chosen by this table, so TEXT must not be the text that records are quoted on: Tiny Shakespeare is not to be
used to choose on. Other settings change base and variants alike (`--train.steps 480`). Each run is a whole `regpt train`.

Equal tokens: the preset's steps, or as many as read its tokens where the batch is ramped up. Equal time: those steps over
the ratio of step times, which is measured first: short runs, each between two of the base; the median of the ratios counts.
Where it is within 3 % of 1, or the change cannot alter the work of a step (SAME_WORK), the runs at equal tokens count for
both; of a ramp no time is measured. Schedules are fitted to the steps. Where a difference is under twice the pooled spread,
there are five seeds.

A result is a line of FILE (JSONL) as soon as it is there, a failure too; the same command goes on where it was stopped and
repeats no run whose settings and text stand there (delete a line to repeat it). `--workers 2` runs two processes at once
where nothing is timed. `--pairs 0` measures no times, `--table` runs nothing and prints what there is. `--clock cpu` times
steps by the processor's time of the process instead of the wall's: for one thread on a CPU that others use too.
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import hashlib
import json
import math
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from regpt.cli.parse import parse
from regpt.cli.train import Args
from regpt.config import Config, ModernConfig, build, differences, load_preset, to_dict
from regpt.train.batches import Batches

BASE = "base"
SEEDS_IF_UNSURE = 5
DECIDED = 2.0  # pooled spreads
SAME_TIME = 0.03  # ratios so near to 1 are 1
# `regpt`, whose log then has the process's own time; of one thread that is what an idle machine's clock would say.
CPU_CLOCK = (
    "import sys, time; time.perf_counter = time.process_time; from regpt.cli import main; sys.exit(main())"
)
WARM_STEPS = 10  # of a short run, which do not count
QUOTED_ON = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # Tiny Shakespeare


def head_size(c: Config) -> int:
    """Dimensions of a head."""
    return c.model.n_embd // c.model.n_head


M, OPT, RAMP = "model.modern.", "optim.", "train.batch_ramp_steps"
SWITCHES = [f.name for f in dataclasses.fields(ModernConfig) if f.type in ("bool", bool)]
# What is tried: a name and the settings that it changes; a function makes its value from the base's. What the base has
# already is left out, so a switch may stand here both ways.
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"{name}={word}": {M + name: on} for name in SWITCHES for word, on in (("off", False), ("on", True))},
    "rope_fraction=1": {M + "rope_fraction": 1.0},
    "rope_fraction=half": {M + "rope_fraction": 0.5},
    "rope_base=1000": {M + "rope_base": 1000.0},
    "rope_base=10000": {M + "rope_base": 10_000.0},
    "attention_scale=plain": {M + "attention_scale": lambda c: head_size(c) ** -0.5},
    "attention_scale=double": {M + "attention_scale": lambda c: 2 * 1.44 * head_size(c) ** -0.5},
    "norm=layer": {M + "norm": "layer"},
    "activation=gelu": {M + "activation": "gelu"},
    "softcap=off": {M + "softcap": None},
    "softcap=30": {M + "softcap": 30.0},
    "trigram=on": {M + "trigram": 16384},
    "trigram=off": {M + "trigram": None},
    "window=quarter": {M + "window": lambda c: max(c.model.block_size // 4, 1)},
    "window=off": {M + "window": None},
    # AdamW for everything. Its rate is another one, so there are three; the best of them is its result.
    **{
        f"adamw={lr:g}": {
            OPT + "name": "adamw",
            OPT + "lr": lr,
            OPT + "warmup_steps": lambda c: c.train.steps // 20,
        }
        for lr in (1e-3, 3e-3, 1e-2)
    },
    "orthogonalize=polar_express": {OPT + "orthogonalize": "polar_express"},
    "orthogonalize=newton_schulz": {OPT + "orthogonalize": "newton_schulz"},
    "momentum_warmup=off": {OPT + "muon_momentum_steps": 0},
    "momentum_warmup=on": {
        OPT + "muon_momentum_steps": lambda c: c.optim.muon_momentum_steps or c.train.steps // 5
    },
    "muon_momentum=0.9": {OPT + "muon_momentum": 0.9},
    "muon_momentum=0.95": {OPT + "muon_momentum": 0.95},
    # Decay of 0 cannot be cautious, so the two come together.
    "decay=off": {OPT + "weight_decay": 0.0, OPT + "cautious_decay": False},
    "decay=plain": {OPT + "weight_decay": 0.05, OPT + "decay": "linear", OPT + "cautious_decay": False},
    "decay=cautious": {OPT + "weight_decay": 0.05, OPT + "decay": "linear", OPT + "cautious_decay": True},
    "schedule=cosine": {OPT + "schedule": "cosine"},
    "schedule=constant": {OPT + "schedule": "constant"},
    "decay_fraction=0.4": {OPT + "schedule": "linear", OPT + "decay_fraction": 0.4},
    "decay_fraction=1": {OPT + "schedule": "linear", OPT + "decay_fraction": 1.0},
    "min_lr=tenth": {OPT + "min_lr": lambda c: c.optim.lr / 10},
    "min_lr=0": {OPT + "min_lr": 0.0},
    "warmup=on": {OPT + "warmup_steps": lambda c: c.optim.warmup_steps or c.train.steps // 20},
    "warmup=off": {OPT + "warmup_steps": 0},
    "clip=1": {OPT + "clip_norm": 1.0},
    "beta2=0.95": {OPT + "beta2": 0.95},
    "eps=1e-10": {OPT + "eps": 1e-10},
    "batch_ramp=on": {RAMP: lambda c: c.train.batch_ramp_steps or c.train.steps // 5},
    "batch_ramp=off": {RAMP: 0},
    # Whether the base's rates are the best for it: a switch that pays by half of one is no switch.
    "muon_lr=half": {OPT + "muon_lr": lambda c: c.optim.muon_lr / 2},
    "muon_lr=double": {OPT + "muon_lr": lambda c: c.optim.muon_lr * 2},
    "embed_lr=triple": {OPT + "embed_lr": lambda c: 3 * (c.optim.embed_lr or c.optim.lr)},
    "embed_lr=third": {OPT + "embed_lr": lambda c: (c.optim.embed_lr or c.optim.lr) / 3},
    "head_lr=triple": {OPT + "head_lr": lambda c: 3 * (c.optim.head_lr or c.optim.lr)},
    "head_lr=third": {OPT + "head_lr": lambda c: (c.optim.head_lr or c.optim.lr) / 3},
    "scalar_lr=triple": {OPT + "scalar_lr": lambda c: 3 * (c.optim.scalar_lr or c.optim.lr)},
    "scalar_lr=third": {OPT + "scalar_lr": lambda c: (c.optim.scalar_lr or c.optim.lr) / 3},
}
# Numbers that a step computes with, whatever they are: such a change takes no time, and none is measured.
SAME_WORK = {M + name for name in ("rope_base", "attention_scale", "zero_init")} | {
    OPT + name
    for name in (
        *("lr", "min_lr", "muon_lr", "embed_lr", "head_lr", "scalar_lr", "schedule", "decay_fraction", "warmup_steps"),
        *("beta2", "eps", "muon_momentum", "muon_momentum_steps"),
    )
}  # fmt: skip


# --- settings ---------------------------------------------------------------------------------------------------------


def changed(config: Config, settings: dict[str, Any]) -> Config:
    """`config` with other values under dotted names; wrong names and types are errors."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value(config) if callable(value) else value
    return build(Config, values, where="benchmarks/ablate.py", base=config)


def fitted(config: Config, steps: int) -> Config:
    """`config` for so many steps, with what is counted in steps in proportion."""
    counted = ("warmup_steps", "decay_steps", "muon_momentum_steps")
    in_steps = {OPT + name: getattr(config.optim, name) for name in counted}
    in_steps[RAMP] = config.train.batch_ramp_steps
    scaled = {name: n and round(n * steps / config.train.steps) for name, n in in_steps.items()}
    return changed(config, {"train.steps": steps, **scaled})


def variant(base: Config, name: str, steps: int | None = None) -> Config:
    """The base, or a variant of it, for the base's steps or others."""
    config = fitted(base, steps or base.train.steps)
    return config if name == BASE else changed(config, VARIANTS[name])


def tokens(config: Config) -> int:
    """That a run trains on."""
    block_size = config.model.block_size
    rows = Batches(config.train.batch_tokens // block_size, config.train.batch_ramp_steps)
    return rows.before(config.train.steps) * block_size


def steps_of_tokens(base: Config, name: str) -> int:
    """The least steps in which a variant reads the base's tokens: a ramp, which has smaller batches, takes more."""
    choices = range(1, 4 * base.train.steps + 1)
    return choices[
        bisect.bisect_left(choices, tokens(base), key=lambda steps: tokens(variant(base, name, steps)))
    ]


def variants(base: Config, only: str = "") -> list[str]:
    """Names of the variants that differ from the base; of `only`, each the whole name or what stands before its `=`."""
    names = [name for name in VARIANTS if variant(base, name) != base]
    asked = [word for word in only.split(",") if word]
    for word in asked:
        if not any(word in (name, name.split("=")[0]) for name in names):
            sys.exit(f"no variant {word!r} of this base; there are: {', '.join(names)}")
    return [name for name in names if not asked or {name, name.split("=")[0]} & set(asked)]


def same_work(base: Config, name: str) -> bool:
    """Whether a step of the variant computes the same, with other numbers."""
    return set(differences(base, variant(base, name))) <= SAME_WORK


# --- runs -------------------------------------------------------------------------------------------------------------


class Results:
    """The lines of the JSONL file by their key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict[str, Any]] = {}
        text = path.read_text() if path.exists() else ""
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):
                self.entries[json.loads(line)["key"]] = json.loads(line)
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # torn by a crash
            path.write_text(whole)

    def add(self, entry: dict[str, Any]) -> None:
        """Write one, and say so."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.entries[entry["key"]] = entry
        said = ("variant", "seed", "pair", "steps", "loss", "ratio", "failed")
        words = [f"{k} {entry[k]}" for k in said if entry.get(k) is not None]
        print("  ".join(words), file=sys.stderr, flush=True)


class Ablation:
    """What is run, and what came of it."""

    def __init__(self, options: argparse.Namespace, extra: list[str]) -> None:
        preset = load_preset(options.preset)
        own = ["--train.threads", "1", *extra]  # two busy cores: threads would wait for each other
        config = parse(Args, own, prog="ablate.py", default=Args(config=preset.config)).config
        if config.model.arch != "modern" or config.optim.name != "muon":
            sys.exit(
                f"{options.preset} has none of these switches: the base must be a modern model trained by Muon."
            )
        quiet = {"eval.every": None, "save.every": None, "sample.tokens": 0}
        self.base = changed(config, {**quiet, "data.source": str(options.text.resolve()), "data.dir": None})
        self.preset, self.options = preset, options
        self.results = Results(options.out)
        self.text = text_digest(options.text)
        self.commit = commit()
        self.children: set[subprocess.Popen[str]] = set()
        self.lock = threading.Lock()
        self.folder = Path()  # of runs and shards, until we end

    def key(self, config: Config, *more: object) -> str:
        """What a result depends on, hashed."""
        settings = to_dict(changed(config, {"data.source": self.text, "data.dir": None}))
        return hashlib.sha256(json.dumps([settings, *more]).encode()).hexdigest()[:16]

    def regpt(self, config: Config, out: str, *, cpu_clock: bool) -> str:
        """`regpt train` to its end; what went wrong, or nothing. An interrupted one interrupts us."""
        program = ["-c", CPU_CLOCK] if cpu_clock else ["-m", "regpt"]
        call = [
            sys.executable,
            *program,
            "train",
            str(self.options.preset),
            "--out",
            out,
            "--quiet",
            "--json",
        ]
        for name, (_, value) in differences(self.preset.config, config).items():
            call += [f"--{name}", "none" if value is None else str(value)]
        process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        with self.lock:
            self.children.add(process)
        _, errors = process.communicate()
        with self.lock:
            self.children.discard(process)
        if process.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        if not process.returncode:
            return ""
        said = " ".join(errors.split())
        return f"exit {process.returncode}: {said[:300]}"

    def train(self, config: Config, *, timed: bool = False) -> dict[str, Any]:
        """One whole run: its loss and the median time of a step, or how it failed."""
        shards = self.folder / ("timed" if timed else "shards")
        config, began = changed(config, {"data.dir": str(shards)}), time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            failed = self.regpt(config, f"{place}/run", cpu_clock=timed and self.options.clock == "cpu")
            log = "" if failed else (Path(place) / "run" / "log.jsonl").read_text()
        lines = [json.loads(line) for line in log.splitlines()]
        rates = [e["tokens_per_second"] for e in lines if e["event"] == "step" and e["step"] > WARM_STEPS]
        loss = next((e["val_loss"] for e in reversed(lines) if e["event"] == "eval"), None)
        if not failed and (loss is None or not math.isfinite(loss)):
            failed = f"validation loss {loss}"
        return {
            "steps": config.train.steps,
            "loss": None if failed else loss,
            "step_ms": 1000 * config.train.batch_tokens / statistics.median(rates) if rates else None,
            "seconds": round(time.perf_counter() - began, 1),
            "failed": failed or None,
            "commit": self.commit,
        }

    # Times: every round passes through all variants, a run of the base between any two.

    def time_key(self, name: str, pair: int) -> str:
        """Of one ratio."""
        return self.key(self.short(name), "time", self.options.clock, pair)

    def short(self, name: str) -> Config:
        """A run that is timed; its validation, which is not, is over 1 %."""
        settings = {"data.val_fraction": 0.01, "track.log_every": 1}
        return changed(variant(self.base, name, self.options.time_steps), settings)

    def measure(self, names: list[str]) -> None:
        """The ratios of step times, one process at a time."""
        before: float | None = None
        for pair in range(self.options.pairs):
            for name in names:
                key = self.time_key(name, pair)
                if key in self.results.entries:
                    continue
                before = before or self.step_ms_of_base()
                entry = self.train(self.short(name), timed=True)
                after = self.step_ms_of_base()
                entry |= {"kind": "time", "key": key, "variant": name, "pair": pair, "loss": None}
                if entry["step_ms"]:
                    entry |= {"base_ms": [before, after], "ratio": entry["step_ms"] / ((before + after) / 2)}
                self.results.add(entry)
                before = after

    def step_ms_of_base(self) -> float:
        """A short run of the base."""
        entry = self.train(self.short(BASE), timed=True)
        if not entry["step_ms"]:
            sys.exit(f"the base itself failed: {entry['failed']}")
        return float(entry["step_ms"])

    def ratios(self, name: str) -> list[float]:
        """What was measured."""
        found = [self.results.entries.get(self.time_key(name, p), {}) for p in range(self.options.pairs)]
        return [e["ratio"] for e in found if e.get("ratio")]

    def steps_in_time(self, name: str) -> int | None:
        """Steps that take the base's time; None where no time is known."""
        steps, ratios = steps_of_tokens(self.base, name), self.ratios(name)
        if name == BASE or same_work(self.base, name):
            return steps
        if not ratios:
            return None
        ratio = statistics.median(ratios)
        return steps if abs(ratio - 1) <= SAME_TIME else max(round(steps / ratio), 1)

    # Losses.

    def loss_config(self, name: str, steps: int, seed: int) -> Config:
        """One run that counts."""
        return changed(variant(self.base, name, steps), {"seed": self.base.seed + seed})

    def run(self, plan: dict[str, int], seeds: int) -> None:
        """Every variant, for its steps, over the seeds; not what stands in the results already."""
        jobs = {}
        for seed in range(seeds):
            for name, steps in plan.items():
                config = self.loss_config(name, steps, seed)
                if self.key(config) not in self.results.entries:
                    jobs[self.key(config)] = (name, seed, config)
        with ThreadPoolExecutor(self.options.workers) as pool:
            futures = {pool.submit(self.train, config): key for key, (_, _, config) in jobs.items()}
            try:
                for future in as_completed(futures):
                    name, seed, _ = jobs[futures[future]]
                    entry = {"kind": "loss", "key": futures[future], "variant": name, "seed": seed}
                    entry |= future.result() | ({"step_ms": None} if self.options.workers > 1 else {})
                    if name == BASE and str(entry["failed"]).startswith("exit 2:"):
                        sys.exit(f"the base cannot be run: {entry['failed']}")
                    self.results.add(entry)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop_children()
                raise

    def stop_children(self) -> None:
        """End the runs that we began."""
        with self.lock:
            for child in self.children:
                child.terminate()

    def explore(self, plan: dict[str, int]) -> None:
        """The plan over the seeds asked for, and over more where they decide nothing."""
        base = {BASE: self.base.train.steps}
        self.run(base | plan, self.options.seeds)
        unsure = {name: steps for name, steps in plan.items() if self.compared(name, steps).unsure}
        if unsure:
            self.run(base | unsure, max(SEEDS_IF_UNSURE, self.options.seeds))

    def outcomes(self, name: str, steps: int) -> dict[int, dict[str, Any]]:
        """What came of a variant, by seed."""
        seeds = range(max(SEEDS_IF_UNSURE, self.options.seeds))
        keys = {seed: self.key(self.loss_config(name, steps, seed)) for seed in seeds}
        return {seed: self.results.entries[key] for seed, key in keys.items() if key in self.results.entries}

    def compared(self, name: str, steps: int) -> Compared:
        """A variant beside the base."""
        return Compared(self.outcomes(name, steps), self.outcomes(BASE, self.base.train.steps))

    def everything(self, names: list[str]) -> None:
        """All runs that are missing."""
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self.folder = Path(folder)
            # The short runs are over before a ramp is, so they cannot tell what it costs.
            self.measure(
                [name for name in names if RAMP not in VARIANTS[name] and not same_work(self.base, name)]
            )
            steps = {name: steps_of_tokens(self.base, name) for name in names}
            self.explore(steps)
            in_time = {name: self.steps_in_time(name) for name in names}
            self.explore({name: n for name, n in in_time.items() if n is not None and n != steps[name]})


class Compared:
    """The losses of a variant beside the base's of the same seeds."""

    def __init__(self, ours: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> None:
        self.failed = [f"seed {seed}: {e['failed']}" for seed, e in ours.items() if e["failed"]]
        self.losses = [e["loss"] for e in ours.values() if not e["failed"]]
        both = [
            seed for seed in ours if seed in base and not ours[seed]["failed"] and not base[seed]["failed"]
        ]
        pairs = [(ours[seed]["loss"], base[seed]["loss"]) for seed in both]
        self.difference = statistics.mean(a - b for a, b in pairs) if pairs else None
        self.spread: float | None = None  # the root of the mean of both variances
        if len(pairs) > 1:
            self.spread = math.sqrt(
                statistics.mean(statistics.variance(side) for side in zip(*pairs, strict=True))
            )

    @property
    def unsure(self) -> bool:
        """Whether more seeds are wanted."""
        return self.verdict == "within noise"

    @property
    def verdict(self) -> str:
        """Of the change, not of the switch: `pays` is a lower loss."""
        if self.failed or self.difference is None:
            return "fails" if self.failed else "not run"
        if self.spread is None:
            return "one seed"
        if abs(self.difference) < DECIDED * self.spread or not self.difference:
            return "within noise"
        return "pays" if self.difference < 0 else "costs"

    def __str__(self) -> str:
        if not self.losses:
            return "failed" if self.failed else ""
        spread = f" ± {statistics.stdev(self.losses):.4f}" if len(self.losses) > 1 else ""
        there = "" if self.difference is None else f", {self.difference:+.4f}"
        return f"{statistics.mean(self.losses):.4f}{spread}{there}"

    @property
    def seeds(self) -> str:
        """How many finished, and how many did not."""
        return f"{len(self.losses)}" + (f" + {len(self.failed)} failed" if self.failed else "")


# --- the table --------------------------------------------------------------------------------------------------------


def text_digest(text: Path) -> str:
    """Of a file; of a folder of shards, of its manifest."""
    data = (text / "manifest.json" if text.is_dir() else text).read_bytes()
    return hashlib.sha256(data).hexdigest()


def commit() -> str:
    """Of the code that runs."""
    call = ["git", "describe", "--always", "--dirty"]
    told = subprocess.run(call, cwd=Path(__file__).parent, capture_output=True, text=True)
    return told.stdout.strip() or "unknown"


def row(ablation: Ablation, name: str) -> tuple[tuple[bool, float], str, list[str]]:
    """Where a variant stands in the table, its line, its failures."""
    steps, ratios = steps_of_tokens(ablation.base, name), ablation.ratios(name)
    in_tokens, in_time = ablation.compared(name, steps), ablation.steps_in_time(name)
    timed = ablation.compared(name, in_time) if in_time is not None and in_time != steps else None
    ratio, loss_in_time = "not measured", ""
    if same_work(ablation.base, name):
        ratio, loss_in_time = "1, same work", "as at equal tokens"
    elif ratios:
        ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        loss_in_time = f"{timed} ({in_time} steps)" if timed else "as at equal tokens"
    verdicts = [in_tokens.verdict] + ([timed.verdict] if timed else [])
    verdict = verdicts[0] if len(set(verdicts)) == 1 else f"tokens: {verdicts[0]}; time: {verdicts[1]}"
    seeds = in_tokens.seeds + (f"; {timed.seeds}" if timed else "")
    difference = (timed or in_tokens).difference
    order = (difference is None, -(difference or 0.0))
    failures = [f"{name}, {budget}, {text}" for budget, c in (("equal tokens", in_tokens), ("equal time", timed)) if c
                for text in c.failed]  # fmt: skip
    pairs = [
        ablation.results.entries.get(ablation.time_key(name, p), {}) for p in range(ablation.options.pairs)
    ]
    failures += [f"{name}, short run {p}: {e['failed']}" for p, e in enumerate(pairs) if e.get("failed")]
    return order, f"| {name} | {in_tokens} | {ratio} | {loss_in_time} | {seeds} | {verdict} |", failures


def table(ablation: Ablation, names: Iterable[str]) -> str:
    """Everything that is known, in Markdown."""
    options, base = ablation.options, ablation.base
    theirs = differences(ablation.preset.config, base)
    other = {
        k: new
        for k, (_, new) in theirs.items()
        if k.split(".")[0] in ("model", "train", "optim", "tokenizer")
    }
    words = ", ".join(f"{k}={v}" for k, v in other.items())
    commits = sorted({e["commit"] for e in ablation.results.entries.values()})
    own = ablation.compared(BASE, base.train.steps)
    rows = sorted(row(ablation, name) for name in names)
    lines = [
        f"`{options.preset}` ({words}) on {options.text.name} (sha256 {ablation.text[:8]}): {base.train.steps} steps of"
        f" {base.train.batch_tokens:,} tokens. Held-out loss in nats a token over the whole split, mean ± standard deviation"
        f" over seeds, difference to the base of the same seeds; a difference under {DECIDED:g} pooled deviations is within"
        " noise; pays: what the line changes lowers the loss. Step times, by the clock of the"
        f" {'wall' if options.clock == 'wall' else 'processor'}: median (range) of"
        f" {options.pairs} runs of {options.time_steps} steps without their first {WARM_STEPS}, each between two of the base."
        f" torch {version('torch')}, commit {', '.join(commits)}.",
        "",
        "| variant | loss at equal tokens, difference | step time | loss at equal time, difference | seeds | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| base | {str(own).split(',')[0]} | 1 | as at equal tokens | {own.seeds} | |",
        *[line for _, line, _ in rows],
    ]
    failures = [f"base, {text}" for text in own.failed] + [text for _, _, texts in rows for text in texts]
    lines += ["", "Failures:", ""] + [f"- {text}" for text in failures] if failures else []
    if ablation.text == QUOTED_ON:
        lines += [
            "",
            "**This is Tiny Shakespeare, on which records are quoted: nothing may be chosen by this table.**",
        ]
    if len(commits) > 1:
        lines += ["", "The runs are of several commits."]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", type=Path, required=True, help="a text, or a folder of prepared shards")
    parser.add_argument("--preset", default="modern-char")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="variants, or what stands before their =, with commas between"
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, help="default: runs/ablate-PRESET.jsonl")
    parser.add_argument("--pairs", type=int, default=3, help="short runs by which a step is timed")
    parser.add_argument("--time-steps", type=int, default=40, help="steps of a short run")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options, extra = parser.parse_known_args()
    options.out = options.out or Path("runs") / f"ablate-{Path(options.preset).stem}.jsonl"
    if options.time_steps <= WARM_STEPS:
        sys.exit(f"--time-steps must be above {WARM_STEPS}, which do not count.")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ablation = Ablation(options, extra)
    names = variants(ablation.base, options.only)
    try:
        if not options.table:
            ablation.everything(names)
    except KeyboardInterrupt:
        ablation.stop_children()
        print(f"stopped; the same command goes on from {options.out}", file=sys.stderr)
        sys.exit(130)
    print(table(ablation, names))


if __name__ == "__main__":
    main()
