"""Which texts were there before: a table of hashes on disk, so that memory does not grow with the number of documents."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

CACHE_KIB = 32 << 10
MOST_ASKED = 10_000  # hashes in one question


class Seen:
    """A set of 64-bit hashes in a file, which can be taken back to where it was saved.

    Of a hundred million different texts, one is taken for another with a chance of 1 in 3,700.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        """Open the table at `path`, or make it; what was added from `step` on is forgotten.

        Raises:
            ValueError: the table was last saved before `step`, or is none.
        """
        try:
            self._table = sqlite3.connect(path, isolation_level=None)
            for pragma in (f"cache_size=-{CACHE_KIB}", "journal_mode=WAL", "synchronous=FULL"):
                self._table.execute(f"PRAGMA {pragma}").close()
            self._table.execute(
                "CREATE TABLE IF NOT EXISTS seen (hash INTEGER PRIMARY KEY, step INTEGER) STRICT"
            )
            self._table.execute("CREATE TABLE IF NOT EXISTS saved (step INTEGER) STRICT")
            (saved,) = self._table.execute("SELECT coalesce(max(step), 0) FROM saved").fetchone()
            if saved < step:
                raise ValueError(f"{path} knows of {saved} steps, not of {step}")
            if saved > step:  # the crash came between saving this and saving what belongs to it
                self._table.execute("DELETE FROM seen WHERE step >= ?", (step,))
            self._table.execute("BEGIN")
        except sqlite3.Error as e:
            raise ValueError(f"{path}: {e}") from None

    def add(self, hashes: Sequence[int], step: int) -> list[bool]:
        """Whether each hash was there before it, those of this call included; afterwards all are."""
        signed = [h - (1 << 64) if h >> 63 else h for h in hashes]
        known: set[int] = set()
        for at in range(0, len(signed), MOST_ASKED):
            asked = str(signed[at : at + MOST_ASKED])
            rows = self._table.execute(
                "SELECT hash FROM seen WHERE hash IN (SELECT value FROM json_each(?))", (asked,)
            )
            known.update(h for (h,) in rows)
        before, new = [], []
        for h in signed:
            before.append(h in known)
            if h not in known:
                known.add(h)
                new.append((h, step))
        self._table.executemany("INSERT INTO seen VALUES (?, ?)", new)
        return before

    def save(self, step: int) -> None:
        """Make everything so far durable; `step` is the first that is not in it."""
        self._table.execute("DELETE FROM saved")
        self._table.execute("INSERT INTO saved VALUES (?)", (step,))
        self._table.execute("COMMIT")
        self._table.execute("BEGIN")

    def close(self) -> None:
        """Let go of the file, as it was saved last."""
        self._table.close()
