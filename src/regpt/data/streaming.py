"""Tokens on the fly, for anyone's loop: an iterable data set that tokenises documents when their turn comes.

The parts of a source are dealt out in turn to streams; each stream packs its documents, every one ended by
`<|endoftext|>`, into rows without a gap. A rank's DataLoader workers share its streams, so no document is read twice or
left out. Rows come from the streams in turn; where a stream stands is five numbers, and from there it goes on exactly.
Of a data set of the hub each process reads from the server what its own streams need, and stores nothing.
`regpt.data.windows` is the map-style counterpart.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from regpt.data.documents import Document, Part, documents
from regpt.data.request import check_single_text, split_parts
from regpt.data.sources import Source
from regpt.data.split import Ids
from regpt.data.workers import document_hash
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer

STATE = "regpt-stream-2"
Row = dict[str, Tensor]


@dataclass(frozen=True, order=True)
class Place:
    """Where a row begins: an id of a piece of a document of a part."""

    epoch: int = 0
    part: int = 0
    document: int = 0
    piece: int = 0
    offset: int = 0


@dataclass(frozen=True)
class _FileStart:
    """Which part of an epoch is the first one of a file: whoever goes on need not look into the files before."""

    epoch: int = 0
    part: int = 0
    file: int = 0


@dataclass
class _Cursor:
    """How far a stream has come: rows are shuffled by blocks, of which `taken` rows were given out."""

    place: Place
    """Where the block began."""
    block: int = 0
    taken: int = 0


class StreamingTokens(IterableDataset[Row]):
    """Rows of `block_size` ids, packed from the documents of a source as they are tokenised.

    Yields `{"input_ids": (block_size,), "targets": (block_size,)}`, int64, targets one position on. What is left of a
    stream that does not fill a row goes on in its next epoch, and is left out after its last.

    With `streams` given, the order of rows is the same for any number of ranks and workers that divides it: row k of all
    is from stream k % streams, read by rank k % world, as long as no stream has run out (none does with epochs=None),
    and workers give rows singly (`batch_size=None`); a worker that makes batches fills each from its own streams.

    Args:
        rank, world: this process among those that share the source.
        streams: into how many the source is dealt; a multiple of world x workers. None: one for each.
        epochs: None: without end, as ranks need whose steps must be equally many.
        shuffle_rows: rows of a stream that are shuffled together; 0 or 1: none.
        seed: of the shuffling.
        keep_downloads: of packed files of the hub, which are read from their beginning by every process: they are
            downloaded into the cache, once for all processes, and stay. False: each process reads them from the server.

    Raises:
        ConfigError: numbers that do not go together.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        block_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        streams: int | None = None,
        epochs: int | None = 1,
        shuffle_rows: int = 0,
        seed: int = 0,
        keep_downloads: bool = True,
    ) -> None:
        if block_size < 1 or not 0 <= rank < world or shuffle_rows < 0 or (epochs is not None and epochs < 1):
            raise ConfigError(
                "a stream needs block_size and epochs of 1 or more, and a rank below world.",
                got=f"block_size={block_size}, epochs={epochs}, rank={rank}, world={world}, shuffle_rows={shuffle_rows}",
            )
        self.source = source.streamed(packed=not keep_downloads)
        self.tokenizer, self.block_size = tokenizer, block_size
        self.rank, self.world, self.streams = rank, world, streams
        self.epochs, self.shuffle_rows, self.seed = epochs, max(shuffle_rows, 1), seed
        self._begin_at: Mapping[str, Any] | None = None
        self._cursors: dict[int, _Cursor] = {}
        self._turn = self._streams = 0
        self._files = [_FileStart()]

    def __iter__(self) -> Iterator[Row]:
        own = self._own_streams()
        before, self._begin_at = self._begin_at, None
        self._cursors = {v: _Cursor(Place()) for v in own}
        self._turn, self._files = 0, [_FileStart()]
        if before is not None:
            self._restore(before, own)
        with tempfile.TemporaryDirectory(prefix="regpt-") as work:
            starts = {v: cursor.place for v, cursor in self._cursors.items()}
            dealer = _Dealer(self.source, Path(work), starts, self._streams, self.epochs, self._files)
            rows = {v: self._rows(v, dealer) for v in own}
            while rows:
                stream = own[self._turn]
                row = next(rows[stream], None) if stream in rows else None
                self._turn = (self._turn + 1) % len(own)
                if row is not None:
                    ids = torch.from_numpy(row)
                    yield {"input_ids": ids[:-1], "targets": ids[1:]}
                else:
                    rows.pop(stream, None)

    def state_dict(self) -> dict[str, Any]:
        """Where this process stands, in plain values: how `load_state_dict` goes on behind the last row given out.

        In a DataLoader with workers each worker has its own: torchdata's StatefulDataLoader collects them.
        """
        if self._begin_at is not None:  # loaded, and not begun yet
            return dict(self._begin_at)
        cursors = {str(v): [*asdict(c.place).values(), c.block, c.taken] for v, c in self._cursors.items()}
        first = min((c.place for c in self._cursors.values()), default=Place())
        reached = (first.epoch, first.part)
        while len(self._files) > 1 and (self._files[1].epoch, self._files[1].part) <= reached:
            del self._files[0]  # nobody goes back before the one behind it
        file = list(asdict(self._files[0]).values())
        return {
            **self._identity(),
            "streams": self._streams,
            "turn": self._turn,
            "file": file,
            "cursors": cursors,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin where `state_dict` was called.

        Raises:
            DataError: the state is of other text, another tokenizer or other settings.
        """
        try:
            ours = self._identity()
            other = [name for name in ours if state[name] != ours[name]]
            numbers = [*state["cursors"].values(), [*state["file"], *[0] * 4]]
            well_formed = all(len(of) == 7 and all(isinstance(n, int) for n in of) for of in numbers)
            if not well_formed or not isinstance(state["turn"], int):
                raise ValueError("cursors of seven numbers are missing")
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise DataError(f"not the state of a stream: {type(e).__name__}: {e}.") from None
        if other:
            raise DataError(
                f"the state is of another stream; different: {', '.join(other)}.",
                got=", ".join(str(state[name]) for name in other),
                expected=", ".join(str(ours[name]) for name in other),
            )
        self._begin_at = state

    def _identity(self) -> dict[str, Any]:
        return {
            "format": STATE,
            "source": self.source.fingerprint,
            "tokenizer": self.tokenizer.fingerprint,
            "block_size": self.block_size,
            "shuffle_rows": self.shuffle_rows,
            "seed": self.seed,
        }

    def _own_streams(self) -> list[int]:
        """Those of this process: every one has as many."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        processes = self.world * workers
        self._streams = self.streams if self.streams is not None else processes
        if self._streams < 1 or self._streams % processes:
            raise ConfigError(
                f"{self._streams} streams cannot be shared evenly by {self.world} ranks of {workers} workers.",
                expected=f"a multiple of {processes}",
            )
        return list(range(number * self.world + self.rank, self._streams, processes))

    def _restore(self, state: Mapping[str, Any], own: list[int]) -> None:
        if not state["cursors"]:  # taken before the first row
            return
        if state["streams"] != self._streams or sorted(map(int, state["cursors"])) != own:
            raise DataError(
                "the state is of another process, or of another number of ranks or workers.",
                got=f"streams {', '.join(sorted(state['cursors'], key=int))} of {state['streams']}",
                expected=f"streams {', '.join(map(str, own))} of {self._streams}",
            )
        for v in own:
            *place, block, taken = state["cursors"][str(v)]
            self._cursors[v] = _Cursor(Place(*place), block, taken)
        self._turn = state["turn"] % len(own)
        self._files = [_FileStart(*state["file"])]

    def _rows(self, stream: int, dealer: _Dealer) -> Iterator[Ids]:
        """The rows of one stream from its cursor on, block by block in a shuffled order; the cursor follows."""
        cursor = self._cursors[stream]
        packed = _packed(dealer.pieces(stream, self.tokenizer), cursor.place, self.block_size)
        while block := list(islice(packed, self.shuffle_rows)):
            order = np.random.default_rng([self.seed, stream, cursor.block]).permutation(len(block))
            for number in order[cursor.taken :].tolist():
                cursor.taken += 1
                yield block[number][0]
            if len(block) < self.shuffle_rows:
                return  # the stream has ended: its cursor stays behind the last row
            cursor.place, cursor.block, cursor.taken = block[-1][1], cursor.block + 1, 0


def _packed(
    pieces: Iterator[tuple[Place, NDArray[Any]]], start: Place, block_size: int
) -> Iterator[tuple[Ids, Place]]:
    """Rows of block_size + 1 ids, each beginning with the last id of the one before; and where the next one begins."""
    held: deque[tuple[Place, NDArray[Any]]] = deque()
    total = used = 0
    for place, ids in pieces:
        if place == Place(start.epoch, start.part, start.document, start.piece):
            used, total = start.offset, -start.offset
        held.append((place, ids))
        total += len(ids)
        while total > block_size:
            row, filled = np.empty(block_size + 1, dtype=np.int64), 0
            while True:
                part = held[0][1][used : used + len(row) - filled]
                row[filled : filled + len(part)] = part
                filled += len(part)
                if filled == len(row):
                    used += len(part) - 1  # the row's last id is the first of the next one
                    break
                held.popleft()
                used = 0
            total -= block_size
            at = held[0][0]
            yield row, Place(at.epoch, at.part, at.document, at.piece, used)


class _Dealer:
    """Deals the parts of a source to streams in turn, those that are this process's; reads them for one stream.

    The source is listed once for all streams of the process. Part p of epoch e goes to stream (p + e) % streams, so that
    over the epochs every stream sees every part.

    Args:
        files: where files begin, as far as they are listed; the listing begins at the last one.
    """

    def __init__(
        self,
        source: Source,
        work: Path,
        starts: Mapping[int, Place],
        streams: int,
        epochs: int | None,
        files: list[_FileStart],
    ) -> None:
        self.source, self.work, self.starts, self.streams, self.files = source, work, starts, streams, files
        self.waiting: defaultdict[int, deque[tuple[Place, Part]]] = defaultdict(deque)
        first = min((place.epoch for place in starts.values()), default=0)
        self.listed = self._listed(count(first) if epochs is None else iter(range(first, epochs)))

    def pieces(self, stream: int, tokenizer: Tokenizer) -> Iterator[tuple[Place, NDArray[Any]]]:
        """Ids of the stream's documents piece by piece from its start on, each with its place."""
        start = self.starts[stream]
        last_text = start.epoch
        while (dealt := self._next(stream)) is not None:
            at, part = dealt
            if at.epoch > last_text + self.streams:
                raise DataError(f"{self.source.spec}: there is no text in it.")
            for number, document in enumerate(documents(part, Counter(), self.source.ranged(part))):
                place = Place(at.epoch, at.part, number)
                first = start.piece if place == Place(start.epoch, start.part, start.document) else 0
                if place < Place(start.epoch, start.part, start.document) or is_skipped(document, part):
                    continue
                for piece, ids in tokenized(document, part, tokenizer, first):
                    last_text = at.epoch
                    yield Place(at.epoch, at.part, number, piece), ids
            if part.temporary:
                os.unlink(part.path)

    def _next(self, stream: int) -> tuple[Place, Part] | None:
        while not self.waiting[stream]:
            dealt = next(self.listed, None)
            if dealt is None:
                return None
            at, part = dealt
            to = (at.part + at.epoch) % self.streams
            if to in self.starts and at >= Place(self.starts[to].epoch, self.starts[to].part):
                self.waiting[to].append(dealt)
            elif part.temporary:
                os.unlink(part.path)
        return self.waiting[stream].popleft()

    def _listed(self, epochs: Iterator[int]) -> Iterator[tuple[Place, Part]]:
        lasting: list[Part] | None = None  # of a source that no epoch has to unpack again
        begin = self.files[-1]
        for epoch in epochs:
            seen: list[Part] = []
            work = self.work / str(epoch)
            if lasting is None:
                work.mkdir()
            begin = begin if begin.epoch == epoch else _FileStart(epoch)
            for number, part in enumerate(lasting or source_parts(self.source, work, begin.file), begin.part):
                if part.file != self.files[-1].file or epoch != self.files[-1].epoch:
                    self.files.append(_FileStart(epoch, number, part.file))
                seen.append(part)
                yield Place(epoch, number), part
            if not seen:  # or an endless listing would never end
                raise DataError(f"{self.source.spec}: there is no text in it.")
            if begin.file == 0 and not any(part.temporary for part in seen):
                lasting = seen


def source_parts(source: Source, work: Path, first_file: int = 0) -> Iterator[Part]:
    """The parts of a source, from a file on; a single long text in stretches that can be read apart.

    Raises:
        DataError: such a text is not UTF-8.
    """
    check_single_text(source, None)
    yield from (part for _, part in split_parts(source, None, work, first_file=first_file))


def is_skipped(document: Document, part: Part) -> bool:
    """Whether preparation would leave the document out too: it is blank or not UTF-8."""
    return part.fragment is None and document_hash(document) is None


def tokenized(
    document: Document, part: Part, tokenizer: Tokenizer, first: int = 0
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The ids of a document by pieces, from piece `first` on; its `<|endoftext|>` is the last one."""
    number = -1
    for number, piece in enumerate(document()):
        if number >= first:
            yield number, tokenizer.encode_array(piece).astype(np.int32)
    if part.fragment != "middle":
        yield number + 1, np.array([tokenizer.eot_id], dtype=np.int32)
