"""Long texts in pieces: for encoding, cut where no id changes; for training, cut where endless runs would stall."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from regpt.tokenizers.patterns import WHITE

PIECE = 2**16
RUN = 1000

# No pre-token of GPT-2's split runs across these places: before white space that follows something else, and
# before the last white space of a run, which the split leaves to what follows (`\s+(?!\S)`).
_CUT = re.compile(f"(?<=[^{WHITE}])[{WHITE}]|[{WHITE}](?=[^{WHITE}])")
_LAST_WHITE = re.compile(f"[{WHITE}](?=[^{WHITE}])")


def _cut_gpt2(text: str, start: int, place: int) -> int | None:
    found = _CUT.search(text, place)
    return found.start() if found else None


def _cut_gpt4(text: str, start: int, place: int) -> int | None:
    """Behind the last line end of a run of white space (`\\s*[\\r\\n]`), or, without one, before its last white space.

    Punctuation takes the line ends that follow it, so before a line end is no place to cut.
    """
    found = _LAST_WHITE.search(text, place)
    if not found:
        return None
    last = found.start()
    run = start + len(text[start : last + 1].rstrip(WHITE))
    line_end = max(text.rfind(c, run, last + 1) for c in "\r\n")
    return line_end + 1 if line_end >= 0 else last


_CUTS: dict[str, Callable[[str, int, int], int | None]] = {"gpt2": _cut_gpt2, "gpt4": _cut_gpt4}


def pieces(text: str, size: int = PIECE, pattern: str = "gpt2") -> Iterator[str]:
    """Pieces of about `size` (1 up) characters whose ids, put together, are those of the whole text.

    It bounds memory, and it saves the regular expression engine, whose stack a million blanks before a word
    would overflow: such a run ends its piece, and there it is matched in one go. Without white space, no cut.
    """
    start, find = 0, _CUTS[pattern]
    while len(text) - start > size and (cut := find(text, start, start + size)) is not None:
        yield text[start:cut]
        start = cut
    yield text[start:]


def training_pieces(text: str, pattern: str = "gpt2") -> Iterator[str]:
    """Pieces whose pairs can be counted in linear time: runs of thousands of characters are cut as well.

    The trainer's time is quadratic in the length of a pre-token (a million blanks: nine minutes). Stretches
    of RUN characters that are all white space, or have none, stand alone; each cut loses one pair's count.
    """
    for piece in pieces(text, pattern=pattern):
        start = 0
        for place in range(0, len(piece) - RUN + 1, RUN):
            stretch = piece[place : place + RUN]
            if stretch.isspace() or len(stretch.split(None, 1)[0]) == RUN:
                yield piece[start:place]
                yield stretch
                start = place + RUN
        yield piece[start:]
