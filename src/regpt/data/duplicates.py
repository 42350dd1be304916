"""Which texts were there before: a table of hashes on disk, so that memory does not grow with the number of documents."""

from __future__ import annotations

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CACHE_KIB = 32 << 10
MOST_AT_ONCE = 20_000  # hashes in one statement

Hashes = NDArray[np.uint64]


class Seen:
    """A set of 64-bit hashes in a file, which can be taken back to where it was saved.

    Of a hundred million different texts, one is taken for another with a chance of 1 in 3,700.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        """Open the table at `path`, or make it; what was added from `step` on is forgotten.

        Raises:
            ValueError: the table was last saved before `step`, or is none.
            OSError: the disk has no room, or takes no such file.
        """
        self._path = path
        with self._told():
            self._table = sqlite3.connect(path, isolation_level=None)
            for pragma in (
                "locking_mode=EXCLUSIVE",  # nobody else has it; so WAL needs no shared memory, which network disks lack
                f"cache_size=-{CACHE_KIB}",
                "journal_mode=WAL",
                "synchronous=FULL",
            ):
                self._table.execute(f"PRAGMA {pragma}").close()
            for columns in ("seen (hash INTEGER PRIMARY KEY, step INTEGER)", "saved (step INTEGER)"):
                self._table.execute(f"CREATE TABLE IF NOT EXISTS {columns} STRICT")
            (saved,) = self._table.execute("SELECT coalesce(max(step), 0) FROM saved").fetchone()
            if saved < step:
                self._table.close()
                raise ValueError(f"{path} knows of {saved} steps, not of {step}")
            if saved > step:  # the crash came between saving this and saving what belongs to it
                self._table.execute("DELETE FROM seen WHERE step >= ?", (step,))
            self._table.execute("BEGIN")

    def add(self, hashes: Hashes, step: int) -> NDArray[np.bool_]:
        """Whether each hash (n,) was there before it, those of this call included; afterwards all are. (n,)"""
        signed, first = np.unique(
            hashes.view(np.int64), return_index=True
        )  # sorted: neighbours lie on one page
        before = np.ones(len(hashes), dtype=bool)
        with self._told():
            for at in range(0, len(signed), MOST_AT_ONCE):
                some = signed[at : at + MOST_AT_ONCE]
                rows = self._table.execute(
                    "INSERT OR IGNORE INTO seen SELECT value, ? FROM json_each(?) RETURNING hash",
                    (step, str(some.tolist())),
                )
                new = np.array([h for (h,) in rows], dtype=np.int64)
                before[first[at : at + MOST_AT_ONCE][np.isin(some, new, assume_unique=True)]] = False
        return before

    def save(self, step: int) -> None:
        """Make everything so far durable; `step` is the first that is not in it."""
        with self._told():
            self._table.execute("DELETE FROM saved")
            self._table.execute("INSERT INTO saved VALUES (?)", (step,))
            self._table.execute("COMMIT")
            self._table.execute("BEGIN")

    def close(self) -> None:
        """Let go of the file, as it was saved last."""
        self._table.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors as the system would tell them."""
        try:
            yield
        except sqlite3.Error as e:
            if e.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, "No space left on device", str(self._path)) from None
            if isinstance(e, sqlite3.OperationalError):
                raise OSError(errno.EIO, str(e), str(self._path)) from None
            raise ValueError(f"{self._path}: {e}") from None
