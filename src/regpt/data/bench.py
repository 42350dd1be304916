"""How fast this machine makes shards of a text, and batches of shards, with the tokenizer alone beside it."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regpt.data.loader import Loader
from regpt.data.prepare import prepare, workers_for
from regpt.data.request import EVERYTHING, Selection, Slice, read
from regpt.data.shards import Shards
from regpt.data.sources import Source
from regpt.errors import DataError
from regpt.tokenizers import Tokenizer

MOST_BYTES = 50_000_000  # of files that are prepared
ALONE_BYTES = 10_000_000  # of text that the tokenizer alone is given
BATCH_ROWS, BLOCK_SIZE = 64, 1024
LEAST_BATCHES, TIMED_S = 50, 1.0


@dataclass(frozen=True)
class DataBench:
    """What was measured."""

    text_bytes: int
    """That were prepared."""
    tokens: int
    documents: int
    workers: int
    prepare_s: float
    """From the source to finished shards, processes started and everything synced."""
    read_bytes_per_second: float
    """Of text, from files to Python strings, in one process."""
    tokenizer_bytes_per_second: float
    """Of text that is in memory already, in one process."""
    batch_rows: int
    block_size: int
    batch_s: float
    """Mean, over the shards just written."""

    @property
    def prepare_bytes_per_second(self) -> float:
        """Of text."""
        return self.text_bytes / self.prepare_s

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dataclasses.asdict(self) | {"prepare_bytes_per_second": self.prepare_bytes_per_second}


def bench_data(
    source: Source,
    tokenizer: Tokenizer,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataBench:
    """Prepare the first 50 MB of `source` into a temporary folder, and draw batches from it.

    Raises:
        DataError: the source is empty, damaged, or too small for a batch.
    """
    n_slices = -(-source.stored_bytes // MOST_BYTES)
    first = Selection(slice=Slice(1, n_slices)) if n_slices > 1 else EVERYTHING
    read_rate, alone_rate = _one_process(source, tokenizer)
    with tempfile.TemporaryDirectory(prefix="regpt-") as folder:
        out = Path(folder) / "shards"
        n_workers = workers or workers_for(source)
        began = time.perf_counter()
        prepare(
            source,
            tokenizer,
            out,
            val_fraction=0,
            selection=first,
            workers=n_workers,
            progress=progress,
        )
        prepare_s = time.perf_counter() - began
        shards = Shards.open(out)
        facts = shards.manifest.splits["train"]
        block_size = min(BLOCK_SIZE, facts.tokens - 1)
        if block_size < 1:
            raise DataError(f"{source.spec} is too small to measure anything.", got=f"{facts.tokens} tokens")
        batch_s = _batch_seconds(shards, block_size)
    return DataBench(
        facts.source_bytes,
        facts.tokens,
        facts.documents,
        n_workers,
        prepare_s,
        read_rate,
        alone_rate,
        BATCH_ROWS,
        block_size,
        batch_s,
    )


def _one_process(source: Source, tokenizer: Tokenizer) -> tuple[float, float]:
    """Bytes of text a second: read, and tokenised."""
    read_s = alone_s = 0.0
    size = 0
    with tempfile.TemporaryDirectory(prefix="regpt-") as folder:
        pieces = (piece for document in read(source, source.parts(Path(folder))) for piece in document())
        while size < ALONE_BYTES:
            began = time.perf_counter()
            piece = next(pieces, None)
            read_s += time.perf_counter() - began
            if piece is None:
                break
            began = time.perf_counter()
            tokenizer.encode_array(piece)
            alone_s += time.perf_counter() - began
            size += len(piece.encode())
    if not size:
        raise DataError(f"{source.spec} holds no text.")
    return size / read_s, size / alone_s


def _batch_seconds(shards: Shards, block_size: int) -> float:
    """Of one batch on the average: what some batches do for those that follow counts."""
    loader = Loader(shards.split("train"), block_size=block_size, batch_rows=BATCH_ROWS, seed=0)
    times: list[float] = []
    while len(times) < LEAST_BATCHES or sum(times) < TIMED_S:
        began = time.perf_counter()
        loader.batch(len(times))
        times.append(time.perf_counter() - began)
    return statistics.mean(times)
