"""Large files over a network that fails: resumed where they were cut, asked for again with patience, checked, kept.

A file arrives as `NAME.part` beside its place and gets its name only when size and hash are those that were announced.
So what has its name is whole, and a stopped download goes on where it was, in this process or a later one.

Why not `huggingface_hub`'s own downloader: docs/decisions/0007-downloads-of-our-own.md.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from regpt.errors import DataError
from regpt.train.durable import lock_file, make_folder, sync_folder

Note = Callable[[str], None]
"""Hears a sentence now and then: what is downloaded, why it waits."""


def unheard(_: str) -> None:
    """A `Note` to nobody; a function with a name, so that it travels to other processes."""


SILENCE_S = 30.0  # that a server may stay silent
ATTEMPTS = 6  # in a row that bring not one byte
WRONG_ANSWERS = 3  # whole answers of the wrong size or content
MOST_ATTEMPTS = 1000  # of one file, however little each of them brings
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0  # a server that asks for more is given up
OTHER_PROCESS_S = 1.0  # between two looks whether another process has finished the same file
BLOCK_BYTES = 1 << 20
DOCUMENT_BYTES = 64 << 20  # a list of a thousand files takes a fraction of a megabyte
PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that another attempt may not meet."""


PART, LOCK = ".part", ".lock"


HUB = "https://huggingface.co"


def offline() -> bool:
    """Whether HF_HUB_OFFLINE says that no server is to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def reachable(timeout_s: float = 5.0) -> bool:
    """Whether the hub, or the mirror in its place (HF_ENDPOINT), takes a connection."""
    parts = urlsplit(os.environ.get("HF_ENDPOINT") or HUB)
    port = parts.port or (80 if parts.scheme == "http" else 443)
    try:
        with socket.create_connection((parts.hostname or "", port), timeout_s):
            return True
    except OSError:
        return any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY"))  # asked by other ways


class Unreachable(DataError):
    """The server gave no answer that could be used, however often it was asked; what is kept from before may do."""


class _Passing(Exception):
    """What another attempt may not meet."""

    def __init__(self, what: str, *, retry_after: float = 0.0, wrong: bool = False) -> None:
        super().__init__(what)
        self.retry_after, self.wrong = retry_after, wrong


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server announces it."""

    url: str
    size: int
    digest: str
    """Hex: sha256 of the content (64 digits), or git's sha1 of it as a blob (40 digits)."""


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Redirects are followed, but a token is told to no other host."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        token = req.unredirected_hdrs.get("Authorization")
        if made and token and urlsplit(newurl)[:2] == urlsplit(req.full_url)[:2]:
            made.add_unredirected_header("Authorization", token)
        return made


