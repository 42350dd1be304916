"""Bytes as ids: nothing to train, nothing to download, no text that it cannot hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regpt.tokenizers import END_OF_TEXT
from regpt.tokenizers.base import BaseTokenizer, well_formed

_BYTES_OF_ID = [bytes([b]) for b in range(256)] + [END_OF_TEXT.encode()]


class ByteTokenizer(BaseTokenizer):
    """UTF-8's bytes are the ids 0 to 255, `<|endoftext|>` is 256. Lone surrogates become U+FFFD."""

    kind = "bytes"

    @property
    def vocab_size(self) -> int:
        """257."""
        return len(_BYTES_OF_ID)

    def _encode_part(self, text: str, offset: int) -> list[int]:
        return list(_utf8(text))

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        """Ids of one text as `encode` gives them."""
        return np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.uint32)

    def _decode_checked(self, ids: list[int]) -> bytes:
        return b"".join([_BYTES_OF_ID[i] for i in ids])

    def _definition(self) -> Iterable[bytes]:
        return [b"bytes", END_OF_TEXT.encode()]

    def _files(self) -> Mapping[str, bytes]:
        return {}


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        return well_formed(text).encode()


def load(folder: Path) -> ByteTokenizer:
    """The only one there is; `folder` holds nothing but the header."""
    return ByteTokenizer()
