"""A report that is alive: served on this machine only, read anew when a run's log has grown.

Only a browser that asks for this very address by name of the loopback is answered: a page of another site whose name was
pointed at 127.0.0.1 (DNS rebinding) is not.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from regpt.errors import RegptError, UsageError
from regpt.report.history import read_histories
from regpt.report.page import SERVED, page, update

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")
WATCHED = ("run.json", "log.jsonl", "samples.jsonl")
IDLE_S = 30  # a connection that says nothing for so long is closed: each holds a thread


class Server(ThreadingHTTPServer):
    """Serves the report of some runs until it is shut down."""

    daemon_threads = True
    # Started again at once, it gets its port back; on Windows this would let two servers share one.
    allow_reuse_address = os.name != "nt"

    def __init__(self, runs: Sequence[Path], port: int, *, price: float | None = None) -> None:
        """Open the port; 0 takes one that is free.

        Raises:
            UsageError: the port is taken or not allowed.
        """
        self.runs, self.price = list(runs), price
        self._lock, self._made = threading.Lock(), dict[str, tuple[str, bytes]]()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as e:
            reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            raise UsageError(
                f"port {port} on {HOST} cannot be used: {reason}.", hint="--port 0 takes any that is free"
            ) from None

    @property
    def url(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_port}/"

    def answer(self, name: str) -> tuple[str, bytes]:
        """The page or its data, with a tag that changes when it does; made anew only when a file has changed."""
        tag = self._tag()
        with self._lock:
            made = self._made.get(name)
            if made is None or made[0] != tag:
                histories = read_histories(self.runs, may_be_empty=True)
                make: Callable[[], str] = (
                    (lambda: page(histories, price=self.price, live=True))
                    if name == "page"
                    else (lambda: update(histories, price=self.price))
                )
                made = self._made[name] = tag, make().encode()
        return made

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A tab that was closed before its answer came is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def _tag(self) -> str:
        """Of the files' sizes and times: what they are when none of them has changed."""
        seen = []
        for path in (run / name for run in self.runs for name in WATCHED):
            try:
                stat = path.stat()
                seen.append((str(path), stat.st_size, stat.st_mtime_ns))
            except OSError:
                seen.append((str(path), -1, 0))
        return f'"{hashlib.blake2b(repr(seen).encode(), digest_size=8).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "regpt", ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        names = {f"{name}:{self.server.server_port}" for name in NAMES}
        if self.headers.get("Host") not in names:
            self._send(421, "text/plain", b"This report is served to this machine only.\n")
            return
        pages = {"/": ("page", "text/html"), "/data.json": ("data", "application/json")}
        name, kind = pages.get(self.path.partition("?")[0], ("", ""))
        if not name:
            self._send(404, "text/plain", b"There is one page here: /\n")
            return
        try:
            tag, body = self.server.answer(name)
        except RegptError as e:
            self._send(503, "text/plain", f"{e}\n".encode())
            return
        if self.headers.get("If-None-Match") == tag:
            self._send(304, kind, b"", tag)
        else:
            self._send(200, kind, body, tag)

    def _send(self, status: int, kind: str, body: bytes, tag: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", f"{SERVED}; frame-ancestors 'none'")
        if tag:
            self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal is the person's."""
