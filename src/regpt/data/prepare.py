"""Documents to shards: tokenised in several processes, written in order, finished in one instant, resumed after a crash.

All work happens in `.<name>.partial` beside the folder asked for. Now and then, between two parts of the source, what
is written is made durable and noted in a journal; a later call with the same request goes on from there, and since the
parts are the same every time, so are the bytes. At the end the finished folder is renamed into its place.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.data.documents import Document, Part, documents
from regpt.data.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    Shards,
    SourceFacts,
    TokenizerFacts,
    dtype_for,
)
from regpt.data.sources import PART_BYTES, Source, missing_on
from regpt.data.workers import Tokenized, document_hash, tokenizing
from regpt.data.writer import SplitWriter
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer
from regpt.train.durable import lock_file, make_folder, replace_file, sync_folder, write_synced

ProgressFunction = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) of the source's files; may raise to stop the work."""

MORE_SPACE = "free some space, or prepare into a folder on another disk (--out; regpt train: --data.dir)"
HASHES = 1 << 64
JOURNAL = "journal.json"
MOST_WORKERS = 1024
JOURNAL_S = 30.0  # work that a crash can cost, beside what it costs to make it durable
# For the estimate of disk: text per id. Of byte-pair encodings a low figure, so that the estimate is high.
BYTES_PER_TOKEN = {"gpt2": 2.5, "bpe": 2.5}


def prepare(
    source: Source,
    tokenizer: Tokenizer,
    out: Path,
    *,
    val_fraction: float,
    val_source: Source | None = None,
    workers: int | None = None,
    shard_tokens: int = 100_000_000,
    progress: ProgressFunction | None = None,
) -> Manifest:
    """Write `source` as token shards into the folder `out`; nothing if that was done before.

    A single text is split by position: its first int(n * (1 - val_fraction)) characters are for training, as in
    nanoGPT. Documents are split by a hash of their text, so that a document stays where it is when others come; if
    none falls under `val_fraction`, the one with the smallest hash is held out.

    Args:
        val_fraction: in [0, 1); 0 holds nothing out. Without effect where `val_source` is given.
        val_source: what to hold out instead.
        workers: processes that tokenise; None: one for each core, or this process for little text.
        shard_tokens: ids in one file.

    Raises:
        DataError: the source is empty or damaged, the disk is full, `out` holds something else or is being written.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError("data.val_fraction must lie in [0, 1).", got=val_fraction)
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise ConfigError("data.workers is out of range.", got=workers, expected=f"1 to {MOST_WORKERS}")
    out = Path(os.path.abspath(out))
    job = _Job(source, None if val_source else val_fraction, val_source, tokenizer, shard_tokens)
    if done := job.finished(out):
        return done
    work = out.parent / f".{out.name}.partial"
    made_parent = not out.parent.exists()
    try:
        _check_disk(job, out, work)
        with _locked(work / "lock", out):
            keep = False
            try:
                if done := job.finished(out):  # by another process, while we came here
                    return done
                return _write(job, out, work, workers or _workers_for(source), progress or (lambda *_: None))
            except (
                BaseException
            ) as e:  # stopped, or short of memory: the same command goes on from the journal
                keep = not isinstance(e, (DataError, OSError)) and (work / JOURNAL).exists()
                raise
            finally:
                if not keep:
                    shutil.rmtree(work, ignore_errors=True)
                    if made_parent and not out.exists():
                        with contextlib.suppress(OSError):  # somebody else's are in it
                            out.parent.rmdir()
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"disk full while preparing {out}; what was written is removed."
            raise DataError(what, hint=MORE_SPACE) from None
        if e.errno == errno.EFBIG:
            raise DataError(
                f"{out}: this user may not write files so large.", hint="ulimit -f unlimited"
            ) from None
        raise DataError(f"{e.filename or out}: {e.strerror or e}.") from e


def training_texts(source: Source, val_fraction: float) -> Iterator[str]:
    """The text that `prepare` puts into the training split, in pieces: what a tokenizer may learn from.

    Args:
        val_fraction: 0 where validation has a source of its own.
    """
    _check_single_text(source, val_fraction)
    with tempfile.TemporaryDirectory(prefix="regpt-") as folder:
        work = Path(folder)
        threshold = _threshold(source, val_fraction, work)
        for document in _read(part for name, part in _parts(source, val_fraction, work) if name != "val"):
            hashed = document_hash(document)
            if hashed is not None and hashed >= threshold:
                yield from document()


def _read(parts: Iterable[Part]) -> Iterator[Document]:
    """Documents read here, in this process."""
    for part in parts:
        yield from documents(part, Counter())
        if part.temporary:
            os.unlink(part.path)


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """A request: all that decides the bytes."""

    source: Source
    val_fraction: float | None
    val_source: Source | None
    tokenizer: Tokenizer
    shard_tokens: int

    @property
    def request(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {
            "source": self.source.fingerprint,
            "val_fraction": self.val_fraction,
            "val_source": self.val_source.fingerprint if self.val_source else None,
            "tokenizer": self.tokenizer.fingerprint,
            "shard_tokens": self.shard_tokens,
        }

    def finished(self, out: Path) -> Manifest | None:
        """The manifest in `out` if this very request was prepared there; None where `out` is empty."""
        if not (out / MANIFEST).exists():
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise DataError(f"{out} is not empty and not a folder of token shards.", hint="another --out")
            return None
        manifest = Shards.open(out).manifest
        changed = [k for k, v in self.request.items() if manifest.request.get(k) != v]
        if changed:
            raise DataError(
                f"{out} holds shards of another request; different: {', '.join(changed)}.",
                got=_shortly(manifest.request, changed, manifest.tokenizer.kind),
                expected=_shortly(self.request, changed, self.tokenizer.kind),
                hint=f"another --out, or delete {out}",
            )
        return manifest


def _shortly(request: Mapping[str, Any], names: list[str], kind: str) -> str:
    """What a request has under these names: a fingerprint by its beginning, anything else as it is."""
    values = {name: request.get(name) for name in names}
    words = {k: v[:8] if isinstance(v, str) else str(v) for k, v in values.items()}
    return ", ".join(f"{k} {kind} ({v})" if k == "tokenizer" else f"{k} {v}" for k, v in words.items())


def _workers_for(source: Source) -> int:
    """One for each core that we may use, but none that would have nothing to do while it starts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, source.source_bytes // PART_BYTES))


