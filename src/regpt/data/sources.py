"""Where text comes from, a file, folder, glob, named set or data set of the hub: a list of files, then parts to work on.

Nothing is read whole: a part is a range of a file that one process turns into documents (`regpt.data.documents`)
without seeing the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import json
import lzma
import mmap
import os
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import xxhash

from regpt.config import VAL_FRACTION, DataConfig
from regpt.data.articles import articles
from regpt.data.documents import (
    DELIMITERS,
    HEAD_BYTES,
    PIECE_BYTES,
    Form,
    Fragment,
    Part,
    TextScan,
    cut_near,
    require_parquet,
    row_groups,
    text_rows,
)
from regpt.data.download import Note, unheard
from regpt.data.hub import PREFIX, Files, Spec, find
from regpt.data.named import NAMED_SETS, ROWS_ARE_LINES, NamedSet
from regpt.data.ranged import RangedFile
from regpt.errors import ConfigError, DataError, did_you_mean, missing_package
from regpt.paths import nearest_existing, user_path
from regpt.tokenizers.download import cache_folder, fetch

# A fifth of a second of tokenising: small enough to share out, much more than its overhead.
PART_BYTES = 4 << 20
STREAM_BYTES = 8 << 20  # asked for at once of a file that is read from its server from the beginning on
CONTENT_BYTES = 256 << 20  # larger sources are known by sizes and times, smaller ones by their content

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# Not library code, or large tables that are no prose in any language (encodings, pydoc_data).
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "encodings",
    "pydoc_data",
}

PACKINGS = (".gz", ".xz", ".zst")
# Unpacked together: the library gives all at once, and four bytes may stand for 128 KiB.
ZSTANDARD_BYTES = 1 << 10
# How much larger text is than its file: a rough figure for the estimate of disk, from English text.
UNPACKED_RATIO = {"": 1, ".gz": 3, ".xz": 4, ".zst": 3, ".parquet": 2}


@dataclass(frozen=True)
class SourceFile:
    """One file of a source."""

    path: Path
    label: str
    """Its name within the source, with forward slashes: what sorting and fingerprint go by."""
    form: Form
    packing: Literal["", ".gz", ".xz", ".zst"]
    size: int
    remote: tuple[Files, int] | None = field(default=None, compare=False, repr=False)
    """The download that it is a file of, and its number there."""
    streamed: bool = field(default=False, compare=False)
    """Read from its server as it is needed, unless it is on this machine: no copy is made."""

    @classmethod
    def of(cls, path: Path, label: str, remote: tuple[Files, int] | None = None) -> SourceFile:
        """The file at `path`; its form follows from its name. It need not be there yet if it is `remote`."""
        suffixes = [s.lower() for s in path.suffixes[-2:]]
        packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else ""
        inner = suffixes[-1] if suffixes else ""
        lines = (".jsonl", ".ndjson", ".json") if remote else (".jsonl", ".ndjson")
        form: Form = "jsonl" if inner in lines else "parquet" if inner == ".parquet" else "text"
        if form == "parquet" and packing:
            raise DataError(f"{path}: parquet is packed inside already; unpack the {packing} around it.")
        size = remote[0].entries[remote[1]].size if remote else path.stat().st_size
        return cls(path, label, form, cast(Literal["", ".gz", ".xz", ".zst"], packing), size, remote)

    def local(self) -> Path:
        """Where it lies on this machine, downloaded now if it is not here."""
        return self.remote[0].local(self.remote[1]) if self.remote else self.path

    def ranged(self) -> RangedFile | None:
        """The file on its server, where it is to be read there."""
        return self.remote[0].ranged(self.remote[1]) if self.remote and self.streamed else None

    def stored(self) -> Path | RangedFile:
        """Where it is read: on its server, or on this machine, downloaded now if it is not here."""
        return self.ranged() or self.local()

    @property
    def known_hash(self) -> str | None:
        """The hash that its server lists; None of a file of this machine."""
        return self.remote[0].entries[self.remote[1]].digest if self.remote else None


@dataclass(frozen=True)
class Source:
    """Text by the name that the user gave it. Made by `open_source`."""

    spec: str
    """What the user wrote; of a data set of the hub with the commit and the split that it stands for."""
    name: str
    """Short and fit for a file name."""
    files: tuple[SourceFile, ...]
    text_field: str = "text"
    """The field that holds the text in JSONL and parquet."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Files left out while listing, by reason."""
    rows_are_lines: bool = False
    """Each row is a line of an article (`regpt.data.articles`), not a document."""

    @property
    def missing_bytes(self) -> int:
        """What is still to be downloaded."""
        return sum(d.missing_bytes for d in self.downloads)

    @property
    def downloads(self) -> list[Files]:
        """What its files come by, those that are streamed aside."""
        return list(
            {id(f.remote[0]): f.remote[0] for f in self.files if f.remote and not f.streamed}.values()
        )

    @property
    def passes(self) -> bool:
        """Whether its files are here only to pass."""
        return any(d.passing for d in self.downloads)

    @property
    def stored_bytes(self) -> int:
        """Size of the files as they are."""
        return sum(f.size for f in self.files)

    @property
    def source_bytes(self) -> int:
        """Estimated bytes of text."""
        return sum(
            f.size * UNPACKED_RATIO[".parquet" if f.form == "parquet" else f.packing] for f in self.files
        )

    @cached_property
    def fingerprint(self) -> str:
        """Hex; another one when the files change: their content, or above 256 MiB their sizes and times."""
        by_content = self.stored_bytes <= CONTENT_BYTES
        digest = xxhash.xxh3_128(f"{self.text_field}\0{by_content}".encode("utf-8", "surrogateescape"))
        if self.rows_are_lines:
            digest.update(b"\0articles")
        for f in self.files:
            digest.update(f"\0{f.label}\0{f.size}\0".encode("utf-8", "surrogateescape"))
            # A listed hash needs no download, and is the same at every commit that has the file.
            if f.known_hash:
                digest.update(f.known_hash.encode())
            elif by_content:
                with open(f.path, "rb") as file:
                    while block := file.read(PIECE_BYTES):
                        digest.update(block)
            else:
                digest.update(str(f.path.stat().st_mtime_ns).encode())
        return digest.hexdigest()

    @cached_property
    def scan(self) -> TextScan | None:
        """What one pass over the only file found, if that is a text file; None for any other source."""
        if len(self.files) != 1 or self.files[0].form != "text":
            return None
        file = self.files[0]
        with unpacked(file) as (stream, _):
            return TextScan.of(iter(lambda: read_block(stream, file.path), b""))

    @cached_property
    def single_text(self) -> bool:
        """One text without `<|endoftext|>` between documents: split by position, as nanoGPT does."""
        if self._separated_early:
            return False
        return self.scan is not None and self.scan.is_text and not self.scan.separated

    @property
    def _separated_early(self) -> bool:
        """Whether that stands near the beginning: then nobody need read, or download, the file to know."""
        if len(self.files) != 1 or self.files[0].form != "text" or not self.files[0].remote:
            return False
        with unpacked(dataclasses.replace(self.files[0], streamed=True)) as (stream, _):
            begin = b""
            while len(begin) < PART_BYTES and (block := read_block(stream, self.files[0].path)):
                begin += block
        return DELIMITERS["text"] in begin

    def streamed(self, *, packed: bool = True) -> Source:
        """The same text, read from its server as it is needed, with no copy on this machine; the parts are the same.

        Args:
            packed: also files that have to be read from their beginning to reach a part.
        """
        if not any(f.remote for f in self.files):
            return self
        files = (
            dataclasses.replace(f, streamed=f.remote is not None and (packed or not f.packing))
            for f in self.files
        )
        return dataclasses.replace(self, files=tuple(files))

    @property
    def to_look_into(self) -> Source:
        """The same text for whoever reads it before it is read for good: no file comes that is only to pass."""
        return self.streamed() if self.passes else self

    def passing(self, folder: Path) -> Source:
        """The same text, downloaded into `folder` only to pass: `discard_before` removes what is done with."""
        if self.rows_are_lines:  # no file of which is done with before all are
            return self.streamed()
        if not self.downloads:
            return self
        passing = {id(d): dataclasses.replace(d, passing=folder) for d in self.downloads}
        files = []
        for f in self.files:
            remote = (passing[id(f.remote[0])], f.remote[1]) if f.remote else None
            files.append(
                dataclasses.replace(f, path=remote[0].path(remote[1]), remote=remote) if remote else f
            )
        return dataclasses.replace(self, files=tuple(files))

    def discard_before(self, number: int) -> None:
        """Remove the files before this one, if they are here only to pass."""
        for download in self.downloads:
            download.discard_before(number)

    def ranged(self, part: Part) -> RangedFile | None:
        """The file on its server that `documents` is to read the part from, if it is not on this machine."""
        return None if part.temporary else self.files[part.file].ranged()

    def parts(self, work: Path, *, within: range | None = None, first_file: int = 0) -> Iterator[Part]:
        """The source in order, the same parts every time.

        Args:
            work: a folder for pieces of packed files; who reads such a part (`Part.temporary`) deletes it.
            within: only parts that begin within these of `stored_bytes`, counted through all files.
            first_file: where to begin; the same parts as if those before had been passed over.
        """
        if any(f.form == "parquet" for f in self.files):
            require_parquet()
        at = 0
        for number, (files, parts) in enumerate(self._parts_by_file(work)):
            begin, end = at, at + sum(f.size for f in files)
            at = end
            outside = within is not None and (begin >= within.stop or (end <= within.start and end > begin))
            if number < first_file or outside:
                continue
            for part in parts:
                if within is None or begin in within:
                    yield dataclasses.replace(part, file=number)
                else:
                    part.delete_if_temporary()
                    if begin >= within.stop:
                        break
                begin += part.stored_bytes

    def _parts_by_file(self, work: Path) -> Iterator[tuple[tuple[SourceFile, ...], Iterator[Part]]]:
        """The parts of each file; of articles, which go on from file to file, of all of them."""
        if self.rows_are_lines:
            yield self.files, self._article_parts(work / "articles")
        else:
            for number, f in enumerate(self.files):
                yield (f,), self._parts_of(f, work / f"unpacked-{number}")

    def _parts_of(self, f: SourceFile, unpacked_prefix: Path) -> Iterator[Part]:
        stored = f.stored()
        if f.form == "parquet":
            groups = row_groups(stored, self.text_field)
            for g in range(groups):
                yield self._part(f, g, g + 1, f.size * (g + 1) // groups - f.size * g // groups)
        elif f.packing:
            yield from self._unpacked_parts(f, unpacked_prefix)
        else:
            for start in range(0, max(f.size, 1), PART_BYTES):
                end = min(start + PART_BYTES, f.size)
                yield self._part(f, start, end, end - start)

    def _part(self, f: SourceFile, start: int, end: int, stored: int) -> Part:
        label = f.label if f.streamed else str(f.path)
        return Part(str(f.path), label, f.form, start, end, stored, text_field=self.text_field)

    def _unpacked_parts(self, f: SourceFile, prefix: Path) -> Iterator[Part]:
        """A packed file, unpacked into plain files of about PART_BYTES that end where a record ends."""
        delimiter = DELIMITERS[f.form]
        with unpacked(f) as (stream, position):
            offset = line = stored = number = 0
            carried, ended = b"", False
            while not ended:
                path, size, lines, edge = f"{prefix}-{number}", 0, 0, b""
                with open(path, "wb") as out:
                    cut = -1
                    while cut < 0 and not ended:
                        block = carried or read_block(stream, f.path)
                        carried, ended = b"", not block
                        if offset + size == 0 and f.form == "text" and b"\0" in block[:HEAD_BYTES]:
                            ended = True  # binary: who reads this piece says so; the rest is left
                        if size + len(block) >= PART_BYTES:
                            found = (edge + block).rfind(delimiter)
                            cut = found + len(delimiter) - len(edge) if found >= 0 else -1
                        kept = block[:cut] if cut >= 0 else block
                        carried = block[len(kept) :]
                        out.write(kept)
                        size, lines = size + len(kept), lines + kept.count(b"\n")
                        edge = (edge + kept)[-(len(delimiter) - 1) :] if len(delimiter) > 1 else b""
                done = f.size if ended else position()
                whole = self._part(f, 0, size, done - stored)
                yield dataclasses.replace(whole, path=path, offset=offset, line=line, temporary=True)
                offset, line, stored, number = offset + size, line + lines, done, number + 1

    def _article_parts(self, prefix: Path) -> Iterator[Part]:
        """Rows joined into articles over all files, in pieces of about PART_BYTES, as JSON lines."""
        stored = done = 0

        def rows() -> Iterator[str | None]:
            nonlocal done
            for f in self.files:
                stored_at = f.stored()
                row_groups(stored_at, self.text_field)  # has it the field?
                begun = done
                for share, row in text_rows(stored_at, self.text_field):
                    done = begun + int(f.size * share)
                    yield row
                done = begun + f.size

        every = articles(rows())
        for number in itertools.count():
            lines, size = [], 0
            for article in every:
                lines.append(json.dumps({self.text_field: article}).encode() + b"\n")
                size += len(lines[-1])
                if size >= PART_BYTES:
                    break
            if not lines:
                return
            path = Path(f"{prefix}-{number}")
            path.write_bytes(b"".join(lines))
            part = Part(str(path), self.spec, "jsonl", 0, size, done - stored, text_field=self.text_field)
            yield dataclasses.replace(part, temporary=True)
            stored = done

    def text_parts(self, work: Path, first_chars: int) -> Iterator[tuple[int, Part]]:
        """A single text as two documents, the first of `first_chars` characters: (0 or 1, part) in order.

        Every part is a fragment of its document, cut where no token can reach across.
        """
        scan, f = self.scan, self.files[0]
        assert scan is not None
        path = f.local()
        if f.packing:
            path = work / "unpacked-text"
            with unpacked(f) as (stream, _), open(path, "wb") as out:
                while block := read_block(stream, f.path):
                    out.write(block)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            middle = scan.byte_offset(data, first_chars)
            for document, (begin, stop) in enumerate(((0, middle), (middle, len(data)))):
                at = begin
                while at < stop:
                    end = cut_near(data, at + PART_BYTES, stop)
                    last: Fragment = "last" if end == stop else "middle"
                    stored = (f.size * end // len(data)) - (f.size * at // len(data))
                    yield document, Part(str(path), str(f.path), "text", at, end, stored, fragment=last)
                    at = end


def open_source(
    spec: str,
    *,
    text_field: str = "text",
    split: str = "train",
    network: bool = True,
    note: Note = unheard,
) -> Source:
    """The source called `spec`: a named set, a data set of the hub (`hf:…`), a file, a folder, or a glob.

    Args:
        split: of a data set of the hub; without meaning for other sources.
        network: False asks nobody: what was not downloaded or asked for before is not found.
        note: hears a sentence now and then while something is downloaded.

    Raises:
        DataError: nothing is called so, or there is no file in it.
    """
    path, named = user_path(spec), _named(spec)
    if spec == "shakespeare" and not path.exists():
        path = _shakespeare(network)
        return Source(spec, spec, (SourceFile.of(path, spec),))
    if (hub_spec := named.spec if named else spec if spec.startswith(PREFIX) else None) is not None:
        return _from_hub(spec, hub_spec, text_field, split, network, note)
    skipped: Counter[str] = Counter()
    if spec == "python-stdlib" and not path.exists():
        library = Path(sysconfig.get_path("stdlib"))
        found = [p for p in _under(library, NOT_LIBRARY, Counter()) if p.suffix == ".py"]
        files = [SourceFile.of(p, p.relative_to(library).as_posix()) for p in found]
        name = f"{spec}-{sys.version_info.major}.{sys.version_info.minor}"
    elif path.is_dir():
        files = [
            SourceFile.of(p, p.relative_to(path).as_posix()) for p in _under(path, {"__pycache__"}, skipped)
        ]
        name = path.resolve().name
    elif path.exists():
        if not path.is_file():  # a pipe would be waited for
            raise DataError(f"{spec} is neither a file nor a folder.")
        files, name = [SourceFile.of(path, path.name)], path.name
    elif glob.has_magic(str(path)):
        matches = (Path(p) for p in glob.glob(str(path), recursive=True))
        files = [SourceFile.of(p, p.as_posix()) for p in matches if p.is_file()]
        name = "-".join(part for part in path.parts[-2:] if part != path.anchor)
    else:
        raise DataError(
            f"there is no file, folder or named set {spec!r}.{did_you_mean(spec, NAMED_SETS)}",
            expected=f"a text, JSONL or parquet file, a folder, a glob, hf:owner/name, or one of {', '.join(NAMED_SETS)}",
            hint="--data.source FILE (of `regpt prepare`: the first argument)",
        )
    if not files:
        left_out = reasons(skipped)
        got = f"nothing but what is left out: {left_out}" if left_out else None
        raise DataError(
            f"{spec}: no text file found.", got=got, hint="a folder or glob that holds text, JSONL or parquet"
        )
    return Source(spec, _short(name), tuple(sorted(files, key=lambda f: f.label)), text_field, dict(skipped))


@contextlib.contextmanager
def unpacked(f: SourceFile) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """The file's bytes as a stream, and a function that tells how much of the file was read."""
    ranged = f.ranged()
    opened: BinaryIO = (
        cast(BinaryIO, io.BufferedReader(ranged.again(), STREAM_BYTES)) if ranged else open(f.local(), "rb")  # noqa: SIM115 (closed below)
    )
    with opened as stored:
        if f.packing == ".gz":
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=stored))
        elif f.packing == ".xz":
            stream = cast(BinaryIO, lzma.LZMAFile(stored))  # noqa: SIM115 (closed below)
        elif f.packing == ".zst":
            stream = cast(BinaryIO, io.BufferedReader(_Zstandard(stored), PIECE_BYTES))
        else:
            stream = stored
        with stream:
            yield stream, stored.tell


