"""Shard files read forwards as one stream of documents, in constant memory: what merging and shuffling do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from regpt.data.shards import ShardFile
from regpt.data.split import Ids
from regpt.errors import DataError

BLOCK_BYTES = 1 << 20

Files = list[tuple[Path, ShardFile]]
"""Folder and file of each."""


class StoredIds:
    """The bytes of ids of several files, one file after the other."""

    def __init__(self, files: Files) -> None:
        self._paths = (folder / f.name for folder, f in files)
        self._file: BinaryIO | None = None

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes. Raises DataError where the files end before."""
        found = b""
        while len(found) < n:
            block = self._file.read(n - len(found)) if self._file else b""
            if not block:
                self._next()
            found = found + block if found else block
        return found

    def skip(self, n: int) -> None:
        """Pass over the next `n` bytes."""
        for at in range(0, n, BLOCK_BYTES):
            self.read(min(BLOCK_BYTES, n - at))

    def blocks(self, n: int) -> Iterator[bytes]:
        """The next `n` bytes in blocks of 1 MiB and a rest."""
        return (self.read(min(BLOCK_BYTES, n - at)) for at in range(0, n, BLOCK_BYTES))

    def _next(self) -> None:
        name = self._file.name if self._file else "a folder of shards"
        self.close()
        path = next(self._paths, None)
        if path is None:
            raise DataError(f"{name} ended before its documents did.", hint="prepare the shards again")
        self._file = open(path, "rb")  # noqa: SIM115 (open until the next one, or `close`)

    def close(self) -> None:
        """Let go of the file that is open."""
        if self._file is not None:
            self._file.close()
        self._file = None


def document_lengths(files: Files) -> Iterator[tuple[Ids, bool]]:
    """Tokens of each document, in arrays of one file's or a few, and whether the last of them has ended.

    A document that goes on in the next file is counted whole, where it ends. Of a slice of one text the very last may
    not have ended.
    """
    carried = 0
    for folder, f in files:
        ends = np.fromfile(folder / f.index_name, "<u8").astype(np.int64)
        lengths = ends - np.concatenate(([0], ends[:-1]))
        rest = f.tokens - int(lengths.sum())
        if len(lengths):
            lengths[0] += carried
            carried = rest
            yield lengths, True
        else:
            carried += rest
    if carried:
        yield np.array([carried]), False


def shard_files(folder: Path, files: Iterable[ShardFile], split: str) -> Files:
    """Those of `split`, in order."""
    return [(folder, f) for f in files if f.split == split]
