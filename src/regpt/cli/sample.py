"""Generate text from a trained model."""

from __future__ import annotations

import dataclasses
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.errors import ConfigError, DataError, DeviceError
from regpt.infer.settings import SamplingSettings

if TYPE_CHECKING:
    from regpt.infer.engine import Piece
    from regpt.train.load import Loaded
    from regpt.train.machine import Machine

BETWEEN = "---"  # the line between two completions


@dataclass(frozen=True, kw_only=True)
class Sampling(SamplingSettings):
    """The settings, with the short form of n."""

    n: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 1
    """Completions, decoded side by side."""


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt sample RUN [PROMPT]`."""

    run: tyro.conf.Positional[str]
    """A run directory, or one of its checkpoints."""
    prompt: tyro.conf.Positional[str] = ""
    """Text to continue; - reads standard input. Empty: a new document begins."""
    file: str | None = None
    """Continue the text of this file, the whole of it, with any newline at its end."""
    which: Literal["best", "last"] = "best"
    """The checkpoint with the lowest validation loss, or the newest."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic and weights."""
    sampling: Annotated[Sampling, tyro.conf.arg(name=""), tyro.conf.UseAppendAction] = dataclasses.field(
        default_factory=Sampling
    )


def main(argv: list[str]) -> int:
    """`regpt sample`."""
    args = parse(Args, argv, prog="regpt sample", description=__doc__ or "")
    out = Output(args)
    prompt = read_prompt(args)
    settings: SamplingSettings = args.sampling
    if settings.seed is None:  # chosen here, so that it can be told
        settings = dataclasses.replace(settings, seed=secrets.randbits(32))

    import torch  # not before the command line is known to be sound

    from regpt.infer.engine import collect, generate, prompt_ids
    from regpt.train.load import load_model
    from regpt.train.machine import probe

    machine = probe(args.device, setting="--device")
    loaded = load_model(args.run, device=machine.device, which=args.which, say=out.warn)
    loaded.model.to(getattr(torch, args.dtype))
    ids = prompt_ids(loaded.tokenizer, prompt)
    check_memory(loaded, machine, args, len(ids))
    if len(ids) > loaded.config.block_size:
        out.warn(f"the prompt's {len(ids):,} tokens do not fit {_context(loaded)}.")

    begun = time.perf_counter()
    pieces = list(_shown(generate(loaded.model, loaded.tokenizer, ids, settings), args))
    seconds = time.perf_counter() - begun
    done = collect(iter(pieces), loaded.tokenizer.eot_id)
    if len(ids) <= loaded.config.block_size and any(c.slid for c in done):
        out.warn(f"prompt and text did not fit {_context(loaded)}.")
    rate = len(pieces) / seconds
    out.info(
        f"{len(pieces):,} tokens, {rate:,.1f} a second; seed {settings.seed}, {loaded.path.name} "
        f"of {args.run}, {machine.device} {args.dtype}"
    )
    if args.json:
        completions = [{"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason} for c in done]
        values = {"completions": completions, "prompt": prompt, "prompt_tokens": len(ids)}
        values |= {"tokens_per_second": rate, "seed": settings.seed, "run": args.run, "step": loaded.step}
        out.result(values, "")
    elif settings.n > 1:
        out.result({}, f"\n{BETWEEN}\n".join(c.text for c in done))
    return 0


def _shown(pieces: Iterator[Piece], args: Args) -> Iterator[Piece]:
    """The same pieces; a single completion is written to standard output as it comes."""
    stream = args.sampling.n == 1 and not args.json
    for piece in pieces:
        if stream:
            sys.stdout.write(piece.text + ("\n" if piece.finish_reason else ""))
            sys.stdout.flush()
        yield piece


def _context(loaded: Loaded) -> str:
    from regpt.infer.engine import kept_tokens

    size = loaded.config.block_size
    return f"the model's context of {size:,} tokens; it sees the last {kept_tokens(size):,} to {size:,}"


def read_prompt(args: Args) -> str:
    """The prompt from where the arguments say.

    Raises:
        ConfigError: both a prompt and a file are given.
        DataError: the file cannot be read, or is not UTF-8.
    """
    if args.file is None and args.prompt != "-":
        return args.prompt
    if args.file is not None and args.prompt:
        raise ConfigError("--file and a prompt on the command line exclude each other.")
    name = args.file or "standard input"
    if args.file is None and sys.stdin is None:
        raise DataError("the prompt should come from standard input, which is closed.")
    try:
        return (Path(name).read_bytes() if args.file else sys.stdin.buffer.read()).decode("utf-8")
    except OSError as e:
        raise DataError(f"cannot read the prompt file {name}: {e.strerror}.") from None
    except UnicodeDecodeError as e:
        raise DataError(f"{name} is not UTF-8 text: {e}.") from None


def check_memory(loaded: Loaded, machine: Machine, args: Args, prompt_tokens: int) -> None:
    """Refuse what the cache cannot hold, before it is allocated. Raises DeviceError."""
    import torch

    from regpt.infer.cache import cache_bytes

    positions = min(loaded.config.block_size, prompt_tokens + args.sampling.max_new_tokens)
    needed = cache_bytes(loaded.config, args.sampling.n, positions, getattr(torch, args.dtype))
    if 0 < machine.memory_bytes < needed:
        raise DeviceError(
            f"-n {args.sampling.n}: a cache of {positions:,} positions each takes {needed / 2**30:,.1f} GiB.",
            expected=f"at most the {machine.memory_bytes / 2**30:,.1f} GiB of {machine.device}",
            hint=f"-n {max(1, args.sampling.n * machine.memory_bytes // needed // 2)}",
        )