def read_block(stream: BinaryIO, path: Path) -> bytes:
    """The next block of an unpacked stream; b"" at its end. Damaged packing is a DataError."""
    try:
        return stream.read(PIECE_BYTES)
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno is not None:
            raise
        raise DataError(f"{path} is damaged or not what its name says: {e}") from None


class _Zstandard(io.RawIOBase):
    """A .zst file unpacked, frame after frame. The library's own reader takes a file that is cut off for a whole one."""

    def __init__(self, stored: BinaryIO) -> None:
        try:
            import zstandard
        except ImportError:
            raise missing_package("zstandard", "data", "reading .zst files") from None
        self.stored, self.library = stored, zstandard
        self.frame: Any = None
        self.packed = self.data = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.data:
            within = self.frame is not None and not self.frame.eof
            self.packed = self.packed or memoryview(self.stored.read(1 << 17))
            if not self.packed:
                if within:
                    raise EOFError("it ends inside a frame")
                return 0
            if not within:
                self.frame = self.library.ZstdDecompressor().decompressobj()
            piece = self.packed[:ZSTANDARD_BYTES]
            try:
                self.data = memoryview(self.frame.decompress(piece))
            except self.library.ZstdError as e:
                raise EOFError(str(e)) from None
            self.packed = self.packed[len(piece) - len(self.frame.unused_data) :]
        n = min(len(buffer), len(self.data))
        buffer[:n], self.data = self.data[:n], self.data[n:]
        return n


