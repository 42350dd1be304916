"""Turn text into token shards: a file, a folder, a glob, or a named set (shakespeare, python-stdlib)."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, duration, parse
from regpt.config import DataConfig, TokenizerConfig


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt prepare SOURCE --out DIR`."""

    source: tyro.conf.Positional[str]
    """Text, JSONL or parquet (.gz, .xz, .zst too), a folder of them, a glob, shakespeare or python-stdlib."""
    out: str
    """The folder for the shards. The same command again finishes what was stopped."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["--tokenizer.name"])] = TokenizerConfig.name
    """gpt2, bytes, chars or bpe (trained on the source), or a folder with a saved tokenizer."""
    tokenizer_files: Annotated[str | None, tyro.conf.arg(aliases=["--tokenizer.files"])] = (
        TokenizerConfig.files
    )
    """Folder with GPT-2's encoder.json and vocab.bpe, for use offline."""
    vocab_size: Annotated[int, tyro.conf.arg(aliases=["--tokenizer.vocab-size"])] = TokenizerConfig.vocab_size
    """Entries of a `bpe` tokenizer trained here, <|endoftext|> included."""
    pattern: Annotated[Literal["gpt2", "gpt4"], tyro.conf.arg(aliases=["--tokenizer.pattern"])] = (
        TokenizerConfig.pattern
    )
    """Whose split into words a `bpe` tokenizer trained here stays inside of."""
    min_frequency: Annotated[int, tyro.conf.arg(aliases=["--tokenizer.min-frequency"])] = (
        TokenizerConfig.min_frequency
    )
    """How often a pair must occur to become an entry of a `bpe` tokenizer trained here."""
    val_fraction: Annotated[float, tyro.conf.arg(aliases=["--data.val-fraction"])] = DataConfig.val_fraction
    """Share of documents held out for validation; of a single text, its last part. 0: none."""
    val_source: Annotated[str | None, tyro.conf.arg(aliases=["--data.val-source"])] = DataConfig.val_source
    """A separate source for validation. None: split off SOURCE."""
    text_field: Annotated[str, tyro.conf.arg(aliases=["--data.text-field"])] = DataConfig.text_field
    """The field that holds the text in JSONL and parquet."""
    workers: Annotated[int | None, tyro.conf.arg(aliases=["--data.workers"])] = DataConfig.workers
    """Processes that tokenise. None: one for each core."""

    def tokenizer_config(self) -> TokenizerConfig:
        """The settings of the tokenizer among these."""
        return TokenizerConfig(
            name=self.tokenizer,
            vocab_size=self.vocab_size,
            pattern=self.pattern,
            min_frequency=self.min_frequency,
            files=self.tokenizer_files,
        )


def main(argv: list[str]) -> int:
    """`regpt prepare`."""
    args = parse(Args, argv, prog="regpt prepare", description=__doc__ or "")
    from regpt.cli.inspect import describe_shards
    from regpt.data.corpus import tokenizer_for
    from regpt.data.prepare import estimated_bytes, megabytes, prepare, unusual_split
    from regpt.data.shards import Shards
    from regpt.data.sources import open_source

    out, begun = Output(args), time.monotonic()
    source = open_source(args.source, text_field=args.text_field)
    val_source = (
        open_source(args.val_source, text_field=args.text_field) if args.val_source is not None else None
    )
    tokenizer = tokenizer_for(
        args.tokenizer_config(),
        source,
        val_source,
        args.val_fraction,
        lambda event, step, values: out.info(values["text"]) if event == "info" else None,
    )
    needed = estimated_bytes(source, val_source, tokenizer)
    out.info(
        f"{megabytes(source.stored_bytes)} in {len(source.files):,} files; the shards will take about {megabytes(needed)}"
    )
    total = source.stored_bytes + (val_source.stored_bytes if val_source else 0)
    with out.progress("tokenising", total, "bytes") as bar:
        manifest = prepare(
            source,
            tokenizer,
            Path(args.out),
            val_fraction=args.val_fraction,
            val_source=val_source,
            workers=args.workers,
            progress=lambda done, _: bar.update(done),
        )
    if unusual := unusual_split(manifest, args.val_fraction):
        out.warn(unusual)
    seconds, splits = time.monotonic() - begun, manifest.splits
    result: dict[str, Any] = {
        "out": args.out,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "train_tokens": splits["train"].tokens,
        "val_tokens": splits["val"].tokens if "val" in splits else 0,
        "documents": sum(s.documents for s in splits.values()),
        "bytes": sum(s.source_bytes for s in splits.values()),
        "seconds": round(seconds, 3),
        "skipped": manifest.skipped,
    }
    lines = [
        *describe_shards(Shards.open(args.out)),
        f"time       {duration(seconds)}",
        f"next:      regpt inspect {args.out}",
    ]
    out.result(result, "\n".join(lines))
    return 0
