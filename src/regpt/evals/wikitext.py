"""WikiText-2, raw (Merity et al. 2016): the loss over its test set per word and per byte, whatever the tokenizer.

As lm-eval's task `wikitext` counts it: each page by itself, written as a person would by `detokenized`, after one
end-of-text, in windows of the model's context that do not overlap; the loss is divided by the words and bytes of the page
before it was rewritten. `word_perplexity` and `byte_perplexity` are exp of it, `bits_per_byte` its logarithm to base 2.

`word_perplexity_strided` is in the manner of GPT-2's paper (section 3.1): all pages as one text, so that every target but
the first sees at least half a context (windows that overlap by half), over the words and line ends of the original file,
each of which WikiText counts as a token. The paper does not say its stride, and its detokeniser is not published.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from regpt.evals.figures import Figure, exponential, ratio, scaled
from regpt.evals.files import Files, Remote, find, holds_rows, read_rows, read_text
from regpt.evals.likelihood import Request
from regpt.evals.task import Answers, Encoder, Parts, Task
from regpt.tokenizers import Tokenizer

WIKITEXT = Files(
    task="wikitext",
    names=("wiki.test.raw", "wikitext.jsonl"),
    remote=(
        Remote(
            url="https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
            name="wiki.test.raw",
            member="wikitext-2-raw/wiki.test.raw",
            sha256="173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        ),
    ),
)
PAGES, WHOLE = "pages", "whole"


@dataclass(frozen=True, kw_only=True)
class WikiText(Task):
    """Pages."""

    pages: Sequence[str]

    @property
    def rows(self) -> int:
        return len(self.pages)

    @cached_property
    def written(self) -> list[str]:
        """The pages as a person would write them."""
        return [detokenized(page) for page in self.pages]

    def requests(self, tokenizer: Tokenizer, block_size: int) -> Parts:
        encoder = Encoder(tokenizer, self.name)
        start = (tokenizer.eot_id,)
        by_page = [
            list(rolling(start + encoder.encoded(page, number), block_size, block_size))
            for number, page in enumerate(self.written)
        ]
        whole = start + encoder.encoded("\n".join(self.written), 0)
        return {PAGES: by_page, WHOLE: [list(rolling(whole, block_size, max(block_size // 2, 1)))]}

    def figures(self, answers: Answers) -> dict[str, Figure]:
        nats = [-math.fsum(s.logprob for s in page) for page in answers[PAGES]]
        words = [len(re.split(r"\s+", page)) for page in self.pages]  # as lm-eval: the empty ends count, too
        sizes = [len(page.encode()) for page in self.pages]
        per_byte = ratio(nats, sizes)
        whole = -math.fsum(s.logprob for s in answers[WHOLE][0])
        tokens = sum(len(page.split()) + page.count("\n") + 1 for page in self.pages)
        return {
            "word_perplexity": exponential(ratio(nats, words)),
            "byte_perplexity": exponential(per_byte),
            "bits_per_byte": scaled(per_byte, 1 / math.log(2)),
            "word_perplexity_strided": exponential(Figure(whole / tokens)),
        }


def open_wikitext(data: Path | None, limit: int | None) -> WikiText:
    """WikiText from the published file, or from rows with the field `page`."""
    path = find(WIKITEXT, data)
    if holds_rows(path):
        found = [row.get("page", str) for row in read_rows(path, limit)]
    else:
        found = list(pages(read_text(path)))[:limit]
    return WikiText(name="wikitext", pages=found)


def pages(text: str) -> Iterator[str]:
    """The pages of a file of WikiText, as the hub's EleutherAI/wikitext_document_level has them: 62 in the test set.

    A page begins at a line of one equals sign on either side. (Two of the 62 are formulas; `data/articles.py`, which does
    not have to agree with lm-eval, finds the 60 articles.) What stands before the first is a page, unless it is blank.
    """
    held: list[str] = []
    for line in text.split("\n"):
        bare = line.replace("= = =", "===").replace("= =", "==").strip()
        if bare.startswith("= ") and bare.endswith(" ="):
            if "".join(held).strip():
                yield "\n".join(held)
            held = []
        held.append(line)
    yield "\n".join(held)


def rolling(ids: tuple[int, ...], context: int, stride: int) -> Iterator[Request]:
    """Windows over ids, every one but the first scored once, with `context` tokens of input, moved on by `stride`.

    The last window reaches back, so that it is as long as the others, as lm-eval's `get_rolling_token_windows`.
    """
    end = min(context + 1, len(ids))
    if end > 1:
        yield Request(ids[:1], ids[1:end])
    while end < len(ids):
        begin, end = end, min(end + stride, len(ids))
        yield Request(ids[end - context - 1 : begin], ids[begin:end])


# What WikiText's preparation did to Wikipedia's text, undone: pattern and replacement, one after another, in lm-eval's order
# (lm_eval/tasks/wikitext/preprocess_wikitext.py, from Megatron-LM). The second was meant otherwise, and finds next to nothing.
_PAIRS = (("(", ")"), ("[", "]"), ("{", "}"), ('"', '"'), ("'", "'"))
REWRITTEN: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("s '", "s'"),
        ("/' [0-9]/", "/'[0-9]/"),
        *((f" @{mark}@ ", mark) for mark in ("-", ",", r"\.")),
        *((f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
        *((rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in _PAIRS),
        *((" ".join("=" * n), "=" * n) for n in (4, 3, 2)),
        (" ° ", "°"),
        (" \n", "\n"),
        ("\n ", "\n"),
        (" N ", " 1 "),
        (" 's", "'s"),
    )
)


def detokenized(page: str) -> str:
    """A page as a person would write it: `a guest @-@ starring role , in` becomes `a guest-starring role, in`."""
    for pattern, replacement in REWRITTEN:
        page = pattern.sub(replacement.replace(r"\.", "."), page)
    return page