def estimated_bytes(source: Source, val_source: Source | None, tokenizer: Tokenizer) -> int:
    """What the shards of this text will take on the disk, about."""
    text = source.source_bytes + (val_source.source_bytes if val_source else 0)
    return int(text / BYTES_PER_TOKEN.get(tokenizer.kind, 1.0) * dtype_for(tokenizer.vocab_size).itemsize)


def megabytes(n: float) -> str:
    """Bytes for a person: 0.35 MB, 12 MB, 1,200 MB, 45 GB."""
    return f"{n / 1e9:,.0f} GB" if n >= 1e10 else f"{n / 1e6:,.0f} MB" if n >= 1e7 else f"{n / 1e6:,.2f} MB"


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
        "held out, and here are few. Validation text of its own: val_source"
    )


def _check_disk(job: _Job, out: Path, work: Path) -> None:
    """Refuse, before any work, what cannot fit."""
    text = job.source.source_bytes + (job.val_source.source_bytes if job.val_source else 0)
    needed = estimated_bytes(job.source, job.val_source, job.tokenizer)
    needed -= sum(p.stat().st_size for p in (work / "shards").glob("*.*"))  # done before a crash
    folder = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not os.access(folder, os.W_OK):
        raise DataError(f"{out} cannot be made: {folder} is not a folder to write in.", hint="another --out")
    free = shutil.disk_usage(folder).free
    coming = missing_on(folder, job.source, job.val_source)
    if needed + coming > free:
        download = f" and the download {megabytes(coming)} more" if coming else ""
        raise DataError(
            f"disk full: {out} needs about {megabytes(needed)} for {megabytes(text)} of text{download}.",
            got=f"{megabytes(free)} free",
            hint=MORE_SPACE,
        )


def _parts(source: Source, val_fraction: float | None, work: Path) -> Iterator[tuple[str, Part]]:
    """Every part with its split: train, val, or hash where each document goes by its hash."""
    if source.single_text:
        scan = source.scan
        assert scan is not None
        chars = int(scan.chars * (1 - (val_fraction or 0)))
        yield from ((("train", "val")[n], part) for n, part in source.text_parts(work, chars))
    else:
        yield from (("hash" if val_fraction else "train", part) for part in source.parts(work))


