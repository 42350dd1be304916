"""datatrove's `.ds`: raw ids, with `.ds.index` (uint64 ends of documents, in ids) and `.ds.metadata` (tokenizer, count)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.data.formats.base import (
    COPY_AGAIN,
    Eot,
    Format,
    TokenFile,
    Writer,
    check_size,
    close_synced,
    whole_ids,
)
from regpt.data.shards import dtype_for
from regpt.data.split import Ids, IdsFile
from regpt.errors import DataError

UNKNOWN = "Unknown Tokenizer"  # datatrove's own words where nobody named one
TYPES: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4")}


class Datatrove(Format):
    """Files whose index says where documents end, and whose metadata says whose ids they are."""

    name = "datatrove"
    eot: Eot = "append"

    def open_file(self, path: Path, vocab_size: int) -> TokenFile:
        """See `Format.open_file`."""
        beside = {name: path.with_name(f"{path.name}.{name}") for name in ("index", "metadata", "loss")}
        if beside["loss"].exists():
            raise DataError(
                f"{beside['loss']} says on which tokens to train; regpt trains on all of them.",
                hint=f"move {beside['loss'].name} away, if that is what you want",
            )
        tokenizer, itemsize, count = _metadata(beside["metadata"])
        dtype = TYPES[itemsize] if itemsize is not None else dtype_for(vocab_size)
        if not beside["index"].exists():
            found = whole_ids(path, 0, dtype)
            if count is not None:
                check_size(path, count * dtype.itemsize, f"{beside['metadata'].name} says {count:,} ids")
            return TokenFile(found, tokenizer=tokenizer)
        total = _last_end(beside["index"])
        if itemsize is None and path.stat().st_size == 4 * total:
            dtype = TYPES[4]
        check_size(
            path, total * dtype.itemsize, f"{beside['index'].name} says {total:,} ids, of {dtype.name}"
        )
        if count is not None and count != total:
            raise DataError(
                f"{beside['metadata']} does not belong to its files.",
                got=f"{count:,} ids",
                expected=f"{total:,}, as {beside['index'].name} has them",
            )
        ids = IdsFile(path, 0, total, dtype)
        return TokenFile(ids, beside["index"], partial(_ends, beside["index"]), tokenizer)

    def writer(self, folder: Path, split: str, vocab_size: int, tokenizer: str) -> Writer:
        """See `Format.writer`."""
        return _DatatroveWriter(folder / f"{split}_00000.ds", dtype_for(vocab_size), tokenizer)


def _metadata(path: Path) -> tuple[str | None, int | None, int | None]:
    """Tokenizer, bytes of an id and number of ids, where the file is there: `gpt2|2`, then the count."""
    if not path.exists():
        return None, None, None
    try:
        first, count, *_ = path.read_text(encoding="utf-8").splitlines()
        name, _, itemsize = first.rpartition("|")
        if int(itemsize) not in TYPES:
            raise ValueError(f"ids of {itemsize} bytes")
        return (None if name.startswith(UNKNOWN) else name), int(itemsize), int(count)
    except ValueError as e:
        raise DataError(
            f"{path} is damaged: {e}.", expected="tokenizer|2 or |4, then the number of ids"
        ) from None


def _ends(path: Path) -> Ids:
    """The ends in an index, checked."""
    size = path.stat().st_size
    if size % 8:
        raise DataError(f"{path} ends inside a number, at byte {size - size % 8}.", hint=COPY_AGAIN)
    ends = np.fromfile(path, "<u8").astype(np.int64)
    steps = np.diff(ends, prepend=0)
    if (steps < 0).any():
        place = int(np.argmax(steps < 0))
        fault = "at byte {}: documents must end one behind the other"
        if (ends.byteswap() >= 0).all() and (np.diff(ends.byteswap(), prepend=0) >= 0).all():
            fault += ", and do with the bytes in the other order (big-endian)"
        raise DataError(
            f"{path} is damaged {fault.format(8 * place)}.",
            got=int(ends[place]),
            expected=f"{int(ends[place - 1]) if place else 0} or more",
        )
    return ends[steps > 0]


def _last_end(path: Path) -> int:
    ends = _ends(path)
    return int(ends[-1]) if len(ends) else 0


class _DatatroveWriter(Writer):
    def __init__(self, path: Path, dtype: np.dtype[Any], tokenizer: str) -> None:
        self.path, self.dtype, self.tokenizer, self.tokens = path, dtype, tokenizer, 0
        self.file = open(path, "xb")  # noqa: SIM115 (until `finish`)
        self.index = open(path.with_name(path.name + ".index"), "xb")  # noqa: SIM115

    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        self.file.write(ids.astype(self.dtype).tobytes())
        self.index.write((ends + self.tokens).astype("<u8").tobytes())
        self.tokens += len(ids)

    def finish(self) -> None:
        close_synced(self.file)
        close_synced(self.index)
        with open(self.path.with_name(self.path.name + ".metadata"), "xb") as file:
            name = f"{self.tokenizer}|{self.dtype.itemsize}"
            file.write(f"{name}\n{self.tokens}\n{_human(self.tokens)}".encode())

    def abandon(self) -> None:
        self.file.close()
        self.index.close()


def _human(tokens: int) -> str:
    """The third line, for people: 338 kT, 9.04 GT."""
    for size, letter in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g} {letter}T"
    return f"{tokens} T"
