"""Turn text into token shards: a file, a folder, a glob, a data set of the Hugging Face hub, or a named set.

Named sets: shakespeare, python-stdlib, tinystories, tinystories-v2, wikitext-103, openwebtext, fineweb-edu-10bt,
fineweb-edu-100bt, fineweb-edu-350bt, fineweb-edu (docs/data.md).
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from regpt.cli.parse import CommonArgs, Output, parse
from regpt.config import SHARD_TOKENS, DataConfig, TokenizerConfig
from regpt.durations import duration
from regpt.paths import nearest_existing

if TYPE_CHECKING:
    from regpt.data.corpus import Text
    from regpt.data.shards import Manifest
    from regpt.data.sources import Source


@dataclass(frozen=True, kw_only=True)
class Args(CommonArgs):
    """Arguments of `regpt prepare SOURCE --out DIR`."""

    source: tyro.conf.Positional[str]
    """Text, JSONL or parquet (.gz, .xz, .zst too), a folder, a glob, a named set, or hf:owner/name[:config][@revision]."""
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
    split: Annotated[str, tyro.conf.arg(aliases=["--data.split"])] = DataConfig.split
    """The split of a hub data set to train on."""
    val_fraction: Annotated[float | None, tyro.conf.arg(aliases=["--data.val-fraction"])] = (
        DataConfig.val_fraction
    )
    """Share of documents held out for validation; of a single text, its last part. 0: none. None: the validation split of
    a named set that has one, else 0.005."""
    val_source: Annotated[str | None, tyro.conf.arg(aliases=["--data.val-source"])] = DataConfig.val_source
    """A separate source for validation. None: split off SOURCE."""
    val_split: Annotated[str | None, tyro.conf.arg(aliases=["--data.val-split"])] = DataConfig.val_split
    """The split of a hub data set to validate on: of --val-source, or of SOURCE if there is none."""
    text_field: Annotated[str, tyro.conf.arg(aliases=["--data.text-field"])] = DataConfig.text_field
    """The field that holds the text in JSONL and parquet."""
    dedup: Annotated[bool, tyro.conf.arg(aliases=["--data.dedup"])] = DataConfig.dedup
    """Leave out documents whose text is that of an earlier one."""
    min_chars: Annotated[int, tyro.conf.arg(aliases=["--data.min-chars"])] = DataConfig.min_chars
    """Leave out documents with fewer characters."""
    shuffle_seed: Annotated[int | None, tyro.conf.arg(aliases=["--data.shuffle-seed"])] = (
        DataConfig.shuffle_seed
    )
    """Shuffle the training documents across shards, in an order drawn by this seed. None: the source's order."""
    slice: str | None = None
    """i/n: only the i-th of n stretches of the source, for many machines; `regpt merge` joins them. None: all."""
    shard_tokens: int = SHARD_TOKENS
    """Ids in one file."""
    keep_downloads: Annotated[
        bool, tyro.conf.FlagConversionOff, tyro.conf.arg(aliases=["--data.keep-downloads"])
    ] = DataConfig.keep_downloads
    """Files of the hub stay in regpt's cache folder. False: two of them lie beside --out at a time, each is removed when it
    is done with, and a tokenizer that is trained on the text reads it from the server."""
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
    from regpt.data.corpus import tokenizer_for
    from regpt.data.prepare import (
        estimated_bytes,
        estimated_seconds,
        prepare,
        unusual_split,
        workers_for,
    )
    from regpt.data.request import Request, Selection, Slice
    from regpt.data.unfinished import megabytes
    from regpt.tokenizers.fast import backend

    out, begun = Output(args), time.monotonic()
    selection = Selection(
        dedup=args.dedup,
        min_chars=args.min_chars,
        shuffle_seed=args.shuffle_seed,
        slice=Slice.parse(args.slice) if args.slice is not None else None,
    )
    selection.check()
    source, val_source, val_fraction = _opened(args, out)
    tokenizer = tokenizer_for(
        args.tokenizer_config(),
        source,
        val_source,
        val_fraction or 0,
        lambda event, step, values: out.info(values["text"]) if event == "info" else None,
        min_chars=args.min_chars,
    )
    request = Request(source, val_fraction, val_source, tokenizer, args.shard_tokens, selection)
    workers = args.workers or workers_for(source)
    seconds = estimated_seconds(request, workers)
    out.info(
        f"{megabytes(source.stored_bytes)} in {len(source.files):,} files; the shards will take about "
        f"{megabytes(estimated_bytes(request))}" + (f" and {duration(seconds)}" if seconds else "")
    )
    if tokenizer.kind in ("gpt2", "bpe") and backend() == "gigatoken":
        out.info("encoding with gigatoken; samples are compared with tiktoken's ids")
    total = request.within_bytes
    with out.progress("tokenising", total, "bytes") as bar:
        manifest = prepare(
            source,
            tokenizer,
            Path(args.out),
            val_fraction=val_fraction or 0,
            val_source=val_source,
            selection=selection,
            workers=args.workers,
            shard_tokens=args.shard_tokens,
            progress=lambda done, _: bar.update(done),
        )
    if not selection.slice and (unusual := unusual_split(manifest, val_fraction or 0)):
        out.warn(unusual)
    report(out, args.out, manifest, time.monotonic() - begun)
    return 0


