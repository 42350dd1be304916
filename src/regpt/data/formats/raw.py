"""nanoGPT's `train.bin` and `val.bin`: ids and nothing else, uint16, or uint32 where the vocabulary needs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.data.formats.base import Eot, Format, TokenFile, Writer, close_synced, whole_ids
from regpt.data.shards import dtype_for
from regpt.data.split import Ids
from regpt.errors import DataError

LOOKED_AT_BYTES = 4096
LLMC_HEADER = slice(12, 1024)  # zeros in every llm.c file; here they would be 506 times the id 0


class NanoGPT(Format):
    """Files without a header: nothing in them says what they are, so what they cannot be is refused."""

    name = "nanogpt"
    eot: Eot = "append"

    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """See `Format.open_file`."""
        with open(path, "rb") as file:
            head = file.read(LOOKED_AT_BYTES)
        if len(head) >= LLMC_HEADER.stop and not any(head[LLMC_HEADER]):
            raise DataError(
                f"{path} begins like an llm.c file, with a header of 1024 bytes, but with a wrong magic number at byte 0.",
                got=int.from_bytes(head[:4], "little"),
                expected="20240520, or ids from byte 0 on",
            )
        ids = whole_ids(path, 0, dtype_for(vocab_size))
        if ids.dtype.itemsize == 2 and len(head) >= 1024:
            upper = np.frombuffer(head[: len(head) // 4 * 4], "<u2")[1::2]
            if not upper.any():
                raise DataError(
                    f"{path} holds ids of 32 bits: from byte 2 on every other id of 16 bits would be 0.",
                    expected=f"uint16, as a vocabulary of {vocab_size:,} ids needs",
                    hint='with numpy: np.fromfile("train.bin", "<u4").astype("<u2").tofile("train16.bin")',
                )
        return TokenFile(ids)

    def writer(self, folder: Path, split: str, vocab_size: int, tokenizer: str) -> Writer:
        """See `Format.writer`."""
        return _RawWriter(folder / f"{split}.bin", dtype_for(vocab_size))


class _RawWriter(Writer):
    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.file, self.dtype = open(path, "xb"), dtype  # noqa: SIM115 (until `finish`)

    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())

    def finish(self) -> None:
        close_synced(self.file)

    def abandon(self) -> None:
        self.file.close()
