"""Ids of one split as one long row, wherever they lie: stretches of files, mapped into memory and never copied whole."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from regpt.errors import DataError

if TYPE_CHECKING:
    from regpt.data.shards import TokenizerFacts

OPEN_FILES = 256  # at once by one split, for rows; a process may commonly have 1,024 files open
MAPPED_FILES = 64  # besides, for what is read in order

CAN_READ_AT = hasattr(os, "pread")  # not on Windows

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class IdsFile:
    """Where ids lie: a stretch of one file."""

    path: Path
    offset: int
    """The byte where they begin."""
    tokens: int
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """What they take."""
        return self.tokens * self.dtype.itemsize


class TokenSet(Protocol):
    """Tokens to train on: our own shards (`shards.Shards`), or another program's files (`foreign.ForeignSet`)."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def name(self) -> str:
        """What the text is called."""

    @property
    def tokenizer(self) -> TokenizerFacts:
        """Which tokenizer wrote the ids."""

    @property
    def fingerprint(self) -> str:
        """Hex; another one where ids or tokenizer are others."""

    @property
    def splits(self) -> Collection[str]:
        """train, and val where there is one."""

    @property
    def stored_bytes(self) -> int:
        """How much `verified` reads."""

    def split(self, name: str) -> TokenSplit:
        """The ids of "train" or "val". Raises DataError where there is no such split."""

    def verified(self) -> Iterator[int]:
        """Read every id; yields how many bytes were read since. Raises DataError at the first that is wrong."""


class TokenSplit:
    """The ids of one split as one long row, its files joined.

    Args:
        document_ends: reads where documents end, ascending; called once, when it is first asked for.
        source_bytes: the text of the documents as UTF-8, in bytes.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[IdsFile],
        *,
        document_ends: Callable[[], Ids],
        source_bytes: Callable[[], int],
    ) -> None:
        self.name = name
        self.files = [f for f in files if f.tokens]
        self.n_tokens = sum(f.tokens for f in self.files)
        self._dtype = np.result_type(*{f.dtype for f in self.files} or {np.dtype("<u2")})
        self._starts = np.cumsum([0] + [f.tokens for f in self.files])
        self._one_type = all(f.dtype == self._dtype for f in self.files)
        self._offsets = np.array([f.offset for f in self.files], dtype=np.int64)
        self._open: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self._descriptors = _Descriptors(self.files)
        self._read_ends, self._count_bytes = document_ends, source_bytes

    @cached_property
    def source_bytes(self) -> int:
        """Text of the documents as UTF-8, without what separated them; 0 where that is not known."""
        return self._count_bytes()

    @cached_property
    def document_ends(self) -> Ids:
        """Where documents end in the split, ascending; the last is n_tokens. (n_documents,) int64."""
        return self._read_ends()

    @property
    def n_documents(self) -> int:
        """Documents that end in the split."""
        return len(self.document_ends)

    def __getstate__(self) -> dict[str, Any]:
        """For other processes, which map the files themselves."""
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, start: int, n: int) -> Ids:
        """Ids [start, start + n), which must lie within the split. (n,) int64."""
        if not 0 <= start <= start + n <= self.n_tokens:
            raise IndexError(
                f"[{start}, {start + n}) is not within the {self.n_tokens} ids of split {self.name!r}"
            )
        out = np.empty(n, dtype=np.int64)
        self._fill(out, start)
        return out

    def gather(self, starts: Ids, length: int) -> Ids:
        """Windows of `length` ids from `starts` (R,) on, around the split's end. (R, length) int64."""
        return self.rows(starts, length).astype(np.int64)

    def rows(self, starts: Ids, length: int) -> NDArray[Any]:
        """What `gather` gives, in the type of the files, or one that holds all of theirs. (R, length)."""
        places = np.searchsorted(self._starts, starts, side="right") - 1
        ats = starts - self._starts[places]
        inside = bool((starts + length <= self._starts[places + 1]).all())  # no window ends in another file
        if inside and CAN_READ_AT and self._one_type:
            return self._rows_read(places, ats, length)
        out = np.empty((len(starts), length), dtype=self._dtype)
        for row, start in zip(out, starts.tolist(), strict=True):
            self._fill(row, start)
        return out

    def _rows_read(self, places: Ids, ats: Ids, length: int) -> NDArray[Any]:
        """Windows that lie each in one file. Read, not mapped: a page's first touch costs more than to copy a row of it,
        and a file that was cut off in the meantime is an error, not a fault of the machine."""
        size = self._dtype.itemsize
        descriptors, width = self._descriptors, length * size
        offsets = (self._offsets[places] + ats * size).tolist()
        at = zip(places.tolist(), offsets, strict=True)
        data = b"".join([os.pread(descriptors[place], width, offset) for place, offset in at])
        if len(data) != width * len(places):
            raise DataError(
                f"{self.files[0].path.parent}: a file of the {self.name} split has become shorter."
            )
        return np.frombuffer(data, self._dtype).reshape(len(places), length)

    def _fill(self, out: NDArray[Any], start: int) -> None:
        """`out` from `start` on, around the end of the split as often as need be."""
        done = 0
        while done < len(out):
            at = (start + done) % self.n_tokens
            place = int(np.searchsorted(self._starts, at, side="right")) - 1
            ids = self._map(place)[at - int(self._starts[place]) :][: len(out) - done]
            out[done : done + len(ids)] = ids
            done += len(ids)

    def _map(self, place: int) -> NDArray[Any]:
        ids = self._open.get(place)
        if ids is None:
            ids = self._open[place] = mapped(self.files[place])
            if len(self._open) > MAPPED_FILES:
                self._open.popitem(last=False)
        return ids


class _Descriptors(dict[int, int]):
    """Files of a split by their place, open for reading: at most OPEN_FILES, as long as this lives."""

    def __init__(self, files: Sequence[IdsFile]) -> None:
        super().__init__()
        self._files = files

    def __reduce__(self) -> tuple[type[_Descriptors], tuple[Sequence[IdsFile]]]:
        return _Descriptors, (self._files,)

    def __missing__(self, place: int) -> int:
        try:
            self[place] = found = os.open(self._files[place].path, os.O_RDONLY)
        except OSError as e:
            raise DataError(f"{self._files[place].path} cannot be read: {e}") from None
        if len(self) > OPEN_FILES:
            os.close(self.pop(next(iter(self))))
        return found

    def __del__(self) -> None:
        for descriptor in self.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def mapped(file: IdsFile) -> NDArray[Any]:
    """The ids of one file, not copied: read from the disk where they are touched.

    Raises:
        DataError: the file cannot be read, or has become shorter.
    """
    if not file.tokens:
        return np.empty(0, file.dtype)
    try:
        with open(file.path, "rb") as opened:
            view = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(view, file.dtype, count=file.tokens, offset=file.offset)
    except (OSError, ValueError) as e:
        raise DataError(f"{file.path} cannot be read: {e}") from None
