"""Documents to shards: tokenised in several processes, written in order, finished in one instant, resumed after a crash.

All work happens in `.<name>.partial` beside the folder asked for. Now and then, between two parts of the source, what
is written is made durable and noted in a journal (`regpt.data.journal`); a later call with the same request goes on
from there, and since the parts are the same every time, so are the bytes. At the end the finished folder is renamed
into its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from regpt.config import SHARD_TOKENS
from regpt.data.documents import Part
from regpt.data.journal import DOWNLOADS, Progress
from regpt.data.request import (
    EVERYTHING,
    Request,
    Selection,
    check_single_text,
    read,
    split_parts,
    threshold_of,
)
from regpt.data.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardFile,
    Shards,
    SourceFacts,
    TokenizerFacts,
    dtype_for,
)
from regpt.data.shuffle import shuffle
from regpt.data.sources import PART_BYTES, Source, missing_on, reasons
from regpt.data.stored import shard_files
from regpt.data.unfinished import (
    SHARDS,
    clear_leftovers,
    finish,
    megabytes,
    require_room,
    unfinished,
    work_folder,
)
from regpt.data.workers import document_hash, tokenizing
from regpt.data.writer import SplitWriter
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer
from regpt.train.durable import write_synced

ProgressFunction = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of the source's files; may raise to stop the work."""

MOST_WORKERS = 1024
DISCARDED_BYTES = 64 << 20  # of a file that is done: worth a note in the journal, so that it can be removed
JOURNAL_S = 30.0  # work that a crash can cost, beside what it costs to make it durable
WORTH_ESTIMATING_BYTES = 20_000_000
UNTIMED_BYTES = 300_000  # a faster back end is loaded, and compared with tiktoken
SAMPLE_BYTES = 1_000_000
# For the estimate of disk: text per id. Of byte-pair encodings a low figure, so that the estimate is high.
BYTES_PER_TOKEN = {"gpt2": 2.5, "bpe": 2.5}


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: Path,
    *,
    val_fraction: float,
    val_source: Source | None = None,
    selection: Selection = EVERYTHING,
    workers: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    progress: ProgressFunction | None = None,
) -> Manifest:
    """Write `source` as token shards into the folder `out`; nothing if that was done before.

    A single text is split by position: its first int(n * (1 - val_fraction)) characters are for training, as in
    nanoGPT. Documents are split by a hash of their text, so that a document stays where it is when others come; if
    none falls under `val_fraction`, the one with the smallest hash is held out.

    Args:
        val_fraction: in [0, 1); 0 holds nothing out. Without effect where `val_source` is given.
        val_source: what to hold out instead.
        selection: which documents, and in which order.
        workers: processes that tokenise; None: one for each core, or this process for little text.
        shard_tokens: ids in one file.

    Raises:
        DataError: the source is empty or damaged, the disk is full, `out` holds something else or is being written.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError("data.val_fraction must lie in [0, 1).", got=val_fraction)
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise ConfigError("data.workers is out of range.", got=workers, expected=f"1 to {MOST_WORKERS}")
    if shard_tokens < 1:
        raise ConfigError("shard_tokens must be 1 or more.", got=shard_tokens)
    selection.check()
    out = Path(os.path.abspath(out))
    request = Request(
        source, None if val_source else val_fraction, val_source, tokenizer, shard_tokens, selection
    )
    if done := finished(out, request.facts, tokenizer.kind):
        clear_leftovers(out)
        return done
    coming = missing_on(out, source, val_source)
    download = f" and the download {megabytes(coming)} more" if coming else ""
    text = f"{megabytes(request.source_bytes)} of text{download}"
    require_room(out, estimated_bytes(request) + coming, text)
    with unfinished(out, goes_on=True) as work:
        if done := finished(out, request.facts, tokenizer.kind):  # by another process, while we came here
            return done
        return _write(request, out, work, workers or workers_for(source), progress or (lambda *_: None))


def passing(out: Path, source: Source, val_source: Source | None) -> tuple[Source, Source | None]:
    """The sources as `prepare` gets them where downloads are not to be kept.

    What is not in the cache comes into the folder for unfinished work, two files of each at a time, and is removed when
    the journal has what it holds.
    """
    folder = work_folder(Path(os.path.abspath(out))) / DOWNLOADS
    return source.passing(folder / "train"), val_source.passing(folder / "val") if val_source else None


def training_texts(source: Source, val_fraction: float, min_chars: int = 0) -> Iterator[str]:
    """The text that `prepare` puts into the training split, in pieces: what a tokenizer may learn from.

    Equal documents are all there, also where `prepare` is to leave out all but the first.

    Args:
        val_fraction: 0 where validation has a source of its own.
        min_chars: as in `Selection`.
    """
    source = source.to_look_into
    check_single_text(source, val_fraction)
    with tempfile.TemporaryDirectory(prefix="regpt-") as folder:
        work = Path(folder)
        threshold = threshold_of(source, val_fraction, work, min_chars)
        parts = (part for name, part in split_parts(source, val_fraction, work) if name != "val")
        for document in read(source, parts, min_chars):
            hashed = document_hash(document)
            if hashed is not None and hashed >= threshold:
                yield from document()


# --- before any work --------------------------------------------------------------------------------------------------


def finished(out: Path, facts: Mapping[str, Any], kind: str) -> Manifest | None:
    """The manifest in `out` if this very request was prepared there; None where `out` is empty.

    Args:
        facts: of the request.
        kind: of its tokenizer.

    Raises:
        DataError: `out` holds something else.
    """
    if not (out / MANIFEST).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out} is not empty and not a folder of token shards.", hint="another --out")
        return None
    manifest = Shards.open(out).manifest
    changed = sorted(k for k in {*facts, *manifest.request} if manifest.request.get(k) != facts.get(k))
    if changed:
        raise DataError(
            f"{out} holds shards of another request; different: {', '.join(changed)}.",
            got=_shortly(manifest.request, changed, manifest.tokenizer.kind),
            expected=_shortly(facts, changed, kind),
            hint=f"another --out, or delete {out}",
        )
    return manifest


def _shortly(request: Mapping[str, Any], names: list[str], kind: str) -> str:
    """What a request has under these names: a fingerprint by its beginning, anything else as it is."""
    values = {name: request.get(name) for name in names}
    words = {k: v[:8] if isinstance(v, str) else str(v) for k, v in values.items()}
    return ", ".join(f"{k} {kind} ({v})" if k == "tokenizer" else f"{k} {v}" for k, v in words.items())


def workers_for(source: Source) -> int:
    """One for each core that we may use, but none that would have nothing to do while it starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, source.source_bytes // PART_BYTES))


