"""What a token format of another program must say of itself: how a file is opened and checked, and how one is written."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from regpt.data.split import Ids, IdsFile
from regpt.errors import DataError

Eot = Literal["append", "prepend", "none"]
"""Where `<|endoftext|>` stands: behind every document, before every one, or nowhere."""
COPY_AGAIN = "copy or download the file again"


@dataclass(frozen=True)
class TokenFile:
    """A file of another program, its header and its index checked."""

    ids: IdsFile
    index: Path | None = None
    """The file beside it that says where documents end."""
    document_ends: Callable[[], Ids] | None = None
    """Reads them, in ids from the file's beginning, ascending; None where only `<|endoftext|>` tells."""
    tokenizer: str | None = None
    """What the files call their tokenizer."""

    def part(self, start: int, stop: int) -> TokenFile:
        """Ids [start, stop) of it; a document that goes on behind `stop` ends there."""
        ids = self.ids
        here = IdsFile(ids.path, ids.offset + start * ids.dtype.itemsize, stop - start, ids.dtype)
        ends = self.document_ends and partial(_ends_within, self.document_ends, start, stop)
        return TokenFile(here, self.index, ends, self.tokenizer)


def _ends_within(document_ends: Callable[[], Ids], start: int, stop: int) -> Ids:
    ends = document_ends()
    return np.append(ends[(ends > start) & (ends < stop)], stop) - start


class Format(ABC):
    """One program's way to store tokens."""

    name: str
    eot: Eot
    """The program's own custom."""

    @abstractmethod
    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """The file at `path`, without reading its ids.

        Args:
            vocab_size: decides the type of ids where the file does not say it.

        Raises:
            DataError: it is damaged, cut off, or of another format; naming file and offset.
        """

    def writer(self, folder: Path, split: str, vocab_size: int, tokenizer: str) -> Writer:
        """Something that writes one split into `folder`. Raises DataError where regpt only reads the format."""
        raise DataError(f"regpt reads {self.name} files, but does not write them.")


class Writer(ABC):
    """The files of one split while they are written."""

    @abstractmethod
    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        """More ids; `ends`: where documents end among them, each in (0, len(ids)]."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the files and make them durable."""

    @abstractmethod
    def abandon(self) -> None:
        """Close the files as they are."""


def close_synced(file: BinaryIO) -> None:
    """Make what was written durable, then close."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def whole_ids(path: Path, offset: int, dtype: np.dtype[Any]) -> IdsFile:
    """Everything of the file from byte `offset` on.

    Raises:
        DataError: the file ends inside an id.
    """
    size = path.stat().st_size - offset
    if size % dtype.itemsize:
        last = offset + size - size % dtype.itemsize
        raise DataError(
            f"{path} ends inside an id, at byte {last}: it is cut off or no file of {dtype.name} ids.",
            got=f"{offset + size} bytes",
            expected=f"{offset} and a multiple of {dtype.itemsize}" if offset else f"a multiple of {dtype.itemsize}",
            hint=COPY_AGAIN,
        )  # fmt: skip
    return IdsFile(path, offset, size // dtype.itemsize, dtype)


def check_size(path: Path, expected: int, why: str) -> None:
    """Refuse a file of another size than its header or index promises."""
    size = path.stat().st_size
    if size != expected:
        fault = f"is cut off at byte {size}" if size < expected else f"goes on behind byte {expected}"
        raise DataError(
            f"{path} {fault}: {why}.", got=f"{size} bytes", expected=f"{expected} bytes", hint=COPY_AGAIN
        )


def read_header(path: Path, n: int) -> bytes:
    """The first `n` bytes. Raises DataError where there are fewer."""
    with open(path, "rb") as file:
        header = file.read(n)
    if len(header) < n:
        raise DataError(
            f"{path} ends inside its header, at byte {len(header)}.",
            expected=f"a header of {n} bytes",
            hint=COPY_AGAIN,
        )
    return header
