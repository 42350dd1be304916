"""The documents of a split in another order, drawn by a seed: every order is equally likely, and memory is bounded.

In two passes, each of which reads forwards: documents are dealt into buckets at random, then each bucket is put into a
random order of its own. That is a uniform permutation of all (Rao, 1961; Sandelius, 1962).
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from regpt.data.split import Ids
from regpt.data.stored import Files, StoredIds, document_lengths
from regpt.data.writer import SplitWriter

BUCKET_BYTES = 64 << 20
MOST_BUCKETS = (
    128  # files open at once; a process may have 256 on macOS. Above 8 GB of ids buckets are larger
)
HEADER_BYTES = 8  # before each document in a bucket: its size in bytes


def shuffle(files: Files, out: SplitWriter, seed: int, work: Path) -> None:
    """Copy the documents of `files` in a random order to `out`; in between they lie in the folder `work`.

    Equal documents in equal order and an equal seed give equal bytes.
    """
    chance = np.random.Generator(np.random.Philox(seed))
    total = sum(f.bytes for _, f in files)
    n_buckets = min(max(-(-total // BUCKET_BYTES), 1), MOST_BUCKETS)
    buckets = [work / f"bucket-{n}" for n in range(n_buckets)]
    _deal(files, buckets, chance, out.itemsize)
    for path in buckets:
        with open(path, "rb") as file:
            starts, sizes = _documents(file)
            order = chance.permutation(len(starts))
            if len(order):
                shuffled = _Gathered(file, starts[order], sizes[order])
                out.add(shuffled, sizes[order] // out.itemsize, 0, whole=True)
        path.unlink()


def _deal(files: Files, paths: list[Path], chance: np.random.Generator, itemsize: int) -> None:
    """Each document to the end of a bucket drawn for it."""
    ids = StoredIds(files)
    with contextlib.ExitStack() as stack:
        stack.callback(ids.close)
        buckets = [stack.enter_context(open(path, "wb")) for path in paths]
        for lengths, _ in document_lengths(files):
            drawn = chance.integers(len(buckets), size=len(lengths))
            for size, bucket in zip((lengths * itemsize).tolist(), drawn.tolist(), strict=True):
                buckets[bucket].write(size.to_bytes(HEADER_BYTES, "little"))
                buckets[bucket].writelines(ids.blocks(size))


def _documents(bucket: BinaryIO) -> tuple[Ids, Ids]:
    """Where each document of a bucket begins and how long it is, in bytes."""
    starts, sizes = [], []
    while header := bucket.read(HEADER_BYTES):
        starts.append(bucket.tell())
        sizes.append(int.from_bytes(header, "little"))
        bucket.seek(sizes[-1], 1)
    return np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64)


class _Gathered:
    """Stretches of a file as one stream of bytes."""

    def __init__(self, file: BinaryIO, starts: Ids, sizes: Ids) -> None:
        self._file, self._spans = file, zip(starts.tolist(), sizes.tolist(), strict=True)
        self._left = 0

    def read(self, n: int, /) -> bytes:
        """The next `n` bytes."""
        found = []
        while n:
            if not self._left:
                start, self._left = next(self._spans)
                self._file.seek(start)
            found.append(self._file.read(min(n, self._left)))
            n, self._left = n - len(found[-1]), self._left - len(found[-1])
        return b"".join(found)
