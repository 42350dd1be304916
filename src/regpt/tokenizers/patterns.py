"""How text is split before bytes are paired: GPT-2's and GPT-4's patterns, as each library takes them.

A pair never crosses from one pre-token into the next. Each pattern stands here in up to three spellings of the same
matches; tests/tokenizers/test_exchange.py compares them, pre-token by pre-token, with what tiktoken publishes.
"""

from __future__ import annotations

from dataclasses import dataclass

# Unicode's White_Space: \s in tiktoken and in tokenizers. Python's \s has U+001C to U+001F besides.
WHITE = (
    "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
)


@dataclass(frozen=True)
class Pattern:
    """One way to split."""

    title: str
    """Part of every fingerprint: never to be changed."""
    split: str
    """For fancy-regex, which tiktoken and rustbpe use. What needs no look-ahead stands in one group: there the plain
    engine runs, half again as fast as through the possessive form that tiktoken publishes."""
    json: str | None
    """For tokenizer.json, whose readers have several engines: no possessive quantifiers, no inline flags, no `$`. None:
    the split that the format knows by name."""
    gigatoken: str | None
    """The spelling by which gigatoken knows the split. None: as in tokenizer.json."""


PATTERNS = {
    "gpt2": Pattern(
        title="GPT-2's split",
        split=r"(?: ?\p{L}+|'(?:[sdmt]|ll|ve|re)| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s",
        json=None,
        gigatoken=None,
    ),
    "gpt4": Pattern(
        title="GPT-4's split",
        split=r"(?:'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        # ſ is s to whoever ignores case; (?![\s\S]) is the end of the text in every engine.
        json=r"'(?:[sSſdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s+(?![\s\S])|\s*[\r\n]|\s+(?!\S)|\s",
        gigatoken=r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s+",
    ),
}
