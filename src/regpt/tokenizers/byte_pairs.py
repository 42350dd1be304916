"""Byte-pair encoding through tiktoken: what gpt2 and a trained bpe share. The only importer of tiktoken."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tiktoken
from numpy.typing import NDArray

from regpt.tokenizers import END_OF_TEXT
from regpt.tokenizers.base import BaseTokenizer, well_formed
from regpt.tokenizers.pieces import pieces

# GPT-2's split into pre-tokens in tiktoken's possessive form: the same matches with less backtracking.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

_THREADS_FROM = 1_000_000  # characters in a batch; for less, threads cost more than they bring


def _byte_of_char() -> dict[str, int]:
    """Bytes by the character that vocabulary files write: itself if printable, else one from U+0100 on."""
    hidden = iter(range(256, 512))
    printable = [chr(b).isprintable() and b != ord(" ") for b in range(256)]
    return {chr(b if printable[b] else next(hidden)): b for b in range(256)}


BYTE_OF_CHAR = _byte_of_char()
# Ids 0 to 255, in GPT-2's order: that of the characters.
_SINGLE_BYTES = [bytes([BYTE_OF_CHAR[c]]) for c in sorted(BYTE_OF_CHAR)]


def token_bytes(written: str) -> bytes:
    """The bytes of a token as vocabulary files write it. Raises KeyError for what stands for no byte."""
    return bytes([BYTE_OF_CHAR[c] for c in written])


def _valid(text: str) -> str:
    """`text`, mended where it holds lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return well_formed(text)
    return text


class BytePairTokenizer(BaseTokenizer):
    """Bytes merged pair by pair inside each pre-token, the earliest merge first.

    Args:
        merged: the token that each merge makes, in order of priority; ids count on from the 256 single bytes.
    """

    def __init__(self, merged: Iterable[bytes]) -> None:
        self._tokens = [*_SINGLE_BYTES, *merged]
        self._encoding = tiktoken.Encoding(
            self.kind,
            pat_str=GPT2_SPLIT,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            special_tokens={END_OF_TEXT: len(self._tokens)},
            explicit_n_vocab=len(self._tokens) + 1,
        )

    @property
    def vocab_size(self) -> int:
        """256 bytes, the merges, and `<|endoftext|>`."""
        return len(self._tokens) + 1

    def _encode_part(self, text: str, offset: int) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text):
            ids += self._encoding.encode_ordinary(piece)  # it mends lone surrogates itself
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them, without a Python object for each. May be read-only."""
        encode = self._encoding.encode_to_numpy
        parts = [encode(piece, disallowed_special=()) for piece in pieces(_valid(text))]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them; large batches in threads (tiktoken frees the GIL)."""
        threads = min(os.cpu_count() or 1, 8, len(texts))
        if threads < 2 or sum(map(len, texts)) < _THREADS_FROM:
            return super().encode_batch(texts, allow_special=allow_special)
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, allow_special=allow_special), texts))

    def _decode_checked(self, ids: list[int]) -> bytes:
        return self._encoding.decode_bytes(ids)

    def _definition(self) -> Iterable[bytes]:
        return [b"byte pairs, GPT-2's split", *self._tokens, END_OF_TEXT.encode()]
