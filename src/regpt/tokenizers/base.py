"""What all kinds share: `<|endoftext|>` is the last id, ids are checked, a header seals the saved files."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regpt.errors import DataError
from regpt.tokenizers import END_OF_TEXT, FORMAT, HEADER
from regpt.tokenizers.files import write_file


def well_formed(text: str) -> str:
    """`text` as UTF-8 can hold it, mended as tiktoken does: lone surrogates become U+FFFD, pairs join."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class BaseTokenizer(ABC):
    """The protocol `regpt.tokenizers.Tokenizer`, but for what each kind must say of itself.

    Nothing changes after construction. Every kind can be pickled, and so sent to spawned processes.
    """

    kind: str

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, `<|endoftext|>` included."""

    @abstractmethod
    def _encode_part(self, text: str, offset: int) -> list[int]:
        """Ids of text that began at `offset` of what the caller gave, without control tokens."""

    @abstractmethod
    def _decode_checked(self, ids: list[int]) -> bytes:
        """Bytes of ids that are known to lie in the vocabulary."""

    @abstractmethod
    def _definition(self) -> Iterable[bytes]:
        """What the mapping depends on and nothing else; the fingerprint is its hash."""

    @abstractmethod
    def _files(self) -> Mapping[str, bytes]:
        """Contents by name, from which the kind's own `load` makes it again."""

    @property
    def eot_id(self) -> int:
        """The id of `<|endoftext|>`: the last one, in every kind."""
        return self.vocab_size - 1

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text."""
        return {END_OF_TEXT: self.eot_id}

    @cached_property
    def fingerprint(self) -> str:
        """sha256, in hex, of the mapping: equal fingerprints, equal ids."""
        # Each part behind its length, so that ("ab", "c") and ("a", "bc") differ.
        parts = (len(part).to_bytes(8, "little") + part for part in self._definition())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of one text; a special token written in it is text unless `allow_special`."""
        if not allow_special:
            return self._encode_part(text, 0)
        ids: list[int] = []
        offset = 0
        for number, part in enumerate(self._special_or_text.split(text)):  # text, special token, text, …
            ids += [self.special_tokens[part]] if number % 2 else self._encode_part(part, offset)
            offset += len(part)
        return ids

    @cached_property
    def _special_or_text(self) -> re.Pattern[str]:
        return re.compile(f"({'|'.join(map(re.escape, self.special_tokens))})")

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them, without a Python object for each. May be read-only."""
        return np.array(self._encode_part(text, 0), dtype=np.uint32)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them."""
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text; bytes that are not UTF-8 become U+FFFD. Raises DataError for an id outside the vocabulary."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes, special tokens as text. Raises DataError for an id outside the vocabulary."""
        checked = [
            operator.index(i) for i in ids
        ]  # NumPy's and torch's whole numbers, too; 1.5 is a TypeError
        if checked and not (min(checked) >= 0 and max(checked) < self.vocab_size):
            place, bad = next((p, i) for p, i in enumerate(checked) if not 0 <= i < self.vocab_size)
            raise DataError(
                f"id {bad}, at place {place}, is not in the vocabulary of this {self.kind} tokenizer.",
                expected=f"ids from 0 to {self.vocab_size - 1}",
            )
        return self._decode_checked(checked)

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer` needs into `folder`, the header last."""
        for name, content in self._files().items():
            write_file(folder / name, content)
        header = {"format": FORMAT, "kind": self.kind, "fingerprint": self.fingerprint}
        write_file(folder / HEADER, json.dumps(header, indent=2).encode() + b"\n")
