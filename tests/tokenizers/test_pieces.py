from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from sample_texts import FUZZ, VALID

from regpt.tokenizers.bpe import BPETokenizer
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
