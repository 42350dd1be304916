"""Tokens by number, for anyone's loop: a map-style data set over prepared tokens, or over text tokenised when asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import mmap
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch.utils.data import Dataset

from regpt.data.documents import Document, Part, documents, records
from regpt.data.sources import Source
from regpt.data.split import Ids
from regpt.data.streaming import Row, is_skipped, source_parts, tokenized
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer
from regpt.tokenizers.download import cache_folder
from regpt.train.durable import replace_file

FORMAT = "regpt-text-index-1"
UNIT = np.dtype(
    [("part", "<u4"), ("record", "<u8"), ("piece", "<u4"), ("tokens", "<u4"), ("ends", "u1")], align=False
)
"""A piece of a document: where it stands, and its ids; `ends`: `<|endoftext|>` among them. Of a document in plain text or
JSONL `record` is its first byte, else its number in the part."""
KEPT_TOKENS = 1 << 22  # tokenised last, kept in memory


class Tokens(Protocol):
    """What can be cut into windows: `regpt.data.split.TokenSplit`, or a `TextIndex`."""

    @property
    def n_tokens(self) -> int:
        """How many ids there are."""

    def read(self, start: int, n: int) -> Ids:
        """Ids [start, start + n). (n,) int64."""


class TokenDataset(Dataset[Row]):
    """Windows that tile the tokens: every id but the first is a target once, but for a last incomplete window.

    Item i is `{"input_ids": (block_size,), "targets": (block_size,)}`, int64, from id i * block_size on.

    Raises:
        ConfigError: there is not one whole window.
    """

    def __init__(self, tokens: Tokens, block_size: int) -> None:
        self.tokens, self.block_size = tokens, block_size
        if block_size < 1 or len(self) < 1:
            raise ConfigError(
                f"block_size={block_size} needs at least {block_size + 1} tokens.", got=tokens.n_tokens
            )

    def __len__(self) -> int:
        return max(self.tokens.n_tokens - 1, 0) // self.block_size

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        ids = torch.from_numpy(self.tokens.read(index % len(self) * self.block_size, self.block_size + 1))
        return {"input_ids": ids[:-1], "targets": ids[1:]}


class TextIndex:
    """Text as one long row of ids that are made when they are asked for, by an index of pieces and their token counts.

    The index is built once, which takes as long as tokenising everything in one process, and is kept in regpt's cache
    folder. Reading is a binary search, and tokenising one piece or two (a document, or about a megabyte of a long one).

    Args:
        cache: where indices are kept.
        progress: called with (bytes done, bytes in all) while it is built.

    Raises:
        DataError: there is no text, or it is packed (.gz, .xz, .zst), where no document can be reached directly.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer,
        *,
        cache: Path | None = None,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        packed = next((f for f in source.files if f.packing), None)
        if packed is not None:
            raise DataError(
                f"{packed.path} is packed: none of its documents can be reached without those before.",
                hint="unpack it, prepare it (regpt prepare), or read it in order: regpt.data.streaming",
            )
        self.source, self.tokenizer = source, tokenizer
        with tempfile.TemporaryDirectory(prefix="regpt-") as work:
            self.parts = list(source_parts(source, Path(work)))
        self.units = self._index(cache or cache_folder() / "text-index", progress)
        self.ends = np.cumsum(self.units["tokens"], dtype=np.int64)
        if not len(self.ends):
            raise DataError(f"{source.spec}: there is no text in it.")
        self._kept: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._kept_tokens = 0

    @property
    def n_tokens(self) -> int:
        """How many ids there are, every document's `<|endoftext|>` included."""
        return int(self.ends[-1])

    @property
    def n_documents(self) -> int:
        """How many documents end in them."""
        return int(self.units["ends"].sum())

    def read(self, start: int, n: int) -> Ids:
        """Ids [start, start + n), which must lie within the text. (n,) int64."""
        if not 0 <= start <= start + n <= self.n_tokens:
            raise IndexError(
                f"[{start}, {start + n}) is not within the {self.n_tokens} ids of {self.source.spec}"
            )
        out, done = np.empty(n, dtype=np.int64), 0
        unit = int(np.searchsorted(self.ends, start, side="right"))
        while done < n:
            ids = self._unit(unit)
            at = start + done - int(self.ends[unit]) + len(ids)
            piece = ids[at : at + n - done]
            out[done : done + len(piece)] = piece
            done, unit = done + len(piece), unit + 1
        return out

    def _unit(self, number: int) -> NDArray[Any]:
        """The ids of a piece: kept from before, or made now."""
        ids = self._kept.get(number)
        if ids is not None:
            self._kept.move_to_end(number)
            return ids
        unit = self.units[number]
        ids = self._tokenized(
            self.parts[unit["part"]], int(unit["record"]), int(unit["piece"]), bool(unit["ends"])
        )
        if len(ids) != unit["tokens"]:
            raise DataError(
                f"{self.parts[unit['part']].label} has changed since its index was made.",
                got=f"{len(ids)} tokens",
                expected=f"{unit['tokens']} tokens",
            )
        self._kept[number] = ids
        self._kept_tokens += len(ids)
        while self._kept_tokens > KEPT_TOKENS and len(self._kept) > 1:
            self._kept_tokens -= len(self._kept.popitem(last=False)[1])
        return ids

    def _tokenized(self, part: Part, record: int, piece: int, ends: bool) -> NDArray[Any]:
        if _by_bytes(part):
            part, record = dataclasses.replace(part, start=record, end=record + 1), 0
        found = documents(part, Counter())  # stays open: a document is valid until the next is asked for
        document: Document | None = next(itertools.islice(found, record, None), None)
        text = next(itertools.islice(document(), piece, None), None) if document is not None else None
        ids = self.tokenizer.encode_array(text or "").astype(np.int32)
        return np.append(ids, np.int32(self.tokenizer.eot_id)) if ends else ids

    # --- the index ----------------------------------------------------------------------------------------------------

    def _index(self, cache: Path, progress: Callable[[int, int], None]) -> NDArray[Any]:
        key = f"{FORMAT}\0{self.source.fingerprint}\0{self.tokenizer.fingerprint}"
        path = cache / f"{self.source.name}-{xxhash.xxh3_64_hexdigest(key.encode())}.npy"
        with contextlib.suppress(OSError, ValueError, EOFError):
            kept = np.load(path, allow_pickle=False)
            if kept.dtype == UNIT and kept.ndim == 1:
                return np.asarray(kept)
        made = np.fromiter(self._build(progress), dtype=UNIT)
        file = io.BytesIO()
        np.save(file, made, allow_pickle=False)
        with contextlib.suppress(
            OSError
        ):  # not writable, full, or being written by another rank: not kept then
            cache.mkdir(parents=True, exist_ok=True)
            replace_file(path, file.getvalue())
        return made

    def _build(self, progress: Callable[[int, int], None]) -> Iterator[tuple[int, int, int, int, bool]]:
        """A row for every piece: part, record, piece, tokens, whether it ends its document."""
        done, total = 0, self.source.stored_bytes
        for number, part in enumerate(self.parts):
            for record, document in _located(part):
                held: list[int] = []
                for _, ids in tokenized(document, part, self.tokenizer):
                    held.append(len(ids))
                if part.fragment != "middle":  # the last is <|endoftext|>, which goes with the text before it
                    held[-2:] = [sum(held[-2:])]
                last = len(held) - 1 if part.fragment != "middle" else -1
                yield from ((number, record, piece, n, piece == last) for piece, n in enumerate(held))
            done += part.stored_bytes
            progress(done, total)


def _by_bytes(part: Part) -> bool:
    """Whether a document of the part can be found by its first byte."""
    return part.form != "parquet" and part.fragment is None


def _located(part: Part) -> Iterator[tuple[int, Document]]:
    """The part's documents that preparation would keep, and where they stand."""
    if not _by_bytes(part):
        for number, document in enumerate(documents(part, Counter())):
            if not is_skipped(document, part):
                yield number, document
        return
    for begin in _record_starts(part):
        for document in documents(dataclasses.replace(part, start=begin, end=begin + 1), Counter()):
            if not is_skipped(document, part):
                yield begin, document


def _record_starts(part: Part) -> Iterator[int]:
    """Where records begin in the part: at the file's first byte and behind every delimiter."""
    if part.end <= part.start:
        return
    with open(part.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from (begin for begin, _ in records(data, part))
