"""Long texts in pieces: for encoding, cut where no id changes; for training, cut where endless runs would stall."""

from __future__ import annotations

import re
from collections.abc import Iterator

PIECE = 2**16
RUN = 1000

# Unicode's White_Space: \s in tiktoken and in tokenizers. Python's \s has U+001C to U+001F besides.
_WHITE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# No pre-token of GPT-2's split runs across these places: before white space that follows something else, and
# before the last white space of a run, which the split leaves to what follows (`\s+(?!\S)`).
_CUT = re.compile(f"(?<=[^{_WHITE}])[{_WHITE}]|[{_WHITE}](?=[^{_WHITE}])")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Pieces of `size` (1 up) characters or a little more whose ids, put together, are those of the whole text.

    It bounds memory, and it saves the regular expression engine, whose stack a million blanks before a word
    would overflow: such a run ends its piece, and there it is matched in one go. Without white space, no cut.
    """
    start = 0
    while len(text) - start > size and (cut := _CUT.search(text, start + size)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def training_pieces(text: str) -> Iterator[str]:
    """Pieces whose pairs can be counted in linear time: runs of thousands of characters are cut as well.

    The trainer's time is quadratic in the length of a pre-token (a million blanks: nine minutes). Stretches
    of RUN characters that are all white space, or have none, stand alone; each cut loses one pair's count.
    """
    for piece in pieces(text):
        start = 0
        for place in range(0, len(piece) - RUN + 1, RUN):
            stretch = piece[place : place + RUN]
            if stretch.isspace() or len(stretch.split(None, 1)[0]) == RUN:
                yield piece[start:place]
                yield stretch
                start = place + RUN
        yield piece[start:]
