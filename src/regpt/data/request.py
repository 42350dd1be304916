"""What is asked of a preparation: the text, its split, which documents; and what follows from that before any work."""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.data.documents import Document, Part, documents
from regpt.data.sources import Source
from regpt.data.workers import document_hash
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer

HASHES = 1 << 64
MOST_SLICES = 1 << 20


@dataclass(frozen=True)
class Slice:
    """One of several equal stretches of a source, each prepared by itself and merged afterwards (`regpt.data.merge`)."""

    number: int
    """From 1."""
    of: int

    @classmethod
    def parse(cls, written: str) -> Slice:
        """ "3/8" is the third of eight. Raises ConfigError for anything else."""
        number, _, of = written.partition("/")
        try:
            found = cls(int(number), int(of))
        except ValueError:
            found = cls(0, 0)
        if not 1 <= found.number <= found.of <= MOST_SLICES:
            raise ConfigError(
                "--slice is not a slice.",
                got=written[:40],
                expected="i/n: 1/8 is the first of eight, 8/8 the last",
            )
        return found

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def within(self, total: int) -> range:
        """Which of `total` bytes; the last slice also has what begins at their end, such as an empty file."""
        last = self.number == self.of
        return range(total * (self.number - 1) // self.of, total * self.number // self.of + last)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which documents of a source are taken, and in which order."""

    dedup: bool = False
    """Leave out documents whose text is that of an earlier one."""
    min_chars: int = 0
    """Leave out documents with fewer characters."""
    shuffle_seed: int | None = None
    """Draws the order of the training documents. None: as they come."""
    slice: Slice | None = None
    """Only this stretch of the source."""

    def check(self) -> None:
        """Raises ConfigError for what no number of characters, or no seed, can be."""
        if self.min_chars < 0:
            raise ConfigError("data.min_chars must not be negative.", got=self.min_chars)
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ConfigError("data.shuffle_seed must not be negative.", got=self.shuffle_seed)

    def asked(self) -> dict[str, Any]:
        """What differs from taking all as it comes, as the manifest keeps it."""
        differs = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }
        return differs | ({"slice": str(self.slice)} if self.slice else {})


EVERYTHING = Selection()


@dataclass(frozen=True)
class Request:
    """All that decides the bytes of the shards."""

    source: Source
    val_fraction: float | None
    val_source: Source | None
    tokenizer: Tokenizer
    shard_tokens: int
    selection: Selection = EVERYTHING

    @property
    def facts(self) -> dict[str, Any]:
        """As the manifest keeps it."""
        return {
            "source": self.source.fingerprint,
            "val_fraction": self.val_fraction,
            "val_source": self.val_source.fingerprint if self.val_source else None,
            "tokenizer": self.tokenizer.fingerprint,
            "shard_tokens": self.shard_tokens,
        } | self.selection.asked()

    @property
    def single_texts(self) -> tuple[str, ...]:
        """Splits that are one text, or a part of one."""
        own = {"train": self.source, "val": self.val_source or self.source}
        return tuple(name for name, source in own.items() if source.single_text)

    @property
    def stored_bytes(self) -> int:
        """Of all files."""
        return self.source.stored_bytes + (self.val_source.stored_bytes if self.val_source else 0)

    @property
    def within(self) -> range:
        """Which of `stored_bytes` are asked for."""
        return (self.selection.slice or Slice(1, 1)).within(self.stored_bytes)

    @property
    def within_bytes(self) -> int:
        """How many of `stored_bytes` are asked for."""
        return min(self.within.stop, self.stored_bytes) - self.within.start

    @property
    def source_bytes(self) -> int:
        """Estimated bytes of text that are asked for."""
        text = self.source.source_bytes + (self.val_source.source_bytes if self.val_source else 0)
        return text // (self.selection.slice.of if self.selection.slice else 1)

    def discard_before(self, file: int) -> None:
        """Remove the files before this one, those of `source` counted first, where they are here only to pass."""
        self.source.discard_before(file)
        if self.val_source:
            self.val_source.discard_before(max(file - len(self.source.files), 0))

    def parts(self, work: Path, first_file: int = 0) -> Iterator[tuple[str, Part]]:
        """Every part that is asked for, from `first_file` on, with its split: train, val, or hash where each document
        goes by its hash."""
        found = split_parts(self.source, self.val_fraction, work, self.within, first_file)
        if self.val_source:
            begin, n_files = self.source.stored_bytes, len(self.source.files)
            within = range(self.within.start - begin, self.within.stop - begin)
            later = split_parts(self.val_source, 0, work / "val", within, first_file - n_files)
            of_its_own = (("val", dataclasses.replace(p, file=p.file + n_files)) for _, p in later)
            found = itertools.chain(found, of_its_own)
        least = self.selection.min_chars
        return ((name, dataclasses.replace(p, min_chars=least)) for name, p in found)


