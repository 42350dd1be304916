"""Bytes to text: whole characters, and no part of a stop string, however the bytes were cut into tokens."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import ByteIds, Scripted

from regpt.infer.engine import SamplingSettings, TextStream, complete

TEXT = st.text(st.sampled_from("abé😀\n"), max_size=30)
STOPS = st.lists(st.text(st.sampled_from("abé😀"), min_size=1, max_size=5), max_size=4)


def cut(text: str, stops: list[str]) -> str:
    """What may be shown of `text`, by the plainest rule: read on until it ends in a stop string."""
    for end in range(1, len(text) + 1):
        if complete_now := [s for s in stops if text[:end].endswith(s)]:
            return text[: end - max(map(len, complete_now))]
    return text


def feed(data: bytes, cuts: list[int], stops: list[str]) -> list[str]:
    stream, pieces, at = TextStream(stops), [], 0
    for end in [*sorted({c for c in cuts if c < len(data)}), len(data)]:
        pieces.append(stream.feed(data[at:end], last=end == len(data)))
        at = end
        if stream.stopped:
            break
    return pieces


@settings(max_examples=1500, deadline=None)
@given(TEXT, STOPS, st.lists(st.integers(0, 100)))
@example("abab", ["ab", "bab"], [1, 2])
@example("aaab", ["aab"], [1, 2, 3])
def test_stop_strings_however_the_bytes_are_cut(text: str, stops: list[str], cuts: list[int]) -> None:
    """The text is the same for any cut, and at no moment more of it was shown than remains in the end."""
    expected, shown = cut(text, stops), ""
    for piece in feed(text.encode(), cuts, stops):
        shown += piece
        assert expected.startswith(shown)
    assert shown == expected


@settings(max_examples=1000, deadline=None)
@given(st.binary(max_size=40) | TEXT.map(str.encode), st.lists(st.integers(0, 50)))
def test_any_bytes_decode_as_python_decodes_them(data: bytes, cuts: list[int]) -> None:
    assert "".join(feed(data, cuts, [])) == data.decode("utf-8", "replace")


@settings(max_examples=300, deadline=None)
@given(TEXT, STOPS, st.integers(1, 60))
def test_through_the_engine(text: str, stops: list[str], limit: int) -> None:
    """A model that says `text` byte by byte, cut by stop strings and by length."""
    said = text.encode()[:limit]
    (done,) = complete(
        Scripted(list(text.encode())),
        ByteIds(),
        "p",
        SamplingSettings(temperature=0, max_new_tokens=limit, stop=tuple(stops)),
    )
    expected = cut(said.decode("utf-8", "replace"), stops)
    assert done.text == expected
    assert bytes(done.tokens).decode("utf-8", "replace").startswith(expected)
    stopped = expected != said.decode("utf-8", "replace") or len(text.encode()) < limit
    assert done.finish_reason == ("stop" if stopped else "length")


def test_text_is_shown_as_soon_as_it_is_certain() -> None:
    stream = TextStream(["abc"])
    assert [stream.feed(c.encode()) for c in "xabxab"] == ["x", "", "", "abx", "", ""]
    assert stream.feed(b"", last=True) == "ab"