def estimated_bytes(request: Request) -> int:
    """What the shards of this text will take on the disk, about; while they are shuffled, twice as much."""
    ids = request.source_bytes / BYTES_PER_TOKEN.get(request.tokenizer.kind, 1.0)
    copies = 1 if request.selection.shuffle_seed is None or request.selection.slice else 2
    return int(ids * dtype_for(request.tokenizer.vocab_size).itemsize * copies)


def estimated_seconds(request: Request, workers: int) -> float | None:
    """What tokenising may take, by the speed of the source's first megabyte; None for little text, or where it fails."""
    if request.source_bytes < WORTH_ESTIMATING_BYTES or request.source.missing_bytes:
        return None
    took, size, passed = 0.0, 0, 0
    with (
        contextlib.suppress(DataError, UnicodeError),  # said where the text is read for good
        tempfile.TemporaryDirectory(prefix="regpt-") as folder,
    ):
        documents = read(request.source, request.source.parts(Path(folder)))
        for piece in itertools.chain.from_iterable(d() for d in documents):
            begun = time.perf_counter()
            request.tokenizer.encode_array(piece)
            ended, n = time.perf_counter(), len(piece.encode())
            if passed > UNTIMED_BYTES:
                took, size = took + ended - begun, size + n
            passed += n
            if size > SAMPLE_BYTES:
                break
    return took / size * request.source_bytes / workers if size else None


