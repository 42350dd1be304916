"""`encode_array` gives what `encode` gives, in every kind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from sample_texts import FUZZ, HOSTILE, RHYME, plain_texts

from regpt.errors import DataError
from regpt.tokenizers import Tokenizer
from regpt.tokenizers.bpe import BPETokenizer
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars
from regpt.tokenizers.gpt2 import GPT2Tokenizer


def assert_equal(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode_array(text)
    assert ids.dtype == np.uint32 and ids.ndim == 1
    assert ids.tolist() == tokenizer.encode(text)


@FUZZ
@given(text=HOSTILE)
def test_arrays_of_hostile_texts(small_bpe: BPETokenizer, text: str) -> None:
    assert_equal(small_bpe, text)
    assert_equal(ByteTokenizer(), text)


@FUZZ
@given(text=HOSTILE)
def test_arrays_of_characters(text: str) -> None:
    known = train_chars([text, "a"])
    valid = "".join(c for c in text if not "\ud800" <= c <= "\udfff")
    assert_equal(known, valid)
    if valid != text:
        with pytest.raises(DataError, match="is not among the"):
            known.encode_array(text)


def test_arrays_of_real_texts(small_bpe: BPETokenizer, gpt2: GPT2Tokenizer, test_data: Path) -> None:
    """Longer than a piece, and with the control token written in it."""
    for text in plain_texts(test_data).values():
        for tokenizer in (gpt2, small_bpe, ByteTokenizer()):
            assert_equal(tokenizer, text[:200_000])
    assert_equal(gpt2, "a<|endoftext|>b " * 10_000)


def test_arrays_of_nothing(small_bpe: BPETokenizer) -> None:
    for tokenizer in (small_bpe, ByteTokenizer(), train_chars([RHYME])):
        assert_equal(tokenizer, "")