@dataclass(frozen=True)
class Client:
    """Asks servers, again and again within reason.

    Args:
        refused: the error for a status that another attempt would meet too (401, 403, 404 …).
        by_hand: how a person gets the file without us, for the error at the end.
        sleep: waits so many seconds; tests give one that does not.
    """

    refused: Callable[[str, int, Message], DataError]
    by_hand: str
    token: str | None = None
    note: Note = unheard
    sleep: Callable[[float], None] = time.sleep
    attempts: int = ATTEMPTS

    def get(self, url: str) -> tuple[bytes, Message]:
        """A small document and its headers.

        Raises:
            Unreachable: no usable answer came.
            DataError: the server says no.
        """
        for tried in self._tries(url):
            with tried, self._reply(url, {}) as reply:
                content = b""
                while block := _read(reply, BLOCK_BYTES):
                    content += block
                    if len(content) > DOCUMENT_BYTES:
                        raise _Passing(f"the answer is longer than {DOCUMENT_BYTES:,} bytes", wrong=True)
                length = reply.headers.get("Content-Length")
                if length is not None and length.isdecimal() and int(length) != len(content):
                    raise _Passing(f"the connection ended after {len(content):,} of {int(length):,} bytes")
                return content, reply.headers
        raise AssertionError  # `_tries` ends by raising

    def fetch(self, file: RemoteFile, keep: Path, progress: Callable[[int], None] = lambda _: None) -> None:
        """Have `file` at `keep`: nothing is asked if it is there. Safe for several processes.

        Args:
            progress: hears how many bytes are here.

        Raises:
            Unreachable, DataError: as of `get`; or what came is not what was announced.
        """
        if _is_there(keep, file.size):
            return
        make_folder(keep.parent)
        part = beside(keep, PART)
        with self._alone(part, keep):
            if _is_there(keep, file.size):
                return
            for tried in self._tries(file.url, lambda: size_of(part)):
                with tried:
                    self._receive(file, part, progress)
                    _check(file, part)
                    break
            os.replace(part, keep)
            sync_folder(keep.parent)

    def read(self, file: RemoteFile, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of the file, which must lie within it, and no others.

        Raises:
            Unreachable, DataError: as of `get`.
        """
        content = bytearray()
        for tried in self._tries(file.url, lambda: len(content)):
            with tried:
                self._receive_range(file, start, stop, content)
                return bytes(content)
        raise AssertionError  # `_tries` ends by raising

    def _receive_range(self, file: RemoteFile, start: int, stop: int, content: bytearray) -> None:
        """What `content` lacks of [start, stop). Raises _Passing where not all of it came."""
        at = start + len(content)
        with self._reply(file.url, {"Range": f"bytes={at}-{stop - 1}"}) as reply:
            ranged = reply.status == 206
            if not ranged and at > DOCUMENT_BYTES:
                raise _Passing("asked for a few of its bytes, the server sends all of them", wrong=True)
            _check_announced(file, reply, at if ranged else 0, stop if ranged else file.size)
            to_pass_over = 0 if ranged else at
            while at < stop and (block := _read(reply, min(BLOCK_BYTES, to_pass_over or stop - at))):
                if to_pass_over:
                    to_pass_over -= len(block)
                else:
                    content += block
                    at += len(block)
        if at < stop:
            raise _Passing(f"the connection ended after {len(content):,} of {stop - start:,} bytes")

    def _tries(
        self, url: str, received: Callable[[], int] = lambda: 0
    ) -> Iterator[contextlib.AbstractContextManager[None]]:
        """Contexts to try in, one after the other, with a pause after each that failed; the last error at the end."""
        failures = wrong = 0
        for _ in range(MOST_ATTEMPTS):
            before = received()
            attempt = _Attempt()
            yield attempt
            if (error := attempt.error) is None:
                return
            failures = 1 if received() > before else failures + 1
            wrong += error.wrong
            if (
                failures >= self.attempts
                or wrong >= WRONG_ANSWERS
                or error.retry_after > LONGEST_RETRY_AFTER_S
            ):
                break
            wait = error.retry_after or min(2.0 ** (failures - 1), LONGEST_WAIT_S)
            self.note(f"{url}: {error}; trying again in {wait:g} s")
            self.sleep(wait)
        raise Unreachable(f"cannot download {url}: {error}.", hint=self.by_hand)

    @contextlib.contextmanager
    def _reply(self, url: str, headers: Mapping[str, str]) -> Iterator[http.client.HTTPResponse]:
        """The server's answer, its status below 400."""
        request = urllib.request.Request(url, headers={"User-Agent": "regpt", "Accept-Encoding": "identity"})
        for name, value in headers.items():
            request.add_header(name, value)
        if self.token:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")
        opener = urllib.request.build_opener(_SameHost)
        try:
            reply = opener.open(request, timeout=SILENCE_S)
        except urllib.error.HTTPError as e:
            with e:
                if e.code in PASSING:
                    after = _retry_after(e.headers.get("Retry-After"))
                    raise _Passing(f"HTTP {e.code} {e.reason}", retry_after=after) from None
                if e.code == 416:
                    raise _Passing("the server has less of it than is here", wrong=True) from None
                raise self.refused(url, e.code, e.headers) from None
        except (OSError, http.client.HTTPException, ValueError) as e:
            reason = getattr(e, "reason", e)
            raise _Passing(str(reason) or type(e).__name__) from None
        with reply:
            yield reply

    def _receive(self, file: RemoteFile, part: Path, progress: Callable[[int], None]) -> None:
        """What is missing of `part`. Raises _Passing where not all of it came."""
        have = size_of(part)
        if have > file.size:
            part.unlink()
            have = 0
        if have == file.size:
            return
        with self._reply(file.url, {"Range": f"bytes={have}-"} if have else {}) as reply:
            have = have if reply.status == 206 else 0  # 200: the server sends all of it, whatever was asked
            _check_announced(file, reply, have, file.size)
            with open(part, "r+b" if part.exists() else "wb") as out:
                out.truncate(have)
                out.seek(have)
                while have < file.size and (block := _read(reply, min(BLOCK_BYTES, file.size - have))):
                    out.write(block)
                    have += len(block)
                    progress(have)
                out.flush()
                os.fsync(out.fileno())
        if have < file.size:
            raise _Passing(f"the connection ended after {have:,} of {file.size:,} bytes")

    @contextlib.contextmanager
    def _alone(self, part: Path, keep: Path) -> Iterator[None]:
        """Hold this file against other processes, or wait until the one that holds it is done."""
        path, told = beside(keep, LOCK), False
        with open(path, "a+b") as lock:
            while lock_file(lock) is False:
                if not told:
                    self.note(f"another process is downloading {part}; waiting for it")
                told = True
                self.sleep(OTHER_PROCESS_S)
            yield


class _Attempt(contextlib.AbstractContextManager[None]):
    """Keeps a failure that may pass; lets any other through."""

    error: _Passing | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, _Passing) else None
        return self.error is not None


