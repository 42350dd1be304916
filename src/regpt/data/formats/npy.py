"""build-nanogpt's shards: `.npy` files of one row of whole numbers, `…_train_000001.npy` and `…_val_000000.npy`."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import Any

import numpy as np

from regpt.data.formats.base import Eot, Format, TokenFile, check_size
from regpt.data.split import IdsFile
from regpt.errors import DataError

MAGIC = b"\x93NUMPY"
TYPES = ("<u2", "<u4", "<i4", "<i8")


class Npy(Format):
    """Read only: what build-nanogpt's fineweb.py writes."""

    name = "npy"
    eot: Eot = "prepend"

    def recognises(self, path: Path) -> bool:
        """Whether the header is whole and says that ids follow."""
        try:
            shape, dtype, _ = _header(path)
        except DataError:
            return False
        return _is_row_of_ids(shape, dtype)

    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """See `Format.open_file`."""
        shape, dtype, offset = _header(path)
        if not _is_row_of_ids(shape, dtype):
            raise DataError(
                f"{path} is not one row of token ids, says its header at byte {len(MAGIC) + 4}.",
                got=f"{dtype.str} of shape {shape}",
                expected=f"one dimension of {', '.join(TYPES)} (little-endian)",
            )
        check_size(
            path, offset + shape[0] * dtype.itemsize, f"its header says {shape[0]:,} ids of {dtype.name}"
        )
        return TokenFile(IdsFile(path, offset, shape[0], dtype))


def _is_row_of_ids(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    return len(shape) == 1 and shape[0] >= 0 and dtype.str in TYPES


def _header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """Shape, type, and the byte behind the header."""
    with open(path, "rb") as file:
        magic = file.read(len(MAGIC))
        if magic != MAGIC:
            raise DataError(f"{path} is not a .npy file: byte 0.", got=magic, expected=MAGIC)
        file.seek(0)
        try:
            first = np.lib.format.read_magic(file) == (1, 0)
            read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except (ValueError, EOFError, SyntaxError, tokenize.TokenError) as e:
            raise DataError(f"{path} has a damaged header, at byte {len(MAGIC)}: {e}") from None
        return shape, dtype, file.tell()
