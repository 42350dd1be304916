"""Measure this machine at regpt's own work; without a name, list what can be measured."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from regpt.cli.parse import CommonArgs, Output, parse, preset_and_rest
from regpt.cli.plan import gib
from regpt.config import Config, load_preset
from regpt.durations import duration
from regpt.errors import UsageError, did_you_mean
from regpt.paths import user_path

if TYPE_CHECKING:
    from regpt.train.bench import Profiled, TrainBench
    from regpt.train.operators import Operator

BENCHES = {
    "train": "a training step of a preset, on random ids: time, tokens/s, FLOP/s, memory; with --profile, by operator",
    "data": "text to shards and shards to batches: MB/s of a source beside the tokenizer alone, time of a batch",
}
DEFAULT_TRACE = "regpt-trace.json"
SHOWN_OPERATORS = 10


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt bench`."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(CommonArgs):
    """Arguments of `regpt bench train [PRESET]`."""

    steps: int | None = None
    """Steps that are timed, after a few to warm up. None: as many as take ten seconds, at least five."""
    profile: str | None = None
    """Also record a few steps with torch.profiler into this file (no name: regpt-trace.json), and show the ten costliest
    operators."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff] = dataclasses.field(
        default_factory=Config
    )


def main(argv: list[str]) -> int:
    """`regpt bench`, and `regpt bench NAME`."""
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], argv[1:]
        if name not in BENCHES:
            raise UsageError(f"there is no bench {name!r}.{did_you_mean(name, BENCHES)}", hint="regpt bench")
        return {"train": train, "data": data}[name](rest)
    width = max(map(len, BENCHES))
    listed = "\n".join(f"  regpt bench {name:<{width}}  {what}" for name, what in BENCHES.items())
    args = parse(Args, argv, prog="regpt bench", description=f"{__doc__}\n\n{listed}")
    Output(args).result({"benches": BENCHES}, f"{listed}\n\nregpt bench NAME --help has its options.")
    return 0


def train(argv: list[str]) -> int:
    """`regpt bench train`."""
    name, rest = preset_and_rest(argv)
    preset = load_preset(name)
    args = parse(
        TrainArgs,
        _with_trace(rest),
        prog="regpt bench train",
        description=f"Measure {BENCHES['train']}.\n\n"
        f"Preset {preset.name}: {preset.about.summary}. Nothing but the trace is written.",
        default=TrainArgs(config=preset.config),
    )
    out = Output(args)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch.profiler's own notes; read when torch is loaded
    from regpt.train.bench import bench_train

    def hear(event: str, step: int, values: dict[str, Any]) -> None:
        (out.info if event == "info" else out.warn)(values["text"])

    trace = user_path(args.profile) if args.profile is not None else None
    found = bench_train(args.config, steps=args.steps, trace=trace, listen=hear)
    text = describe(preset.name, args.config, found)
    if found.profile is not None:
        text += "\n\n" + costliest(found.profile)
    out.result({"preset": preset.name} | found.as_dict(), text)
    return 0


@dataclass(frozen=True, kw_only=True)
class DataArgs(CommonArgs):
    """Arguments of `regpt bench data [SOURCE]`."""

    source: tyro.conf.Positional[str] = "python-stdlib"
    """What `regpt prepare` takes; of much text the first 50 MB."""
    tokenizer: str | None = None
    """gpt2, bytes, or a folder with a saved tokenizer. None: gpt2 where its files are on this machine, else bytes."""
    tokenizer_files: str | None = None
    """Folder with GPT-2's encoder.json and vocab.bpe."""
    text_field: str = "text"
    """The field that holds the text in JSONL and parquet."""
    workers: int | None = None
    """Processes that tokenise. None: one for each core."""


def data(argv: list[str]) -> int:
    """`regpt bench data`."""
    description = f"Measure {BENCHES['data']}. Written is into a temporary folder alone."
    args = parse(DataArgs, argv, prog="regpt bench data", description=description)
    from regpt.data.bench import bench_data
    from regpt.data.sources import open_source
    from regpt.tokenizers import open_tokenizer
    from regpt.tokenizers.gpt2 import gpt2_is_here

    out = Output(args)
    name = args.tokenizer or ("gpt2" if args.tokenizer_files or gpt2_is_here() else "bytes")
    tokenizer = open_tokenizer(name, files=args.tokenizer_files)
    source = open_source(args.source, text_field=args.text_field)
    with out.progress("tokenising", source.stored_bytes, "bytes") as bar:
        found = bench_data(source, tokenizer, workers=args.workers, progress=lambda done, _: bar.update(done))
    alone = found.tokenizer_bytes_per_second
    share = found.prepare_bytes_per_second / (alone * found.workers)
    rows = {
        "text": f"{source.name}: {found.text_bytes:,} bytes in {found.documents:,} documents, {found.tokens:,} tokens",
        "read": f"{rate(found.read_bytes_per_second, 'B/s')} in one process",
        "tokenizer": f"{rate(alone, 'B/s')} in one process, by itself ({tokenizer.kind})",
        "prepare": f"{rate(found.prepare_bytes_per_second, 'B/s')} from files to shards in {found.workers} processes, "
        f"{share:.0%} of so many tokenizers by themselves; {duration(found.prepare_s)} in all",
        "batch": f"{1e6 * found.batch_s:,.0f} us for {found.batch_rows} rows of {found.block_size:,}: "
        f"{found.batch_rows * found.block_size / found.batch_s / 1e6:,.0f} M tokens/s",
    }
    values = {"source": args.source, "tokenizer": tokenizer.kind} | found.as_dict()
    out.result(values, "\n".join(f"{row:<9} {text}" for row, text in rows.items()))
    return 0


