"""Files as tokenizers keep them: written whole or not at all, read with every damage named."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from regpt.errors import DataError


def damaged(path: Path, why: str, *, got: object = None, expected: object = None) -> DataError:
    """The error for a tokenizer file that cannot be what was saved."""
    hint = "save or train the tokenizer again"
    return DataError(f"{path} is damaged: {why}.", got=got, expected=expected, hint=hint)


def read_file(path: Path, hint: str | None = None) -> bytes:
    """A whole file. Raises DataError naming it."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror or e}.", hint=hint) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises DataError naming it if it is missing, cut short or something else."""
    try:
        value = json.loads(read_file(path))
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, thousands of digits, endless nesting
        raise damaged(path, f"it is not JSON ({e})") from None
    if not isinstance(value, dict):
        raise damaged(path, "it must hold a JSON object", got=type(value).__name__)
    return value


def write_file(path: Path, content: bytes) -> None:
    """Write through a temporary neighbour and a rename: readers see the old file or the new, never a part.

    Makes the folder. Several processes may write at once. Raises DataError where the disk says no.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as e:
        raise DataError(f"cannot write {path}: {e.strerror or e}.") from None


def require_sha256(content: bytes, sha256: str, name: object, hint: str) -> None:
    """Raises DataError with both hashes unless `content`, which came from `name`, hashes to `sha256`."""
    got = hashlib.sha256(content).hexdigest()
    if got != sha256:
        sizes = f"sha256 {got} ({len(content):,} bytes)"
        raise DataError(
            f"{name} is not the published file.", got=sizes, expected=f"sha256 {sha256}", hint=hint
        )
