"""A server on loopback that speaks the hub's file API over repositories in memory, and fails when it is told to.

As the hub does: a revision is a branch or a commit; large files are listed with `lfs` (sha256), small ones by git's
sha1; `resolve` sends for large files to another host (`localhost/cdn/…`); ranges are honoured.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import io
import json
import os
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

LFS = (".parquet", ".txt", ".gz", ".zst", ".jsonl")


def parquet(texts: list[str | None], *, column: str = "text", rows_in_group: int = 50) -> bytes:
    """A parquet file of one text column and another one."""
    out = io.BytesIO()
    table = pa.table({column: pa.array(texts, pa.string()), "id": list(range(len(texts)))})
    pq.write_table(table, out, row_group_size=rows_in_group)
    return out.getvalue()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Fault:
    """What one answer does instead of the right thing."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    """The connection ends after so many bytes of the body."""
    reset: int | None = None
    """The same, but the connection is reset."""
    body: Callable[[bytes], bytes] | None = None
    """Another content, its length announced as it is."""
    ignore_range: bool = False


@dataclass
class Served:
    """One answer, for the record."""

    method: str
    path: str
    status: int
    first: int
    sent: int
    authorization: str | None


class HubServer:
    """Repositories by name, each with branches of commits of files."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self.refs: dict[tuple[str, str], str] = {}
        self.gated: set[str] = set()
        self.faults: list[tuple[re.Pattern[str], deque[Fault]]] = []
        self.served: list[Served] = []
        self.page = 1000
        self.links_to = url
        self.lock = threading.Lock()

    def commit(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A commit of these files at the end of a branch."""
        content = json.dumps({p: git_sha1(c) for p, c in sorted(files.items())}) + repo + branch
        name = hashlib.sha1(content.encode()).hexdigest()
        self.commits[repo, name] = files
        self.refs[repo, branch] = name
        return name

    def fail(self, pattern: str, *faults: Fault) -> None:
        """The next answers to paths that match `pattern` are these."""
        self.faults.append((re.compile(pattern), deque(faults)))

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            for pattern, faults in self.faults:
                if faults and pattern.search(path):
                    return faults.popleft()
        return None

    def bytes_of(self, pattern: str) -> int:
        """Bytes sent for paths that match."""
        return sum(s.sent for s in self.served if s.method == "GET" and re.search(pattern, s.path))

    def asked(self, pattern: str) -> list[Served]:
        """Answers to paths that match."""
        return [s for s in self.served if re.search(pattern, s.path)]


@contextmanager
def hub_server() -> Iterator[HubServer]:
    """The server, running."""

    class Handler(_Handler):
        hub: HubServer

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Handler.hub = HubServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield Handler.hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.hub.next_fault(path)
        if fault is not None and fault.status >= 300:
            self._send(b"an error", fault.status, fault.headers)
            return
        if path.startswith("/cdn/"):
            _, _, repo, commit, name = path.split("/", 4)
            self._file(self.hub.commits[repo.replace("--", "/"), commit][name], fault, {})
        elif found := re.fullmatch(r"/api/datasets/(.+?)(?:/(revision|tree|paths-info)/(.+))?", path):
            self._api(found[1], found[2], found[3])
        elif found := re.fullmatch(r"/datasets/(.+?)/resolve/(refs/[^/]+/[^/]+|[^/]+)/(.+)", path):
            self._resolve(*found.groups(), fault)
        else:
            self._send(b"no such page", 404, {})

    def _commit(self, repo: str, revision: str | None) -> str | None:
        """The commit, or None after an error was sent."""
        if not any(name == repo for name, _ in self.hub.commits):
            self._send(b"", 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return None
        revision = revision or "main"
        commit = self.hub.refs.get((repo, revision), revision)
        if (repo, commit) not in self.hub.commits:
            said = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self._send(b"", 404, said)
            return None
        return commit

    def _api(self, repo: str, what: str | None, rest: str | None) -> None:
        revision, folder = rest, ""
        if what == "tree" and rest and not rest.startswith("refs/"):
            revision, _, folder = rest.partition("/")
        commit = self._commit(repo, revision)
        if commit is None:
            return
        files = self.hub.commits[repo, commit]
        listed = [_listed(p, c) for p, c in sorted(files.items())]
        query = parse_qs(urlsplit(self.path).query)
        if what == "tree":
            inside = f"{folder}/" if folder else ""
            recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            under = [f for f in [*_folders(files), *listed] if f["path"].startswith(inside)]
            under = [f for f in under if recursive or "/" not in f["path"][len(inside) :]]
            begin = int(query.get("cursor", ["0"])[0])
            headers = {}
            if begin + self.hub.page < len(under):
                link = (
                    f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={begin + self.hub.page}"
                )
                headers["Link"] = f'<{link}>; rel="next"'
            if not under:
                self._send(b"", 404, {"X-Error-Code": "EntryNotFound"})
                return
            self._json(under[begin : begin + self.hub.page], headers)
        elif what == "paths-info":
            posted = parse_qs(self.posted.decode()) if self.posted[:1] != b"{" else json.loads(self.posted)
            wanted = posted.get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            self._json([f for f in [*_folders(files), *listed] if f["path"] in wanted], {})
        else:
            facts = {"id": repo, "sha": commit, "private": False, "gated": False, "disabled": False}
            facts |= {"tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
            self._json(facts | {"siblings": [{"rfilename": p} for p in files]}, {})

    def _resolve(self, repo: str, revision: str, name: str, fault: Fault | None) -> None:
        commit = self._commit(repo, revision)
        if commit is None:
            return
        if repo in self.hub.gated and self.headers.get("Authorization") != "Bearer right":
            self._send(
                b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {repo} is restricted."}
            )
            return
        files = self.hub.commits[repo, commit]
        if name not in files:
            self._send(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{git_sha1(content)}"'}
        if name.endswith(LFS):
            sha256 = hashlib.sha256(content).hexdigest()
            headers |= {
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(len(content)),
                "ETag": f'"{sha256}"',
            }
            headers["Location"] = (
                f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{repo.replace('/', '--')}/{commit}/{name}"
            )
            self._send(b"", 302, headers)
        else:
            self._file(content, fault, headers)

    def _file(self, content: bytes, fault: Fault | None, headers: dict[str, str]) -> None:
        fault = fault or Fault()
        if fault.body:
            content = fault.body(content)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        first, status, stop = 0, 200, len(content)
        headers = (
            {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers | fault.headers
        )
        if wanted and not fault.ignore_range:
            first, status = int(wanted[1]), 206
            stop = min(int(wanted[2]) + 1, stop) if wanted[2] else stop
            if first >= len(content):
                self._send(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(content)}"
        ends = fault.cut if fault.reset is None else fault.reset
        self._send(content[first:stop], status, headers, first=first, ends=ends)
        if fault.reset is not None:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    def _json(self, value: Any, headers: dict[str, str]) -> None:
        self._send(json.dumps(value).encode(), 200, {"Content-Type": "application/json"} | headers)

    def _send(
        self, body: bytes, status: int, headers: dict[str, str], *, first: int = 0, ends: int | None = None
    ) -> None:
        sent = b"" if self.command == "HEAD" else body[:ends]
        self.hub.served.append(
            Served(
                self.command, unquote(self.path), status, first, len(sent), self.headers.get("Authorization")
            )
        )
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # whoever saw at the headers that this is wrong has left
            self.wfile.write(sent)
        if ends is not None:
            self.wfile.flush()
            self.close_connection = True


def _listed(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
    if path.endswith(LFS):
        sha256 = hashlib.sha256(content).hexdigest()
        entry |= {
            "oid": git_sha1(b"pointer"),
            "lfs": {"oid": sha256, "size": len(content), "pointerSize": 130},
        }
    return entry


def _folders(files: dict[str, bytes]) -> list[dict[str, Any]]:
    names = {"/".join(p.split("/")[:n]) for p in files for n in range(1, p.count("/") + 1)}
    return [{"type": "directory", "path": n, "size": 0, "oid": "0" * 40} for n in sorted(names)]
