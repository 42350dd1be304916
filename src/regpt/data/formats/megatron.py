"""Megatron's `.bin` and `.idx`: ids, and an index of sequences and of the documents that they make up.

The index (megatron/core/datasets/indexed_dataset.py): b"MMIDIDX\\0\\0", version 1 (uint64), a code for the type of ids
(uint8), numbers of sequences and of documents plus one (uint64); then the sequences' lengths (int32), their places in the
.bin in bytes (int64), and at which sequence each document begins, the last one's end behind it (int64).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.data.formats.base import (
    Eot,
    Format,
    TokenFile,
    Writer,
    check_size,
    close_synced,
    read_header,
)
from regpt.data.split import Ids, IdsFile
from regpt.errors import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
TYPES = {code: np.dtype(name) for code, name in {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}
"""Types of ids by their codes: what Megatron can write and an id can be."""
UINT16_BELOW = 65_500  # Megatron writes uint16 for smaller vocabularies, else int32
COPY_BYTES = 1 << 23


class Megatron(Format):
    """A pair of files; either of them may be named."""

    name = "megatron"
    eot: Eot = "append"

    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """See `Format.open_file`."""
        data, index = path.with_suffix(".bin"), path.with_suffix(".idx")
        for file in (data, index):
            if not file.is_file():
                raise DataError(f"{file} is missing.", hint="Megatron's files come in pairs: copy both")
        dtype, sequences, _ = _header(index)
        lengths, documents = _arrays(index, sequences)
        tokens = int(lengths.sum(dtype=np.int64))
        check_size(
            data, tokens * dtype.itemsize, f"{index.name} says {tokens:,} ids of {dtype.name} in {sequences:,} sequences"
        )  # fmt: skip
        _check_documents(index, documents, sequences)
        return TokenFile(IdsFile(data, 0, tokens, dtype), index, partial(_ends, index))

    def writer(self, folder: Path, split: str, vocab_size: int, tokenizer: str) -> Writer:
        """See `Format.writer`."""
        return _MegatronWriter(folder / f"{split}_text_document.bin", 8 if vocab_size < UINT16_BELOW else 4)


def _header(index: Path) -> tuple[np.dtype[Any], int, int]:
    """Type of ids, number of sequences, number of documents and one more."""
    magic, version, code, sequences, documents = HEADER.unpack(read_header(index, HEADER.size))
    if magic != MAGIC:
        raise DataError(f"{index} is no index of Megatron: byte 0.", got=magic, expected=MAGIC)
    if version != 1:
        swapped = version == int.from_bytes((1).to_bytes(8, "big"), "little")
        why = "with its bytes in the other order (big-endian)" if swapped else "of another version"
        raise DataError(f"{index} was written {why}: byte 9.", got=version, expected=1)
    if code not in TYPES:
        raise DataError(
            f"{index} has a type that ids cannot have, at byte 17.",
            got=f"code {code}",
            expected=", ".join(f"{c} ({t.name})" for c, t in TYPES.items()),
        )
    expected = HEADER.size + 12 * sequences + 8 * documents
    check_size(
        index, expected, f"its header, at byte 18, says {sequences:,} sequences, {documents:,} documents"
    )
    return TYPES[code], sequences, documents


def _arrays(index: Path, sequences: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The sequences' lengths and the documents' beginnings, once it is sure that the sequences lie in one row."""
    dtype, _, documents = _header(index)
    lengths = np.fromfile(index, "<i4", count=sequences, offset=HEADER.size)
    at = HEADER.size + 4 * sequences
    pointers = np.fromfile(index, "<i8", count=sequences, offset=at)
    if (lengths < 0).any():
        place = int(np.argmax(lengths < 0))
        raise DataError(
            f"{index} has a sequence of negative length, at byte {HEADER.size + 4 * place}.",
            got=int(lengths[place]),
        )
    expected = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    wrong = pointers != expected
    if wrong.any():
        place = int(np.argmax(wrong))
        raise DataError(
            f"{index} points to a place where sequence {place} cannot lie, at byte {at + 8 * place}: sequences must stand "
            "one behind the other.",
            got=f"byte {int(pointers[place])} of the .bin",
            expected=f"byte {int(expected[place])}",
        )
    return lengths, np.fromfile(index, "<i8", count=documents, offset=at + 8 * sequences)


def _check_documents(index: Path, documents: NDArray[np.int64], sequences: int) -> None:
    """Documents must begin with sequence 0, follow one another and end with the last sequence."""
    at = HEADER.size + 12 * sequences
    if not len(documents) or documents[0] != 0 or documents[-1] != sequences:
        got = f"{int(documents[0])} to {int(documents[-1])}" if len(documents) else "none"
        raise DataError(
            f"{index} has documents that do not cover its sequences, from byte {at} on.",
            got=f"sequences {got}",
            expected=f"0 to {sequences}",
        )
    if (np.diff(documents) < 0).any():
        place = int(np.argmax(np.diff(documents) < 0)) + 1
        raise DataError(
            f"{index} has documents out of order, at byte {at + 8 * place}.",
            got=int(documents[place]),
            expected=f"{int(documents[place - 1])} or more",
        )


def _ends(index: Path) -> Ids:
    """Where documents end in the .bin, in ids."""
    lengths, documents = _arrays(index, _header(index)[1])
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    ends: Ids = np.unique(starts[documents])
    return ends[ends > 0]


class _MegatronWriter(Writer):
    """Every document is one sequence. Lengths wait in a file of their own: the index has them before what follows."""

    def __init__(self, path: Path, code: int) -> None:
        self.path, self.code, self.dtype = path, code, TYPES[code]
        self.file = open(path, "xb")  # noqa: SIM115 (until `finish`)
        self.lengths = open(path.with_suffix(".lengths"), "x+b")  # noqa: SIM115
        self.unended = self.documents = 0

    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        if len(ends):
            lengths = np.diff(ends, prepend=-self.unended)
            if lengths.max() > np.iinfo(np.int32).max:
                raise DataError(
                    f"a document has {int(lengths.max()):,} tokens.", expected="fewer than 2**31: Megatron counts so far"
                )  # fmt: skip
            self.lengths.write(lengths.astype("<i4").tobytes())
            self.documents += len(ends)
        self.unended = len(ids) - int(ends[-1]) if len(ends) else self.unended + len(ids)

    def finish(self) -> None:
        close_synced(self.file)
        with open(self.path.with_suffix(".idx"), "xb") as index:
            index.write(HEADER.pack(MAGIC, 1, self.code, self.documents, self.documents + 1))
            end = 0
            for lengths in self._blocks():
                index.write(lengths.tobytes())
            for lengths in self._blocks():
                ends = end + np.cumsum(lengths, dtype="<i8") * self.dtype.itemsize
                index.write((ends - lengths.astype("<i8") * self.dtype.itemsize).tobytes())
                end = int(ends[-1])
            for start in range(0, self.documents + 1, COPY_BYTES // 8):
                index.write(
                    np.arange(start, min(start + COPY_BYTES // 8, self.documents + 1), dtype="<i8").tobytes()
                )
            close_synced(index)
        self.lengths.close()
        self.path.with_suffix(".lengths").unlink()

    def _blocks(self) -> Iterator[NDArray[np.int32]]:
        self.lengths.seek(0)
        while block := self.lengths.read(COPY_BYTES):
            yield np.frombuffer(block, "<i4")

    def abandon(self) -> None:
        self.file.close()
        self.lengths.close()
