from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_texts import FUZZ, RHYME, VALID

from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.pieces import RUN, pieces, training_pieces


@FUZZ
@given(text=VALID, size=st.integers(1, 12))
def test_pieces_encode_as_the_whole_does(small_bpe: BPETokenizer, text: str, size: int) -> None:
    """Cut as often as can be, the ids are those of the text in one go."""
    cut = list(pieces(text, size))
    assert "".join(cut) == text
    whole = small_bpe._encoding.encode_ordinary(text)
    assert [i for piece in cut for i in small_bpe._encoding.encode_ordinary(piece)] == whole


def test_every_kind_of_white_space_is_a_place_to_cut_or_is_none(small_bpe: BPETokenizer) -> None:
    """One code point after the other, alone and in runs: what Python calls white space and \\s does not, too."""
    for point in [*range(0x3000 + 2), 0xFEFF, 0xFFFD, 0x1F600, 0xE0001]:
        c = chr(point)
        text = f"a{c}b {c} 1{c}{c}2{c} !{c}\n{c}x"
        if not 0xD800 <= point < 0xE000:
            cut = [i for piece in pieces(text, 1) for i in small_bpe._encoding.encode_ordinary(piece)]
            assert cut == small_bpe._encoding.encode_ordinary(text), hex(point)


def test_pieces_are_short_where_there_is_white_space() -> None:
    cut = list(pieces("word " * 1000, 100))
    assert max(map(len, cut)) <= 105
    assert list(pieces("x" * 1000, 100)) == ["x" * 1000]


def test_training_pieces_bound_every_run_and_keep_all_text() -> None:
    text = "ab " * 700 + "x" * 5000 + " y" + " " * 3500 + "z\n" + "\n" * 999 + "中" * 2001
    cut = list(training_pieces(text))
    assert "".join(cut) == text
    assert max(len(word) for piece in cut for word in piece.split()) < 2 * RUN
    ordinary = "no run of any length in this text. " * 500
    assert list(training_pieces(ordinary)) == [ordinary]


@pytest.fixture(scope="module")
def gpt4() -> BPETokenizer:
    return train_bpe([RHYME, "x  =\n\n  1\n;\n\n" * 9], 330, pattern="gpt4")


@FUZZ
@given(text=VALID, size=st.integers(1, 12))
def test_pieces_of_gpt4s_split_encode_as_the_whole_does(gpt4: BPETokenizer, text: str, size: int) -> None:
    cut = list(pieces(text, size, "gpt4"))
    assert "".join(cut) == text
    whole = gpt4._encoding.encode_ordinary(text)
    assert [i for piece in cut for i in gpt4._encoding.encode_ordinary(piece)] == whole


@FUZZ
@given(
    text=st.lists(
        st.sampled_from(["a", "!", "7", " ", "  ", "\n", "\r", "\t", "\x85", "'s"]), max_size=30
    ).map("".join),
    size=st.integers(1, 6),
)
def test_pieces_of_white_space_and_line_ends(gpt4: BPETokenizer, text: str, size: int) -> None:
    """What GPT-4's split treats one by one: line ends after words, after punctuation, among blanks, at the end."""
    whole = gpt4._encoding.encode_ordinary(text)
    assert [i for piece in pieces(text, size, "gpt4") for i in gpt4._encoding.encode_ordinary(piece)] == whole


@pytest.mark.parametrize("run", [" ", "\n", "\xa0", "\n ", "! "])
def test_a_long_run_does_not_overflow_gpt4s_split(gpt4: BPETokenizer, run: str) -> None:
    text = f"a{run * 200_000}x"
    assert gpt4.decode(gpt4.encode(text)) == text
