from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from sample_texts import FUZZ, HOSTILE, VALID, plain_texts

from regpt.errors import DataError
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars

BYTES = ByteTokenizer()


@FUZZ
@given(text=HOSTILE)
def test_bytes_are_utf8(text: str) -> None:
    """Ids are Python's own UTF-8 bytes; surrogates are mended as tiktoken mends them."""
    mended = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert BYTES.encode(text) == list(mended.encode())
    assert BYTES.decode(BYTES.encode(text, allow_special=True)) == mended


def test_bytes_lone_surrogates_become_replacement_characters_and_pairs_join() -> None:
    assert BYTES.decode(BYTES.encode("a\ud800b")) == "a\ufffdb"
    assert BYTES.decode(BYTES.encode("\ud83d\ude00")) == "😀"


def test_bytes_constants() -> None:
    assert (BYTES.vocab_size, BYTES.eot_id, BYTES.special_tokens) == (257, 256, {"<|endoftext|>": 256})


def test_bytes_decode_partial_characters() -> None:
    assert BYTES.decode([0xC3]) == "\ufffd"
    assert BYTES.decode_bytes([0xC3, 0xA9]) == "é".encode()


def test_bytes_end_of_text() -> None:
    assert BYTES.encode("<|endoftext|>") == list(b"<|endoftext|>")
    assert BYTES.encode("a<|endoftext|><|endoftext|>b", allow_special=True) == [97, 256, 256, 98]
    assert BYTES.decode([97, 256]) == "a<|endoftext|>"


def test_chars_of_tiny_shakespeare(test_data: Path) -> None:
    """nanoGPT's 65 characters in nanoGPT's order (its prepare.py: sorted distinct characters)."""
    text = (test_data / "small" / "tinyshakespeare.txt").read_text(encoding="utf-8")
    chars = train_chars([text])
    assert (chars.vocab_size, chars.eot_id) == (66, 65)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    assert chars.encode(text) == [stoi[c] for c in text]
    assert chars.decode(chars.encode(text)) == text


def test_bytes_and_chars_round_trip_all_plain_texts(test_data: Path) -> None:
    for name, text in plain_texts(test_data).items():
        chars = train_chars([text[:1000], text[1000:]])
        assert chars.decode(chars.encode(text)) == text, name
        assert BYTES.decode(BYTES.encode(text)) == text, name


@FUZZ
@given(text=VALID.filter(bool))
def test_chars_round_trip_of_fuzzed_unicode(text: str) -> None:
    """Ids are places in the sorted list of distinct characters, as Python sorts."""
    chars = train_chars(list(text))
    known = sorted(set(text))
    assert chars.encode(text) == [known.index(c) for c in text]
    assert chars.encode_batch([text, ""]) == [chars.encode(text), []]
    assert chars.decode(chars.encode(text)) == text
    assert chars.decode_bytes(chars.encode(text)) == text.encode()


@pytest.mark.parametrize(
    ("text", "shown", "position"),
    [
        ("abcd", "'d' (U+0064)", 3),
        ("a\nb", r"'\n' (U+000A)", 1),
        ("😀", "'😀' (U+1F600)", 0),
        ("ab\ud800", r"'\ud800' (U+D800)", 2),
        ("\x00", r"'\x00' (U+0000)", 0),
    ],
)
def test_chars_name_the_unknown_character(text: str, shown: str, position: int) -> None:
    """Below, between and above the known ones; surrogates too."""
    with pytest.raises(DataError) as e:
        train_chars(["abc\u3000"]).encode(text)
    assert str(e.value) == (
        f"the character {shown} at position {position} is not among the 4 of this chars tokenizer.\n"
        "  try: train it on text that has the character, or take bytes, bpe or gpt2, which have all"
    )


def test_chars_end_of_text() -> None:
    """Asked for, it is one id and needs no characters; else its characters must be known like any others."""
    chars = train_chars(["ab"])
    assert chars.encode("a<|endoftext|>b", allow_special=True) == [0, 2, 1]
    assert chars.decode([0, 2, 1]) == "a<|endoftext|>b"
    with pytest.raises(DataError, match=r"'<' .U\+003C. at position 1 "):
        chars.encode("a<|endoftext|>b")
    with pytest.raises(DataError, match=r"'c' .U\+0063. at position 15 "):
        chars.encode("a<|endoftext|>bc", allow_special=True)
    spelt = train_chars(["a<|endoftext|>b"])
    assert spelt.decode(spelt.encode("a<|endoftext|>b")) == "a<|endoftext|>b"
    assert spelt.eot_id not in spelt.encode("a<|endoftext|>b")


def test_chars_need_text_and_ignore_surrogates() -> None:
    for texts in ([], [""], ["\ud800"]):
        with pytest.raises(DataError, match=r"^there is no text to train a chars tokenizer on\.$"):
            train_chars(texts)
    assert train_chars(["b\ud800", "a"]).vocab_size == 3


@pytest.mark.parametrize("tokenizer", [BYTES, train_chars(["ab"])], ids=["bytes", "chars"])
def test_ids_outside_the_vocabulary_are_named(tokenizer: ByteTokenizer) -> None:
    """A negative id must not count from the end."""
    for bad in (-1, tokenizer.vocab_size, 2**70):
        with pytest.raises(DataError, match=f"^id {bad}, at place 1, is not in the vocabulary"):
            tokenizer.decode([0, bad])
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # type: ignore[list-item]


def test_ids_may_be_numpy_arrays() -> None:
    assert BYTES.decode(np.frombuffer(b"hello", dtype=np.uint8).astype(np.uint16)) == "hello"  # type: ignore[arg-type]