def beside(keep: Path, suffix: str) -> Path:
    """What lies beside a file while it is downloaded: PART of it, and a LOCK."""
    return keep.with_name(keep.name + suffix)


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _is_there(path: Path, size: int) -> bool:
    """Whether the file is here. It got its name after its hash was compared, so its size tells enough from then on."""
    if not path.exists():
        return False
    if size_of(path) == size:
        return True
    path.unlink()  # cut by something else: a full disk while it was copied, a person
    return False


def _read(reply: http.client.HTTPResponse, size: int) -> bytes:
    """What has come so far, so that a cut loses nothing; b"" at the end."""
    try:
        return reply.read1(size)
    except (OSError, http.client.HTTPException, ValueError) as e:
        raise _Passing(str(e) or type(e).__name__) from None


def _check_announced(file: RemoteFile, reply: http.client.HTTPResponse, start: int, stop: int) -> None:
    """Refuse, before it is put behind what is here, an answer that cannot be bytes [start, stop) of the file."""
    length, placed = reply.headers.get("Content-Length"), reply.headers.get("Content-Range")
    is_placed = reply.status == 206 and placed is not None
    if is_placed and not re.fullmatch(rf"bytes {start}-\d+/(\*|{file.size})", placed or ""):
        asked = f"the bytes from {start} on of {file.size}"
        raise _Passing(f"asked for {asked}, the server sends {placed!r}", wrong=True)
    if length is not None and length.isdecimal() and int(length) != stop - start:
        kind = reply.headers.get("Content-Type", "content of no type")
        raise _Passing(
            f"the server sends {int(length):,} bytes ({kind}) where {stop - start:,} were announced",
            wrong=True,
        )


def _check(file: RemoteFile, part: Path) -> None:
    """Compare with the announced hash; what differs is removed, since nobody knows where it went wrong."""
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(b"blob %d\0" % file.size)
    with open(part, "rb") as content:
        while block := content.read(BLOCK_BYTES):
            digest.update(block)
    if digest.hexdigest() != file.digest:
        part.unlink()
        raise _Passing(
            f"what came has the {digest.name} {digest.hexdigest()}, announced was {file.digest}", wrong=True
        )


def _retry_after(text: str | None) -> float:
    """Seconds that the header Retry-After asks for; 0 where it says nothing."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0
