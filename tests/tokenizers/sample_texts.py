"""Texts to try tokenizers on: a rhyme, the shared ones, and hostile ones by Hypothesis."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st

RHYME = (
    "Humpty Dumpty sat on a wall,\nHumpty Dumpty had a great fall.\n\n"
    "All the king's horses and all the king's men   couldn't put Humpty together again. 1234 1234!\n"
    "Größenwahn, Größe, größer: 中文中文 中文 😀😀\n"
)

FUZZ = settings(max_examples=300, deadline=None, derandomize=True, database=None)

ANYTHING = st.text(st.characters(exclude_categories=()))  # surrogates are a category, and are left in
TURNS = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", "\u200b", "\ufeff", "\x00"]
    + [
        "a",
        "A",
        "é",
        "e\u0301",
        "ß",
        "中",
        "ا",
        "๑",
        "٣",
        "½",
        "7",
        "😀",
        "👩\u200d👩\u200d👧",
        "\ufffd",
        "\ud800",
        "\udc00",
    ]
    + [
        "'",
        "'s",
        "'S",
        "'ll",
        "'re",
        "’s",
        "!",
        "...",
        "_",
        "^",
        "<|",
        "|>",
        "endoftext",
        "<|endoftext|>",
        "the",
        " the",
    ]
)
HOSTILE = ANYTHING | st.lists(TURNS | ANYTHING, max_size=30).map("".join)
VALID = HOSTILE.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


def lines_of(path: Path) -> Iterator[str]:
    """The texts of a packed JSONL file."""
    with lzma.open(path, "rb") as file:
        for line in file:
            yield json.loads(line)["text"]


def plain_texts(test_data: Path) -> dict[str, str]:
    """Every plain text in the shared data, whole."""
    paths = [*(test_data / "small").rglob("*.txt"), *(test_data / "small").rglob("*.en")]
    paths += [test_data / "eval" / "wiki.test.raw"]
    return {p.name: p.read_bytes().decode() for p in sorted(paths) if "merges" not in p.name}