def report(out: Output, folder: str, manifest: Manifest, seconds: float) -> None:
    """What lies in the folder now, for a person and for a script."""
    from regpt.cli.inspect import describe_shards
    from regpt.data.shards import Shards

    splits = manifest.splits
    tokens, source_bytes = (sum(getattr(s, n) for s in splits.values()) for n in ("tokens", "source_bytes"))
    result: dict[str, Any] = {
        "out": folder,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "train_tokens": splits["train"].tokens,
        "val_tokens": splits["val"].tokens if "val" in splits else 0,
        "documents": sum(s.documents for s in splits.values()),
        "bytes": source_bytes,
        "bytes_per_token": round(source_bytes / tokens, 4) if tokens else None,
        "longest_tokens": max(s.longest for s in splits.values()),
        "duplicates": manifest.duplicates,
        "seconds": round(seconds, 3),
        "skipped": manifest.skipped,
    }
    lines = [
        *describe_shards(Shards.open(folder)),
        f"time       {duration(seconds)}",
        f"next:      regpt inspect {folder}",
    ]
    out.result(result, "\n".join(lines))


def _opened(args: Args, out: Output) -> Text:
    """The sources; says what is to be downloaded."""
    from regpt.data.prepare import passing
    from regpt.data.shards import MANIFEST
    from regpt.data.sources import open_sources

    source, val_source, val_fraction = open_sources(_text(args), note=out.info)
    if not args.keep_downloads:
        source, val_source = passing(Path(args.out), source, val_source)
    is_done = not args.keep_downloads and (Path(args.out) / MANIFEST).exists()
    if not is_done and (download := describe_download(source, val_source)):
        out.info(download)
    return source, val_source, val_fraction


def _text(args: Args) -> DataConfig:
    return DataConfig(
        source=args.source,
        text_field=args.text_field,
        split=args.split,
        val_fraction=args.val_fraction,
        val_source=args.val_source,
        val_split=args.val_split,
    )


def describe_download(*sources: Source | None) -> str:
    """What is still to be downloaded, where to, and what room there is; empty where it is nothing."""
    from regpt.data.unfinished import megabytes
    from regpt.tokenizers.download import cache_folder

    downloads = [d for s in sources if s for d in s.downloads]
    missing, at_once = (sum(getattr(d, n) for d in downloads) for n in ("missing_bytes", "room_bytes"))
    if not missing:
        return ""
    folder = downloads[0].passing or cache_folder()
    free = megabytes(shutil.disk_usage(nearest_existing(folder)).free)
    if downloads[0].passing:  # less, where some of it is prepared already
        said = f"up to {megabytes(missing)} to download, at most {megabytes(at_once)} of it at a time,"
    else:
        said = f"{megabytes(missing)} to download"
    return f"{said} into {folder} ({free} free there)"
