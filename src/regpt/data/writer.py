"""One split's files of ids while they are written: cut at a given size, hashed on the way, and picked up after a crash."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from regpt.data.shards import ShardFile, SplitFacts
from regpt.data.split import Ids

COPY_BYTES = 1 << 20


class Readable(Protocol):
    """Where ids come from: an open file, or anything that is read forwards."""

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes."""


@dataclass
class _Totals:
    """What a split has so far; in the journal as it is."""

    tokens: int = 0
    documents: int = 0
    source_bytes: int = 0
    longest: int = 0
    unended: int = 0
    """Tokens of the document under way."""
    tokens_here: int = 0
    """In the file under way."""
    documents_here: int = 0


class SplitWriter:
    """One split's files, each full but the last."""

    def __init__(self, folder: Path, name: str, itemsize: int, shard_tokens: int) -> None:
        self.folder, self.name, self.itemsize, self.shard_tokens = folder, name, itemsize, shard_tokens
        self.files: list[ShardFile] = []
        self.total = _Totals()
        self.ids, self.index = _HashedFile(), _HashedFile()

    def add(self, ids: Readable, lengths: Ids, source_bytes: int, *, whole: bool) -> None:
        """Copy documents of these lengths (n,), n > 0; unless `whole`, the last one goes on in the next call."""
        full = np.array(lengths, dtype=np.int64)
        ends, size, done = np.cumsum(full), int(full.sum()), 0
        full[0] += self.total.unended
        self.total.unended = 0
        if not whole:
            self.total.unended = int(full[-1])
            full, ends = full[:-1], ends[:-1]
        while done < size:
            if not self.ids.is_open or self.total.tokens_here == self.shard_tokens:
                self._next_file()
            n = min(size - done, self.shard_tokens - self.total.tokens_here, COPY_BYTES)
            self.ids.write(ids.read(n * self.itemsize))
            first, last = np.searchsorted(ends, (done, done + n), side="right")
            here = ends[first:last] - done + self.total.tokens_here
            self.index.write(here.astype("<u8").tobytes())
            self.total.tokens_here += n
            self.total.documents_here += len(here)
            done += n
        self.total.tokens += size
        self.total.source_bytes += source_bytes
        self.total.documents += len(full)
        self.total.longest = max(self.total.longest, int(full.max(initial=0)))

    def finish(self) -> list[ShardFile]:
        """All files, closed and durable."""
        if self.ids.is_open:
            self.sync()
            t, name = self.total, self._name(len(self.files))
            digests = (self.ids.digest.hexdigest(), self.index.digest.hexdigest())
            self.files.append(
                ShardFile(name, self.name, t.tokens_here, t.documents_here, self.ids.size, *digests)
            )
            self.abandon()
            t.tokens_here = t.documents_here = 0
        return self.files

    def sync(self) -> None:
        """Make what is written durable."""
        for file in (self.ids.file, self.index.file):
            if file is not None:
                os.fsync(file.fileno())

    def abandon(self) -> None:
        """Close the files as they are."""
        self.ids.close()
        self.index.close()

    def facts(self) -> SplitFacts:
        """The totals, for the manifest."""
        t = self.total
        return SplitFacts(t.tokens, t.documents, t.source_bytes, t.longest)

    def note(self) -> dict[str, Any]:
        """Everything that `restore` needs; the files are durable."""
        self.sync()
        files = [dataclasses.asdict(f) for f in self.files]
        return {"files": files, "total": dataclasses.asdict(self.total), "open": self.ids.is_open}

    def restore(self, noted: dict[str, Any]) -> None:
        """Files as they were noted; what was written behind that is cut off. Raises ValueError if they are not there."""
        self.files = [ShardFile(**f) for f in noted["files"]]
        self.total = _Totals(**noted["total"])
        known = {name for f in self.files for name in (f.name, f.index_name)}
        if any((self.folder / f.name).stat().st_size != f.bytes for f in self.files):
            raise ValueError("a finished file has changed")
        if noted["open"]:
            path = self.folder / self._name(len(self.files))
            self.ids.open(path, self.total.tokens_here * self.itemsize)
            self.index.open(path.with_suffix(".idx"), self.total.documents_here * 8)
            known |= {path.name, path.with_suffix(".idx").name}
        for path in self.folder.glob(f"{self.name}-*"):
            if path.name not in known:
                path.unlink()

    def _next_file(self) -> None:
        self.finish()
        path = self.folder / self._name(len(self.files))
        self.ids.open(path)
        self.index.open(path.with_suffix(".idx"))

    def _name(self, number: int) -> str:
        return f"{self.name}-{number:05d}.bin"


class _HashedFile:
    """A file that is hashed while it is written."""

    def __init__(self) -> None:
        self.file: FileIO | None = None
        self.digest, self.size = xxhash.xxh3_128(), 0

    @property
    def is_open(self) -> bool:
        return self.file is not None

    def open(self, path: Path, size: int = 0) -> None:
        """Go on behind the first `size` bytes, which must be there; the rest is cut off."""
        self.file, self.digest, self.size = FileIO(path, "ab+"), xxhash.xxh3_128(), 0
        self.file.seek(0)
        while block := self.file.read(min(COPY_BYTES, size - self.size)):
            self.digest.update(block)
            self.size += len(block)
        if self.size != size:
            raise ValueError(f"{path} is shorter than noted")
        self.file.truncate()

    def write(self, data: bytes) -> None:
        assert self.file is not None
        self.digest.update(data)
        self.size += len(data)
        rest = memoryview(data)
        while rest:  # a write may take less than it was given
            rest = rest[self.file.write(rest) :]

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        self.file = None
