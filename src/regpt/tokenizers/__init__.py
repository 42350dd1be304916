"""Text to ids and back. One protocol, four kinds: gpt2, chars, bytes, and bpe trained on one's own text.

Importing this package imports none of the libraries behind the kinds.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

from regpt.errors import ConfigError, did_you_mean
from regpt.paths import user_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

END_OF_TEXT = "<|endoftext|>"
MOST_ENTRIES = 1 << 22  # of a tokenizer that is trained
MAX_BYTES = 2_000_000_000
"""Of text that a tokenizer learns from: memory grows with the number of distinct words, and merges change little beyond."""
HEADER = "regpt-tokenizer.json"
FORMAT = 1
SIZES = {"gpt2": 50257, "bytes": 257}  # ids of those that no text is needed for
LEAST_ENTRIES = 257  # of a tokenizer that is trained: 256 bytes and END_OF_TEXT
TRAINED = ("chars", "bpe")
"""Kinds that are made from the text itself."""
KINDS = ("gpt2", "chars", "bytes", "bpe")
"""Each is a module of this package, with `load(folder)`."""


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

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them, without a Python object for each. May be read-only."""

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text; incomplete UTF-8 becomes U+FFFD. Raises DataError for an id outside the vocabulary."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes; special tokens as their text."""

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder`: JSON (and GPT-2's two text files) only."""


def check_entries(vocab_size: int, special_tokens: int = 0) -> None:
    """Refuse a number of entries that no bpe tokenizer can be trained to.

    Raises:
        ConfigError: it has no room for the 256 bytes, `<|endoftext|>` and so many other special tokens, or is beyond all use.
    """
    least = LEAST_ENTRIES + special_tokens
    if not least <= vocab_size <= MOST_ENTRIES:
        size = "small" if vocab_size < least else "large"
        more = f", {special_tokens:,} special tokens" if special_tokens else ""
        raise ConfigError(
            f"tokenizer.vocab_size is too {size} for a bpe tokenizer.",
            got=f"{vocab_size:,}"[:24],
            expected=f"{least:,} or more: 256 bytes, {END_OF_TEXT}{more}, and the merges; at most {MOST_ENTRIES:,}",
        )


def open_tokenizer(name: str, *, files: str | None = None) -> Tokenizer:
    """A tokenizer by name.

    Args:
        name: gpt2, bytes, a folder with a saved tokenizer of any kind, or a run, which keeps one inside.
        files: a folder with GPT-2's encoder.json and vocab.bpe. None: see `regpt.tokenizers.gpt2.open_gpt2`.

    Raises:
        ConfigError: `name` is none of these. chars and bpe alone are recipes, to be trained on a text.
        DataError: the tokenizer's files are missing, damaged, or cannot be downloaded.
    """
    if name == "gpt2":
        from regpt.tokenizers.gpt2 import open_gpt2

        return open_gpt2(files)
    if name == "bytes":
        from regpt.tokenizers.bytes import ByteTokenizer

        return ByteTokenizer()
    folder_too = "or a folder with a saved tokenizer"
    if name in KINDS:
        raise ConfigError(
            f"a {name} tokenizer is trained on a text, and none is given here.",
            expected=f"gpt2, bytes, {folder_too}",
        )
    folder = user_path(name)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no tokenizer {name!r}.{did_you_mean(name, KINDS)}",
            expected=f"gpt2, bytes, chars or bpe (made from the text), {folder_too}",
        )
    inside_run = folder / "tokenizer"
    return load_tokenizer(inside_run if inside_run.is_dir() else folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`, verified by its fingerprint.

    Raises DataError naming the file that is missing, damaged, or of another version of regpt.
    """
    from regpt.tokenizers.files import damaged, read_json

    path = folder / HEADER
    header = read_json(path)
    version, kind, fingerprint = (header.get(key) for key in ("format", "kind", "fingerprint"))
    if version != FORMAT:
        raise damaged(path, "this regpt does not know its format", got=repr(version)[:80], expected=FORMAT)
    if kind not in KINDS:
        raise damaged(
            path, "there is no such kind of tokenizer", got=repr(kind)[:80], expected=", ".join(KINDS)
        )
    tokenizer = cast(Tokenizer, importlib.import_module(f"regpt.tokenizers.{kind}").load(folder))
    if tokenizer.fingerprint != fingerprint:
        why = "its fingerprint is not that of the files beside it"
        raise damaged(path, why, got=repr(fingerprint)[:80], expected=tokenizer.fingerprint)
    return tokenizer
