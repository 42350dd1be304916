"""Byte-pair encoding: what gpt2 and a trained bpe share. Ids come from tiktoken, of which this is the only importer.

`encode_array`, through which whole corpora go, takes gigatoken where it is installed: see `regpt.tokenizers.fast`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from regpt.tokenizers import END_OF_TEXT
from regpt.tokenizers.base import BaseTokenizer, well_formed
from regpt.tokenizers.exchange import ALPHABET, Merge, token_bytes
from regpt.tokenizers.fast import FastEncoder
from regpt.tokenizers.patterns import PATTERNS
from regpt.tokenizers.pieces import pieces

_THREADS_FROM = 1_000_000  # characters in a batch; for less, threads cost more than they bring


class BytePairTokenizer(BaseTokenizer):
    """Bytes merged pair by pair inside each pre-token, the earliest merge first.

    Args:
        merges: in order of priority; ids count on from the 256 single bytes.
        pattern: how text is split into pre-tokens, a name in PATTERNS.
        special_tokens: control tokens besides `<|endoftext|>`, which comes after them.
    """

    def __init__(
        self, merges: Sequence[Merge], *, pattern: str = "gpt2", special_tokens: Sequence[str] = ()
    ) -> None:
        self._merges, self.pattern = merges, pattern
        self._tokens = [token_bytes(t) for t in (*ALPHABET, *(a + b for a, b in merges))]
        first = len(self._tokens)
        self._special = {t: first + n for n, t in enumerate([*special_tokens, END_OF_TEXT])}
        self._bytes_of_id = [*self._tokens, *(t.encode() for t in self._special)]
        self._encoding = tiktoken.Encoding(
            self.kind,
            pat_str=PATTERNS[pattern].split,
            mergeable_ranks={token: rank for rank, token in enumerate(self._tokens)},
            # One that is never asked for: of several tiktoken would search every text.
            special_tokens={END_OF_TEXT: first},
        )
        self._fast: FastEncoder | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_fast": None}  # made again where it is needed

    @property
    def vocab_size(self) -> int:
        """256 bytes, the merges, special tokens, and `<|endoftext|>`."""
        return len(self._tokens) + len(self._special)

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by their text, `<|endoftext|>` last."""
        return self._special

    @property
    def merges(self) -> Sequence[Merge]:
        """In order of priority, as vocabulary files write them."""
        return self._merges

    def _encode_part(self, text: str, offset: int) -> list[int]:
        ids: list[int] = []
        for piece in pieces(text, pattern=self.pattern):
            ids += self._encoding.encode_ordinary(piece)  # it mends lone surrogates itself
        return ids

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them, without a Python object for each. May be read-only."""
        if self._fast is None:
            self._fast = FastEncoder(self._merges, self.pattern, self._plainly, self._decode_checked)
        parts = [self._fast.encode(piece) for piece in pieces(_valid(text), pattern=self.pattern)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _plainly(self, piece: str) -> NDArray[np.uint32]:
        """Ids of a piece of valid text from tiktoken."""
        return self._encoding.encode_to_numpy(piece, disallowed_special=())

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of several texts, as `encode` gives them; large batches in threads (tiktoken frees the GIL)."""
        threads = min(os.cpu_count() or 1, 8, len(texts))
        if threads < 2 or sum(map(len, texts)) < _THREADS_FROM:
            return super().encode_batch(texts, allow_special=allow_special)
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(lambda text: self.encode(text, allow_special=allow_special), texts))

    def _decode_checked(self, ids: list[int]) -> bytes:
        return b"".join([self._bytes_of_id[i] for i in ids])

    def _definition(self) -> Iterable[bytes]:
        title = f"byte pairs, {PATTERNS[self.pattern].title}"
        if len(self._special) > 1:  # their number tells them from tokens
            title += f", {len(self._special)} special tokens"
        return [title.encode(), *self._tokens, *(t.encode() for t in self._special)]


def _valid(text: str) -> str:
    """`text`, mended where it holds lone surrogates."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return well_formed(text)
    return text
