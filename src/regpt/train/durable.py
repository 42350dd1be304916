"""Files that survive a crash: written whole, hashed on the way, synced, and only then given their name; seals; locks."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import xxhash

SEAL = "xxh3_128"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # what network file systems without locks say
LOCK_BYTE = 1 << 30  # Windows lets nobody read a locked byte, so it lies far behind the text
CHUNK_BYTES = 4 << 20  # hashed and written while it is in the processor's cache


def json_bytes(document: Mapping[str, Any]) -> bytes:
    """`document` as the text of a file: sorted, so that equal documents are equal bytes. ValueError at NaN."""
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def sealed(document: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the hash of its content in it."""
    return {**document, SEAL: _seal(document)}


def unsealed(document: Mapping[str, Any], *, required: bool = True) -> dict[str, Any] | None:
    """What `sealed` was given; None where that is not what is there now.

    Args:
        required: False also takes a document that has no hash, of a version of regpt that wrote none.
    """
    inner = {key: value for key, value in document.items() if key != SEAL}
    if not required and SEAL not in document:
        return inner
    return inner if document.get(SEAL) == _seal(inner) else None


def _seal(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json_bytes(document))


def write_synced(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """A new file at `path` with these bytes, on the disk when this returns.

    Returns:
        Its size in bytes and its xxh3_128 in hex, of the bytes as they were in memory.
    """
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "xb", buffering=0) as file:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK_BYTES):
                chunk = memoryview(piece)[start : start + CHUNK_BYTES]
                digest.update(chunk)
                size += len(chunk)
                while chunk:  # a write may take less than it was given
                    chunk = chunk[os.write(file.fileno(), chunk) :]
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: what was renamed into it stays there after a power loss."""
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # network file systems that have no such thing
            raise
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents, durably; nothing where it exists."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one instant: a reader, or a crash, finds the old bytes or the new ones."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # of a process that was killed here
    try:
        write_synced(temporary, [data])
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def lock_file(file: IO[bytes]) -> bool | None:
    """Lock an open file until it is closed. False: somebody has it. None: there are no locks here."""
    try:
        import fcntl
    except ImportError:
        return _windows_lock(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return None if e.errno in NO_LOCKS else False
    return True


def _windows_lock(file: IO[bytes]) -> bool:
    import msvcrt

    file.seek(LOCK_BYTE)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError:
        return False
    return True