def split_parts(
    source: Source, val_fraction: float | None, work: Path, within: range | None = None, first_file: int = 0
) -> Iterator[tuple[str, Part]]:
    """The parts of one source that begin `within` its stored bytes, each with its split."""
    if not source.single_text:
        name = "hash" if val_fraction else "train"
        yield from ((name, part) for part in source.parts(work, within=within, first_file=first_file))
        return
    scan, at = source.scan, 0
    assert scan is not None
    chars = int(scan.chars * (1 - (val_fraction or 0)))
    for n, part in source.text_parts(work, chars) if first_file <= 0 else ():
        if within is None or at in within:
            yield ("train", "val")[n], part
        at += part.stored_bytes


def read(source: Source, parts: Iterable[Part], min_chars: int = 0) -> Iterator[Document]:
    """Documents of parts of `source` that have so many characters, read here, in this process."""
    for part in parts:
        yield from documents(dataclasses.replace(part, min_chars=min_chars), Counter(), source.ranged(part))
        part.delete_if_temporary()


# --- what is held out -------------------------------------------------------------------------------------------------


def check_single_text(source: Source, val_fraction: float | None) -> None:
    """Refuse a text that is not text, or leaves nothing for one of its splits."""
    if not source.single_text:
        return
    scan = source.scan
    assert scan is not None
    if scan.invalid_at is not None:
        raise DataError(
            f"{source.files[0].path} is not valid UTF-8 at byte {scan.invalid_at}.",
            hint="convert it, for example: iconv -f LATIN1 -t UTF-8 FILE",
        )
    if scan.chars and val_fraction and int(scan.chars * (1 - val_fraction)) in (0, scan.chars):
        raise DataError(
            f"{source.spec}: {scan.chars} characters cannot be split with val_fraction={val_fraction}."
        )


def threshold_of(source: Source, val_fraction: float | None, work: Path, min_chars: int = 0) -> int:
    """Documents with a smaller hash are held out: none of a text that is split by position.

    Else that is `val_fraction` of all hashes, or, if no document has such a hash, just enough for the smallest one. Reads
    no further than to the first document of either kind.
    """
    if not val_fraction or source.single_text:
        return 0
    threshold = int(val_fraction * HASHES)
    lowest, kept, seen = HASHES, False, 0
    for document in _documents(source, work, min_chars):
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
    if noun is None and (share := _share(source, lowest, work, min_chars)) > 0.5:
        noun = f"{share:.0%} of the text (equal documents stay together)"
    if noun is not None:
        raise DataError(
            f"{source.spec}: val_fraction={val_fraction} would hold out {noun} or nothing.",
            hint="--val-fraction 0, or validation text of its own: --val-source",
        )
    return lowest + 1


def _share(source: Source, hashed: int, work: Path, min_chars: int) -> float:
    """How much of the text the documents of this hash are; reads all of it."""
    held = total = 0
    for document in _documents(source, work, min_chars):
        if (own := document_hash(document)) is not None:
            size = sum(len(piece) for piece in document())
            total, held = total + size, held + size * (own == hashed)
    return held / max(total, 1)


def _documents(source: Source, work: Path, min_chars: int) -> Iterator[Document]:
    with tempfile.TemporaryDirectory(dir=work) as folder:
        source = source.to_look_into
        yield from read(source, source.parts(Path(folder)), min_chars)
