"""llm.c's and modded-nanogpt's `.bin`: a header of 256 int32 (magic, version, number of ids), then the ids.

From llm.c's dev/data/data_common.py: magic 20240520, version 1, uint16; for Llama 3 20240801, version 7, uint32.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from regpt.data.formats.base import Eot, Format, TokenFile, Writer, check_size, close_synced, read_header
from regpt.data.split import Ids, IdsFile
from regpt.errors import DataError

HEADER = 256  # int32 values
HEADER_BYTES = 4 * HEADER
KINDS: dict[int, tuple[int, np.dtype[Any]]] = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
"""Version and type of ids by magic number."""
EVALUATION = 20240522  # multiple-choice questions, in the same kind of file
SHARD_TOKENS = 100_000_000  # as llm.c's own scripts cut; the header cannot count to 2**31


class LlmC(Format):
    """Files that say what they are and how many ids they have."""

    name = "llmc"
    eot: Eot = "prepend"

    def recognises(self, path: Path) -> bool:
        """Whether the file begins with one of the magic numbers, in either byte order."""
        with open(path, "rb") as file:
            start = file.read(4)
        known = (*KINDS, EVALUATION)
        return len(start) == 4 and any(int.from_bytes(start, order) in known for order in ("little", "big"))

    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """See `Format.open_file`."""
        header = np.frombuffer(read_header(path, HEADER_BYTES), "<i4")
        magic, version, tokens = (int(value) for value in header[:3])
        if magic not in KINDS:
            fault = "has no magic number of llm.c at byte 0"
            if int(header[:1].byteswap()[0]) in KINDS:
                fault = "was written with its bytes in the other order (big-endian), its magic number at byte 0 too"
            elif magic == EVALUATION:
                fault = "holds multiple-choice questions (byte 0), not text"
            expected = " or ".join(map(str, KINDS))
            raise DataError(f"{path} {fault}.", got=magic, expected=f"{expected}, little-endian")
        known_version, dtype = KINDS[magic]
        if version != known_version:
            raise DataError(
                f"{path} has another version of the format, at byte 4.", got=version, expected=known_version
            )
        if tokens < 0:
            raise DataError(f"{path} has an impossible number of ids in its header, at byte 8.", got=tokens)
        why = f"its header, at byte 8, says {tokens:,} ids of {dtype.name}"
        check_size(path, HEADER_BYTES + tokens * dtype.itemsize, why)
        return TokenFile(IdsFile(path, HEADER_BYTES, tokens, dtype))

    def writer(self, folder: Path, split: str, vocab_size: int, tokenizer: str) -> Writer:
        """See `Format.writer`."""
        return _LlmCWriter(folder, split, 20240520 if vocab_size <= 1 << 16 else 20240801)


class _LlmCWriter(Writer):
    """Shards numbered as llm.c numbers them: validation is 0, training begins with 1."""

    def __init__(self, folder: Path, split: str, magic: int) -> None:
        self.magic, (self.version, self.dtype) = magic, KINDS[magic]
        first = 0 if split == "val" else 1
        self.paths = (folder / f"text_{split}_{number:06d}.bin" for number in itertools.count(first))
        self.file: BinaryIO | None = None
        self.tokens = 0

    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        data, done = ids.astype(self.dtype), 0
        while done < len(data):
            if self.file is None or self.tokens == SHARD_TOKENS:
                self.finish()
                self.file, self.tokens = open(next(self.paths), "xb"), 0  # noqa: SIM115
                self.file.write(bytes(HEADER_BYTES))
            piece = data[done : done + SHARD_TOKENS - self.tokens]
            self.file.write(piece.tobytes())
            self.tokens, done = self.tokens + len(piece), done + len(piece)

    def finish(self) -> None:
        if self.file is not None:
            header = np.zeros(HEADER, "<i4")
            header[:3] = self.magic, self.version, self.tokens
            self.file.seek(0)
            self.file.write(header.tobytes())
            close_synced(self.file)
            self.file = None

    def abandon(self) -> None:
        if self.file is not None:
            self.file.close()
