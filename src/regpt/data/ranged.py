"""A file of a server as a file object: every read asks for its own bytes and for no others, and nothing is stored."""

from __future__ import annotations

import io
from typing import Any

from regpt.data.download import Client, RemoteFile

KEPT_BYTES = 16 << 20
"""Of the file's end that are kept in memory: parquet's footer, which is read anew for every row group."""


class RangedFile(io.RawIOBase):
    """Read-only and seekable; through `Client`, so with its patience.

    No hash is compared, since the file is never whole: that the place and the file's size are as announced is all.
    """

    def __init__(self, client: Client, file: RemoteFile, label: str) -> None:
        self.client, self.file, self.label = client, file, label
        self._at = 0
        self._head = self._tail = b""

    def __str__(self) -> str:
        return self.label

    @property
    def size(self) -> int:
        """Of the file."""
        return self.file.size

    def head(self, n: int) -> bytes:
        """The first `n` bytes, asked for once."""
        if len(self._head) < min(n, self.size):
            self._head = self.between(0, n)
        return self._head[:n]

    def between(self, start: int, stop: int) -> bytes:
        """What there is of [start, stop)."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        kept_from = self.size - len(self._tail)
        if start >= kept_from:
            return self._tail[start - kept_from : stop - kept_from]
        if stop <= kept_from and stop < self.size:
            return self.client.read(self.file, start, stop)
        tail = self.client.read(self.file, start, kept_from) + self._tail
        if len(tail) <= KEPT_BYTES:
            self._tail = tail
        return tail[: stop - start]

    def again(self) -> RangedFile:
        """The same file from its beginning, with a place of its own."""
        return RangedFile(self.client, self.file, self.label)

    def close(self) -> None:
        """Nothing: there is nothing that is held open, and the next who reads it finds the footer here."""

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move there; nothing is asked for."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """As many bytes as fit, by one request."""
        content = self.between(self._at, self._at + len(buffer))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
