"""Text to ids and back. One protocol, four kinds: gpt2, chars, bytes, and bpe trained on one's own text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

END_OF_TEXT = "<|endoftext|>"


@runtime_checkable
class Tokenizer(Protocol):
    """Text <-> ids in [0, vocab_size).

    `<|endoftext|>` written in a text is text, unless `allow_special` is asked for.
    """

    @property
    def kind(self) -> str:
        """gpt2, chars, bytes or bpe."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; the largest id is one less."""

    @property
    def eot_id(self) -> int:
        """The id of `<|endoftext|>`, which ends every document."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text."""

    @property
    def fingerprint(self) -> str:
        """sha256, in hex, of what defines the mapping: equal fingerprints, equal ids."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of one text. Raises DataError where the text holds what the vocabulary lacks (chars)."""

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text; incomplete UTF-8 becomes U+FFFD. Raises DataError for an id outside the vocabulary."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes; special tokens as their text."""

    def save(self, folder: Path) -> None:
        """Write everything that `load_tokenizer` needs into `folder`: JSON (and GPT-2's two text files) only."""