def _check_single_text(source: Source, val_fraction: float | None) -> None:
    """Refuse a text that is not text, or leaves nothing for one of its splits."""
    scan = source.scan
    if not source.single_text or scan is None:
        return
    if scan.invalid_at is not None:
        raise DataError(
            f"{source.files[0].path} is not valid UTF-8 at byte {scan.invalid_at}.",
            hint="convert it, for example: iconv -f LATIN1 -t UTF-8 FILE",
        )
    if scan.chars and val_fraction and int(scan.chars * (1 - val_fraction)) in (0, scan.chars):
        raise DataError(
            f"{source.spec}: {scan.chars} characters cannot be split with val_fraction={val_fraction}."
        )


def _threshold(source: Source, val_fraction: float | None, work: Path) -> int:
    """Documents with a smaller hash are held out: none of a text that is split by position.

    Else that is `val_fraction` of all hashes, or, if no document has such a hash, just enough for the smallest one. Reads
    no further than to the first document of either kind.
    """
    if not val_fraction or source.single_text:
        return 0
    threshold = int(val_fraction * HASHES)
    lowest, kept, seen = HASHES, False, 0
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for document in _read(source.parts(Path(folder))):
            hashed = document_hash(document)
            if hashed is None:
                continue
            seen, lowest = seen + 1, min(lowest, hashed)
            kept = kept or hashed >= threshold
            if kept and lowest < threshold:
                return threshold
    if seen == 0:
        return threshold  # said where all that was skipped is known
    noun = "the only document" if seen == 1 else f"every one of {seen} documents" if not kept else None
    if noun is None and (share := _share(source, lowest, work)) > 0.5:
        noun = f"{share:.0%} of the text (equal documents stay together)"
    if noun is not None:
        raise DataError(
            f"{source.spec}: val_fraction={val_fraction} would hold out {noun} or nothing.",
            hint="--val-fraction 0, or validation text of its own: --val-source",
        )
    return lowest + 1


def _share(source: Source, hashed: int, work: Path) -> float:
    """How much of the text the documents of this hash are; reads all of it."""
    held = total = 0
    with tempfile.TemporaryDirectory(dir=work) as folder:
        for document in _read(source.parts(Path(folder))):
            if (own := document_hash(document)) is not None:
                size = sum(len(piece) for piece in document())
                total, held = total + size, held + size * (own == hashed)
    return held / max(total, 1)


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(job: _Job, out: Path, work: Path, workers: int, progress: ProgressFunction) -> Manifest:
    _check_single_text(job.source, job.val_fraction)
    if job.val_source:
        _check_single_text(job.val_source, None)
    shards, scratch = work / "shards", work / "scratch"
    state = _State.resume(job, work) or _State.begin(job, work)
    shutil.rmtree(scratch, ignore_errors=True)
    (scratch / "val").mkdir(parents=True)
    threshold = _threshold(job.source, job.val_fraction, scratch)
    total = job.source.stored_bytes + (job.val_source.stored_bytes if job.val_source else 0)
    every = _parts(job.source, job.val_fraction, scratch)
    if job.val_source:
        of_its_own = (("val", part) for _, part in _parts(job.val_source, 0, scratch / "val"))
        every = itertools.chain(every, of_its_own)
    names: list[str] = []  # splits of the parts under way

    def ahead() -> Iterator[Part]:
        for number, (name, part) in enumerate(every):
            if number < state.parts:  # done before a crash
                if part.temporary:
                    os.unlink(part.path)
                continue
            names.append(name)
            yield part

    progress(state.bytes, total)
    saved = time.monotonic()
    try:
        with tokenizing(
            workers, job.tokenizer, shards / TOKENIZER, scratch, lambda: progress(state.bytes, total)
        ) as tokenized:
            for part, path, result in tokenized(ahead()):
                state.take(names.pop(0), part, path, result, threshold)
                progress(state.bytes, total)
                if time.monotonic() - saved > JOURNAL_S:
                    state.save(work)
                    saved = time.monotonic()
        return _finish(job, state, shards, out)
    finally:
        state.abandon()