def _under(folder: Path, without: set[str], skipped: Counter[str]) -> Iterator[Path]:
    """Every file under `folder` that is not hidden; folders called as in `without` are left out."""
    for here, folders, files in os.walk(folder):
        skipped["hidden"] += sum(n.startswith(".") for n in folders + files)
        folders[:] = [n for n in folders if not n.startswith(".") and n not in without]
        yield from (p for n in files if not n.startswith(".") and (p := Path(here, n)).is_file())


def open_sources(
    d: DataConfig, *, network: bool = True, note: Note = unheard
) -> tuple[Source, Source | None, float | None]:
    """The training text of `d`, its validation text if that is one of its own, and else the share to hold out.

    A named set with a validation split of its own is validated on that, unless `d` says otherwise.
    """

    def opened(spec: str, split: str) -> Source:
        return open_source(spec, text_field=d.text_field, split=split, network=network, note=note)

    def held_out(spec: str) -> Source:
        named = _named(spec)
        return opened((named and named.val_spec) or spec, d.val_split or "validation")

    if d.val_fraction is not None and d.val_split is not None:
        note(f"data.val_fraction={d.val_fraction:g} is without effect: the split {d.val_split} is held out")
    source, named = opened(d.source, d.split), _named(d.source)
    if d.val_source is not None:
        val_source = held_out(d.val_source)
    elif d.val_split is not None or (named and named.val_split and d.val_fraction is None):
        val_source = held_out(d.source)
    else:
        val_source = None
    split = None if d.split == DataConfig.split else d.split
    for name, said, of in (("split", split, source), ("val_split", d.val_split, val_source)):
        if said is not None and of is not None and not of.files[0].remote:
            raise ConfigError(f"data.{name}={said}: {of.spec} has no splits; data sets of the hub have.")
    held = {f.known_hash for f in val_source.files if f.remote} if val_source else set()
    if val_source and (both := held & {f.known_hash for f in source.files}):
        raise DataError(
            f"{val_source.spec} is part of the training text.",
            got=f"{len(both)} files in both",
            hint="another --val-split, or --val-fraction to hold documents out",
        )
    if val_source is not None:
        return source, val_source, None
    return source, None, VAL_FRACTION if d.val_fraction is None else d.val_fraction