def unusual_split(manifest: Manifest, val_fraction: float) -> str | None:
    """A sentence where far more was held out than asked for, as happens with few documents."""
    if "val" not in manifest.splits or manifest.val_source is not None:
        return None
    held, total = (manifest.splits["val"].source_bytes, sum(s.source_bytes for s in manifest.splits.values()))
    share = held / max(total, 1)
    if share < max(3 * val_fraction, 0.1):
        return None
    return (
        f"{share:.0%} of the text is held out for validation, where {val_fraction:.1%} was asked for: whole documents are "
        "held out, and here are few. Validation text of its own: --val-source (regpt train: --data.val-source)"
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(request: Request, out: Path, work: Path, workers: int, progress: ProgressFunction) -> Manifest:
    done = Progress.resume(request, work) or Progress.begin(request, work)
    try:
        check_single_text(request.source, request.val_fraction)
        if request.val_source:
            check_single_text(request.val_source, None)
        request.discard_before(done.file)  # what a crash left between the journal and their removal
        scratch = work / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        (scratch / "val").mkdir(parents=True)
        least = request.selection.min_chars
        threshold = threshold_of(request.source, request.val_fraction, scratch, least)
        _tokenize(request, done, threshold, scratch, workers, progress)
        return _finish(request, done, out)
    finally:
        done.abandon()


def _tokenize(
    request: Request, done: Progress, threshold: int, scratch: Path, workers: int, progress: ProgressFunction
) -> None:
    """Every part that is not done yet."""
    total = request.within_bytes
    names: list[str] = []  # splits of the parts under way
    to_pass_over = done.file_parts  # parts of the file that was being read at the last save

    def ahead() -> Iterator[Part]:
        first_file = done.file
        for number, (name, part) in enumerate(request.parts(scratch, first_file)):
            if number < to_pass_over:
                part.delete_if_temporary()
                continue
            names.append(name)
            yield part

    progress(done.bytes, total)
    saved, saved_at = time.monotonic(), (done.tokens, done.file, done.bytes)
    with tokenizing(
        workers,
        request.tokenizer,
        done.work / SHARDS / TOKENIZER,
        scratch,
        lambda: progress(done.bytes, total),
    ) as tokenized:
        for part, path, result in tokenized(ahead()):
            done.take(names.pop(0), part, path, result, threshold)
            progress(done.bytes, total)
            tokens, file, size = saved_at
            can_discard = request.source.passes and done.file > file and done.bytes - size >= DISCARDED_BYTES
            # No more than a shard is lost, however fast it was written.
            if (
                time.monotonic() - saved > JOURNAL_S
                or done.tokens - tokens >= request.shard_tokens
                or can_discard
            ):
                done.save()
                request.discard_before(done.file)
                saved, saved_at = time.monotonic(), (done.tokens, done.file, done.bytes)


def _finish(request: Request, done: Progress, out: Path) -> Manifest:
    """Close the files, write the manifest, give the folder its name."""
    skipped = Counter(done.skipped)
    if 0 in request.within:  # of all slices, the first one counts what was left out while listing
        skipped += Counter(request.source.skipped)
    wanted = ["train"] + (["val"] if request.val_source or request.val_fraction else [])
    if not request.selection.slice:
        specs = {"train": request.source.spec, "val": (request.val_source or request.source).spec}
        require_text({n: done.splits[n] for n in wanted}, specs, skipped)
    manifest = Manifest(
        tokenizer=TokenizerFacts.of(request.tokenizer),
        max_id=done.max_id,
        dtype=dtype_for(request.tokenizer.vocab_size).name,
        source=_facts(request.source),
        val_source=_facts(request.val_source) if request.val_source else None,
        request=request.facts,
        files=(),
        splits={},
        skipped={k: n for k, n in sorted(skipped.items()) if n},
        duplicates=done.duplicates,
        single_texts=request.single_texts,
    )
    if request.selection.shuffle_seed is not None and not request.selection.slice:
        done.save()  # a crash from here on costs no tokenising
    return publish(done.work, manifest, {n: done.splits[n] for n in wanted}, out)


def publish(work: Path, manifest: Manifest, writers: Mapping[str, SplitWriter], out: Path) -> Manifest:
    """Finish the files of `writers`, in work/shards, shuffled if that is asked for; rename that folder to `out`.

    Args:
        manifest: all of it but `files` and `splits`.

    Returns:
        The whole manifest, as it now lies in `out`.
    """
    shards = work / SHARDS
    files = {name: writer.finish() for name, writer in writers.items()}
    seed = manifest.request.get("shuffle_seed")
    if seed is not None and "slice" not in manifest.request:
        shards, files["train"] = _shuffled(shards, files, writers["train"], seed, work / "scratch")
    manifest = dataclasses.replace(
        manifest,
        files=tuple(f for of_split in files.values() for f in of_split),
        splits={name: writer.facts() for name, writer in writers.items()},
    )
    write_synced(shards / MANIFEST, [manifest.to_json().encode()])
    finish(shards, out)
    return manifest


def _shuffled(
    shards: Path, files: Mapping[str, list[ShardFile]], train: SplitWriter, seed: int, scratch: Path
) -> tuple[Path, list[ShardFile]]:
    """A copy of the folder `shards` in `scratch`, its training documents in another order; the folder and those files.

    A copy, so that after a crash what was tokenised is still there.
    """
    copy = scratch / "shuffled"
    copy.mkdir(parents=True)
    shutil.copytree(shards / TOKENIZER, copy / TOKENIZER)
    for name in (name for f in files.get("val", []) for name in (f.name, f.index_name)):
        shutil.copyfile(shards / name, copy / name)
    writer = SplitWriter(copy, "train", train.itemsize, train.shard_tokens)
    shuffle(shard_files(shards, files["train"], "train"), writer, seed, scratch)
    return copy, writer.finish()


def require_text(
    splits: Mapping[str, SplitWriter], specs: Mapping[str, str], skipped: Mapping[str, int]
) -> None:
    """Raises DataError where a split that is wanted has no document.

    Args:
        specs: the source of each split, as the user wrote it.
        skipped: what was left out, by reason.
    """
    for name, writer in splits.items():
        if not writer.total.documents:
            raise DataError(
                f"{specs[name]}: there is no text for the {name} split.",
                got=f"skipped: {reasons(skipped) or 'nothing'}",
            )


def _facts(source: Source) -> SourceFacts:
    return SourceFacts(source.name, source.spec, source.fingerprint)