def _with_trace(words: list[str]) -> list[str]:
    """The words, with a name behind a bare --profile."""
    out: list[str] = []
    for word, after in zip(words, [*words[1:], "--"], strict=False):
        out += [word, DEFAULT_TRACE] if word == "--profile" and after.startswith("--") else [word]
    return out


def describe(name: str, config: Config, b: TrainBench) -> str:
    """The measurements as a table for a person."""
    m, p = config.model, b.plan
    guessed = "" if b.vocabulary_known else " (guessed, until the text is prepared)"
    micro = f"{p.n_micro} micro-batches of {p.micro_rows} rows" if p.n_micro > 1 else "one pass"
    compiled = "compiled" if p.compile else "eager"

    def part(seconds: float) -> str:
        whole = b.forward_s + b.backward_s + b.update_s
        return f"{milliseconds(seconds):>10}   {seconds / whole:.0%}"

    rows = {
        "model": f"{name}: {m.arch} {m.n_layer} layers x {m.n_embd}, context {m.block_size}, "
        f"vocabulary {p.vocab_size:,}{guessed}: {p.parameters:,} parameters",
        "batch": f"{p.batch_rows} rows x {m.block_size} = {config.train.batch_tokens:,} tokens in {micro}",
        "machine": f"{b.machine.device}: {b.machine.name}, {b.machine.threads} threads; {p.dtype}, {compiled}",
        "step": f"{milliseconds(b.step_s):>10}   median of {b.steps} (after {b.warm_up_steps}); "
        f"{milliseconds(b.step_p10_s)} to {milliseconds(b.step_p90_s)} from the 10th to the 90th percentile",
        "forward": part(b.forward_s),
        "backward": part(b.backward_s),
        "update": part(b.update_s) + "   (gradient norm, clipping, optimizer)",
        "speed": f"{b.tokens_per_second:,.0f} tokens/s",
        "products": f"{rate(b.flops_per_second, 'FLOP/s')}, {b.share_of_ceiling:.0%} of the "
        f"{rate(b.ceiling_flops_per_second, 'FLOP/s')} that a square {p.dtype} product reaches here",
        "memory": f"{gib(b.peak_memory_bytes)} at the peak; the plan expects {gib(b.planned_memory_bytes)}",
    }
    return "\n".join(f"{row:<9} {text}" for row, text in rows.items())


def costliest(p: Profiled) -> str:
    """The operators with the most time of their own, as a table, and where the trace lies."""
    ceilings = [f"{rate(r, 'FLOP/s')} in {dtype}" for dtype, r in p.product_flops_per_second.items()]
    lines = [
        f"the {SHOWN_OPERATORS} costliest operators of {p.steps} profiled steps of {milliseconds(p.step_s)}",
        f"ceilings, measured: products {', '.join(ceilings)}; memory {rate(p.copy_bytes_per_second, 'B/s')} "
        "(a large copy, read and written)",
        "",
        f"{'ms/step':>8} {'of step':>7} {'calls':>6} {'rate':>16} {'of ceiling':>10}  operator and inputs",
    ]
    for o in p.operators[:SHOWN_OPERATORS]:
        ceiling = p.ceiling_share(o)
        lines.append(
            f"{1e3 * o.self_s / p.steps:>8.2f} {p.step_share(o):>7.1%} {o.calls / p.steps:>6.0f} {_rate(o):>16} "
            f"{'' if ceiling is None else f'{ceiling:.0%}':>10}  {_name(o)} {inputs(o)}"
        )
    lines += [
        "",
        "Bytes are those of the inputs, a lower bound: the profiler records no outputs. What lies in a cache may be faster",
        "than the copy.",
        f"The trace lies in {p.trace}; https://ui.perfetto.dev or chrome://tracing shows it.",
    ]
    return "\n".join(lines)


def inputs(o: Operator) -> str:
    """Shapes and dtypes of an operator's tensors: 768x128 128x512 bfloat16."""
    shown = []
    for shape in o.shapes:
        if any(isinstance(n, list) for n in shape):
            shown.append(f"[{len(shape)} tensors]")
        elif shape:
            shown.append("x".join(map(str, shape)))
    dtypes = dict.fromkeys(d for d, s in zip(o.dtypes, o.shapes, strict=False) if s and d != "TensorList")
    return " ".join([*shown[:4], *(["…"] if len(shown) > 4 else []), *dtypes])


def _name(o: Operator) -> str:
    """Without its namespace; a compiled graph by the first letters of its hash."""
    name = o.name.removeprefix("aten::").strip("# ")
    return name if len(name) <= 40 else f"{name[:39]}…"


def _rate(o: Operator) -> str:
    if o.flops and o.self_s:
        return rate(o.flops / o.self_s, "FLOP/s")
    return f">= {rate(o.bytes / o.self_s, 'B/s')}" if o.bytes and o.self_s else ""


def milliseconds(seconds: float) -> str:
    """19.71 ms; above ten seconds as a person says it."""
    return f"{1e3 * seconds:,.2f} ms" if seconds < 10 else duration(seconds)


def rate(per_second: float, unit: str) -> str:
    """456.0 GFLOP/s, 1.2 TFLOP/s, 12.3 GB/s."""
    scale, letter = (1e12, "T") if per_second >= 1e12 else (1e9, "G") if per_second >= 1e9 else (1e6, "M")
    return f"{per_second / scale:,.1f} {letter}{unit}"
