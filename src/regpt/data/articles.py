"""Rows that are lines, as articles: WikiText's parquet files have a row for every line of Wikipedia's articles.

An article begins at its title, ` = Title = `, between two blank lines. (A formula that was cut at its equals signs
looks alike but stands in running text; by this rule the test split has its published 60 articles.) The hub's copy
stores blank lines as empty rows; here they are ` ` again, as in the published files, so the articles one after another
are those files to the byte.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

TITLE = re.compile(r" = (?!= ).+(?<! =) = \n?")
BLANK_LINE = " \n"


def articles(rows: Iterable[str | None]) -> Iterator[str]:
    """The articles that the rows of a data set, in their order over all its files, are the lines of."""
    held: list[str] = []
    before_is_blank = True
    for row, after in itertools.pairwise(itertools.chain(rows, [""])):
        row, after = row or "", after or ""
        if TITLE.fullmatch(row) and before_is_blank and not after.strip() and "".join(held).strip():
            yield "".join(held)
            held = []
        before_is_blank = not row.strip()
        held.append(BLANK_LINE if before_is_blank else row if row.endswith("\n") else row + "\n")
    if held:
        yield "".join(held)
