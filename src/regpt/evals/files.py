"""The rows of a task: from a file or folder that the user names, or downloaded once and checked."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

from regpt.data.documents import parquet_rows
from regpt.data.download import Client, Unreachable, offline
from regpt.data.sources import PACKINGS, SourceFile, read_block, unpacked
from regpt.errors import DataError
from regpt.tokenizers.download import cache_folder
from regpt.tokenizers.files import require_sha256, write_file

ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
SHA256 = ".sha256"
ATTEMPTS = 3  # of a download: it is small, and a run of hours may wait for it


@dataclass(frozen=True, kw_only=True)
class Remote:
    """Where a file is published."""

    url: str
    name: str
    """What it is kept as."""
    sha256: str | None = None
    """Hex, of the file or of the member. None: its publisher names none; the first download's is kept beside it."""
    member: str | None = None
    """The file inside a zip archive."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """How the file of one task is called, and where it is published."""

    task: str
    names: tuple[str, ...]
    """In a folder, the first that is there; each also packed."""
    remote: tuple[Remote, ...]
    """What is downloaded where no data is named; the first has the rows."""


def find(files: Files, data: Path | None) -> Path:
    """The file with the rows of a task.

    Args:
        data: the file itself, or a folder that holds it under one of its names; None: it is downloaded into regpt's cache.

    Raises:
        DataError: it is not there, or cannot be downloaded.
    """
    if data is None:
        first, *_ = (download(remote, files.task) for remote in files.remote)
        return first
    if data.is_dir():
        for folder, name, packing in itertools.product(
            (data, data / files.task), files.names, ("", *PACKINGS)
        ):
            if (found := folder / (name + packing)).is_file():
                return found
        raise DataError(
            f"{data} holds no file for the task {files.task}.",
            expected=f"{' or '.join(files.names)}, plain or as {', '.join(PACKINGS)}",
            hint=f"--data FILE, or without --data: it is downloaded from {files.remote[0].url}",
        )
    if not data.exists():
        raise DataError(f"there is no file or folder {data} with the rows of {files.task}.")
    return data


def download(remote: Remote, task: str) -> Path:
    """The file as it is kept in regpt's cache, downloaded where it is not, and compared with its sha256.

    Raises:
        Unreachable: no network, or no such file.
        DataError: another content than the known one.
    """
    keep = cache_folder() / "tasks" / task / remote.name
    known = keep.with_name(keep.name + SHA256)
    expected = remote.sha256 or (known.read_text().strip() if known.exists() else None)
    hint = f"put it at {keep}, or name a file of your own: --data FILE"
    if keep.exists():
        if expected is not None:
            require_sha256(keep.read_bytes(), expected, keep, f"delete {keep}")
        return keep

    if offline():
        raise Unreachable(f"{remote.url} is not on this machine, and HF_HUB_OFFLINE is set.", hint=hint)

    def refused(url: str, status: int, headers: Message) -> DataError:
        return Unreachable(f"{url} answers with status {status}.", hint=hint)

    content, _ = Client(refused=refused, by_hand=hint, attempts=ATTEMPTS).get(remote.url)
    if remote.member is not None:
        try:
            content = zipfile.ZipFile(io.BytesIO(content)).read(remote.member)
        except (zipfile.BadZipFile, KeyError, zlib.error) as e:
            raise DataError(f"{remote.url} is no zip archive with {remote.member}: {e}.", hint=hint) from None
    if expected is not None:
        require_sha256(content, expected, remote.url, hint)
    write_file(keep, content)
    if remote.sha256 is None:
        write_file(known, hashlib.sha256(content).hexdigest().encode() + b"\n")
    return keep


def holds_rows(path: Path) -> bool:
    """Whether its name says that it has rows with fields, and not plain text."""
    return (path.with_suffix("") if path.suffix in PACKINGS else path).suffix in ROWS


def read_text(path: Path) -> str:
    """A UTF-8 file, unpacked. Raises DataError where it cannot be read, is damaged, empty, or no UTF-8."""
    try:
        with unpacked(SourceFile.of(path, path.name)) as (stream, _):
            text = b"".join(iter(lambda: read_block(stream, path), b"")).decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(f"{path} is not UTF-8 text: {e}.") from None
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}.") from None
    except zlib.error as e:
        raise DataError(f"{path} is damaged: {e}.") from None
    if not text.strip():
        expected = "a row on every line" if holds_rows(path) else "text"
        raise DataError(f"{path} is empty.", expected=expected)
    return text


@dataclass(frozen=True)
class Row:
    """One row of a task file, whose fields are asked for by name."""

    path: Path
    place: str
    """Where in it, as a person counts: line 1, or, where there are no lines, row 1."""
    values: Mapping[str, Any]

    def get(self, name: str, kind: type) -> Any:
        """A field. Raises DataError, naming row and field, where it is missing or of another kind."""
        value = self.values.get(name)
        if name not in self.values:
            raise DataError(
                f"{self} has no field {name!r}.", got=", ".join(map(str, self.values)) or "nothing"
            )
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(name, kind.__name__)
        if isinstance(value, str) and not _is_unicode(value):
            raise self.wrong(name, "Unicode: half of a surrogate pair is no character")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A field that is a list of texts, none of them empty. Raises DataError where it is not."""
        value = self.get(name, list)
        if not value or not all(isinstance(v, str) and v and _is_unicode(v) for v in value):
            raise self.wrong(name, "a list of texts, none of them empty")
        return tuple(value)

    def index(self, name: str, below: int) -> int:
        """A field that is a number from 0, or one written as text. Raises DataError where it is not below `below`."""
        value = self.values.get(name)
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
        if name not in self.values:
            self.get(name, int)
        if not (text.isascii() and text.isdecimal() and int(text) < below):
            raise self.wrong(name, f"the number of the right choice, 0 to {below - 1}")
        return int(text)

    def wrong(self, name: str, expected: str) -> DataError:
        """The error for a field that is not what it must be."""
        shown = repr(self.values.get(name))
        return DataError(
            f"{self}: the field {name!r} cannot be used.",
            got=shown if len(shown) < 80 else shown[:80] + "…",
            expected=expected,
        )

    def __str__(self) -> str:
        return f"{self.path}, {self.place}"


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_rows(path: Path, limit: int | None) -> Sequence[Row]:
    """The first `limit` rows of a file of JSON lines, or of parquet; None: all of them.

    Raises:
        DataError: the file is missing, empty or damaged, or a line is no JSON object.
    """
    if path.suffix == ".parquet":
        values = list(itertools.islice(parquet_rows(path), limit))
        if not values:
            raise DataError(f"{path} is empty.", expected="at least one row")
        return [Row(path, f"row {number}", value) for number, value in enumerate(values, 1)]
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: a text may hold U+2028
        if limit is not None and len(rows) == limit:
            break
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            said = "it is nested too deeply" if isinstance(e, RecursionError) else e
            raise DataError(f"{path}, line {number} is not JSON: {said}.") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}, line {number} is no JSON object.", got=line[:80])
        rows.append(Row(path, f"line {number}", value))
    return rows