def _finish(job: _Job, state: _State, shards: Path, out: Path) -> Manifest:
    """Close the files, write the manifest, give the folder its name."""
    skipped = Counter(job.source.skipped) + Counter(state.skipped)
    wanted = ["train"] + (["val"] if job.val_source or job.val_fraction else [])
    for name in wanted:
        if not state.splits[name].total.documents:
            spec = job.val_source.spec if name == "val" and job.val_source else job.source.spec
            left_out = ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()) if n)
            raise DataError(
                f"{spec}: there is no text for the {name} split.", got=f"skipped: {left_out or 'nothing'}"
            )
    writers = {name: state.splits[name] for name in wanted}
    t = job.tokenizer
    manifest = Manifest(
        tokenizer=TokenizerFacts(t.kind, t.fingerprint, t.vocab_size, t.eot_id),
        max_id=state.max_id,
        dtype=dtype_for(t.vocab_size).name,
        source=_facts(job.source),
        val_source=_facts(job.val_source) if job.val_source else None,
        request=job.request,
        files=tuple(f for w in writers.values() for f in w.finish()),
        splits={name: w.facts() for name, w in writers.items()},
        skipped={k: n for k, n in sorted(skipped.items()) if n},
    )
    for path in sorted((shards / TOKENIZER).iterdir()):
        _sync(path)
    write_synced(shards / MANIFEST, [manifest.to_json().encode()])
    for folder in (shards / TOKENIZER, shards):
        sync_folder(folder)
    if out.exists():
        out.rmdir()  # empty, or `finished` would have refused it
    os.rename(shards, out)
    sync_folder(out.parent)
    return manifest


def _facts(source: Source) -> SourceFacts:
    return SourceFacts(source.name, source.spec, source.fingerprint)


class _State:
    """What is written so far, and how to go on."""

    def __init__(self, shards: Path, job: _Job) -> None:
        itemsize = dtype_for(job.tokenizer.vocab_size).itemsize
        self.splits = {n: SplitWriter(shards, n, itemsize, job.shard_tokens) for n in ("train", "val")}
        self.parts = self.bytes = self.max_id = 0
        self.skipped: Counter[str] = Counter()
        self.request = job.request

    @classmethod
    def begin(cls, job: _Job, work: Path) -> _State:
        """Nothing written yet; whatever another request left here is removed."""
        for name in (JOURNAL, "shards", "scratch"):
            path = work / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (work / "shards" / TOKENIZER).mkdir(parents=True)
        job.tokenizer.save(work / "shards" / TOKENIZER)
        return cls(work / "shards", job)

    @classmethod
    def resume(cls, job: _Job, work: Path) -> _State | None:
        """As the journal has it; None where there is none of this request."""
        state = cls(work / "shards", job)
        try:
            journal = json.loads((work / JOURNAL).read_bytes())
            if journal["request"] != job.request:
                return None
            state.parts, state.bytes, state.max_id = journal["parts"], journal["bytes"], journal["max_id"]
            state.skipped = Counter(journal["skipped"])
            for name, writer in state.splits.items():
                writer.restore(journal["splits"][name])
        except (OSError, ValueError, KeyError, TypeError):
            state.abandon()
            return None
        (work / "shards" / MANIFEST).unlink(missing_ok=True)
        return state

    def save(self, work: Path) -> None:
        """Make everything so far durable, then say so in the journal."""
        splits = {name: writer.note() for name, writer in self.splits.items()}
        sync_folder(work / "shards")
        counts = {"parts": self.parts, "bytes": self.bytes, "max_id": self.max_id, "skipped": self.skipped}
        journal = {"request": self.request, "splits": splits, **counts}
        replace_file(work / JOURNAL, json.dumps(journal).encode())

    def take(self, split: str, part: Part, path: Path, result: Tokenized, threshold: int) -> None:
        """Append a tokenised part, whose ids lie at `path`, and delete that file."""
        names = [("val" if h < threshold else "train") if split == "hash" else split for h in result.hashes]
        rows = zip(names, result.tokens, result.bytes, strict=True)
        with open(path, "rb") as ids:
            for name, run in itertools.groupby(rows, key=lambda row: row[0]):
                _, tokens, sizes = zip(*run, strict=True)
                self.splits[name].add(ids, tokens, sum(sizes), whole=part.fragment != "middle")
        os.unlink(path)
        self.skipped.update(result.skipped)
        self.max_id = max(self.max_id, result.max_id)
        self.bytes += part.stored_bytes
        self.parts += 1

    def abandon(self) -> None:
        """Close the files as they are."""
        for writer in self.splits.values():
            writer.abandon()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when this one ends, however that comes."""
    while True:
        make_folder(path.parent)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open while the lock is held)
        if lock_file(file) is False:  # where there are no locks we go on without
            file.seek(0)
            pid = file.read(20).decode(errors="replace") or "unknown"
            file.close()
            raise DataError(
                f"{out} is being prepared by another process, pid {pid}.", hint="wait for it, or stop it"
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its folder was removed by the process that had it, which has finished
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield
    finally:
        file.close()