def reasons(skipped: Mapping[str, int]) -> str:
    """What was left out, for a message: 3 binary, 1 empty."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(skipped.items()) if n)


def _named(spec: str) -> NamedSet | None:
    """The named set that `spec` is, unless a file is called so."""
    return None if user_path(spec).exists() else NAMED_SETS.get(spec)


def missing_on(disk: Path, *sources: Source | None) -> int:
    """Bytes that downloads of the sources will take of the disk that the folder `disk` lies on."""
    on_it = [d for s in sources if s for d in s.downloads if _disk(d.landing) == _disk(disk)]
    return sum(d.room_bytes for d in on_it)


def _disk(folder: Path) -> int:
    return nearest_existing(folder).stat().st_dev


def _from_hub(asked: str, spec: str, text_field: str, split: str, network: bool, note: Note) -> Source:
    """A split of a data set of the hub; its files are downloaded when they are reached."""
    found = find(spec, split, network=network, note=note)
    repo = Spec.parse(spec).repo
    files = [SourceFile.of(found.path(n), e.path, (found, n)) for n, e in enumerate(found.entries)]
    name = asked if asked in NAMED_SETS else asked.removeprefix(PREFIX).partition("@")[0]
    full = f"{found.spec}#{split}"
    lines = repo in ROWS_ARE_LINES and all(f.form == "parquet" for f in files)
    return Source(full, _short(name), tuple(files), text_field, rows_are_lines=lines)


def known_text(spec: str) -> str:
    """The named set that `spec` is: itself, or, of a file with the very bytes of one, that one's name."""
    path = user_path(spec)
    if not path.is_file() or path.stat().st_size > 10**7:
        return spec
    return "shakespeare" if hashlib.sha256(path.read_bytes()).hexdigest() == SHAKESPEARE_SHA256 else spec


def _shakespeare(network: bool) -> Path:
    """Tiny Shakespeare, downloaded once."""
    path = cache_folder() / "tinyshakespeare.txt"
    if not network and not path.exists():
        raise DataError("shakespeare has not been downloaded yet.")
    fetch(
        os.environ.get("REGPT_SHAKESPEARE_URL", SHAKESPEARE_URL),
        sha256=SHAKESPEARE_SHA256,
        keep=path,
        hint="download it elsewhere and name the file in place of shakespeare: regpt prepare input.txt …",
    )
    return path


def _short(name: str) -> str:
    """A name for folders: suffixes off, nothing that a file system or a shell minds."""
    name = re.sub(r"(\.(txt|jsonl|ndjson|parquet|gz|xz|zst))+$", "", name, flags=re.IGNORECASE)
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:40] or "text"
