"""Characters as ids: the sorted distinct characters of a text, as nanoGPT's character models have them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regpt.errors import DataError
from regpt.tokenizers import END_OF_TEXT
from regpt.tokenizers.base import BaseTokenizer
from regpt.tokenizers.files import damaged, read_json

FILE = "chars.json"


class CharTokenizer(BaseTokenizer):
    """One id for each of `chars` (distinct, sorted, no surrogates), then `<|endoftext|>`."""

    kind = "chars"

    def __init__(self, chars: str) -> None:
        assert _is_vocabulary(chars)
        self._chars = chars
        self._texts = [*chars, END_OF_TEXT]
        # Id by code point, or -1. All code points beyond the largest known one share the last entry.
        self._id_of = np.full(ord(chars[-1]) + 2, -1, dtype=np.int32)
        self._id_of[[ord(c) for c in chars]] = np.arange(len(chars))

    @property
    def vocab_size(self) -> int:
        """The characters and `<|endoftext|>`."""
        return len(self._texts)

    def _encode_part(self, text: str, offset: int) -> list[int]:
        known: list[int] = self._ids(text, offset).tolist()
        return known

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them."""
        return self._ids(text, 0).astype(np.uint32)

    def _ids(self, text: str, offset: int) -> NDArray[np.int32]:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids: NDArray[np.int32] = self._id_of[np.minimum(points, len(self._id_of) - 1)]
        if len(ids) and ids.min() < 0:
            place = int(np.argmax(ids < 0))
            raise DataError(
                f"the character {text[place]!r} (U+{ord(text[place]):04X}) at position {offset + place} "
                f"is not among the {len(self._chars)} of this chars tokenizer.",
                hint="train it on text that has the character, or take bytes, bpe or gpt2, which have all",
            )
        return ids

    def _decode_checked(self, ids: list[int]) -> bytes:
        return "".join([self._texts[i] for i in ids]).encode()

    def _definition(self) -> Iterable[bytes]:
        return [b"chars", self._chars.encode(), END_OF_TEXT.encode()]

    def _files(self) -> Mapping[str, bytes]:
        return {FILE: json.dumps({"chars": self._chars}).encode() + b"\n"}


def _is_surrogate(char: str) -> bool:
    """Half of a UTF-16 pair: a Python string can hold it, no encoded text can."""
    return "\ud800" <= char <= "\udfff"


def _is_vocabulary(chars: object) -> bool:
    if not isinstance(chars, str) or not chars:
        return False
    return list(chars) == sorted(set(chars)) and not any(map(_is_surrogate, chars))


def train_chars(texts: Iterable[str]) -> CharTokenizer:
    """The characters of `texts`, read once, one at a time. Raises DataError where there are none."""
    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    chars = sorted(c for c in seen if not _is_surrogate(c))
    if not chars:
        raise DataError("there is no text to train a chars tokenizer on.")
    return CharTokenizer("".join(chars))


def load(folder: Path) -> CharTokenizer:
    """The tokenizer saved in `folder`. Raises DataError where its file is missing or damaged."""
    chars = read_json(folder / FILE).get("chars")
    if not _is_vocabulary(chars):
        raise damaged(folder / FILE, '"chars" must be a text of distinct characters in code point order')
    return CharTokenizer(str(chars))
