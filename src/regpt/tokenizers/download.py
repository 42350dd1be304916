"""Small public files: downloaded once into regpt's cache folder, and taken only with the known sha256."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path

from regpt.errors import DataError
from regpt.paths import user_path
from regpt.tokenizers.files import require_sha256, write_file

TIMEOUT = 30
"""Seconds that a server may stay silent."""


def cache_folder() -> Path:
    """Where downloads are kept: REGPT_CACHE, else XDG_CACHE_HOME/regpt, else ~/.cache/regpt."""
    shared = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_path(os.environ.get("REGPT_CACHE") or f"{shared}/regpt")


def kept(path: Path, sha256: str) -> bytes | None:
    """The content of `path`, or None where it is missing or hashes to something else."""
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == sha256:
            return content
    return None


def fetch(url: str, *, sha256: str, keep: Path, hint: str) -> bytes:
    """The file at `url`, which then lies at `keep`, where it is looked for first. Safe for several processes.

    Raises DataError with `hint`: no network, no such file, a file cut short or with another hash, a full disk.
    """
    if (before := kept(keep, sha256)) is not None:
        return before
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as reply:
            content: bytes = reply.read()
    except (OSError, http.client.HTTPException, ValueError) as e:
        if isinstance(e, urllib.error.HTTPError):
            e.close()
        raise DataError(f"cannot download {url}: {e}.", hint=hint) from None
    require_sha256(content, sha256, url, hint)
    write_file(keep, content)
    return content
