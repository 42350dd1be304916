"""A part of a file as documents, a document as pieces of text: one of any length passes in constant memory.

Pieces are cut where no token can reach across, so that the ids of the pieces, one after another, are those of the
whole. Why `CUT` is safe: byte-level BPE merges only inside the stretches that a split pattern finds. No stretch of
GPT-2's pattern, nor of cl100k's and o200k's, holds a letter or digit followed by white space or by punctuation other
than an apostrophe, a letter followed by a digit, or anything but white space followed by a space; and none of these
patterns looks behind, nor looks ahead past a character that is not white space.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import importlib.util
import json
import mmap
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from regpt.data.ranged import RangedFile
from regpt.errors import DataError, missing_package
from regpt.tokenizers import END_OF_TEXT

Form = Literal["text", "jsonl", "parquet"]
Fragment = Literal["middle", "last"]
Document = Callable[[], Iterable[str]]
"""Gives the document's text in pieces, anew at each call. Raises UnicodeError where it is not valid UTF-8."""

DELIMITERS: dict[Form, bytes] = {"text": END_OF_TEXT.encode(), "jsonl": b"\n"}
PIECE_BYTES = 1 << 20
# A longer JSON line is not parsed whole: as Python objects it may take five times its size.
LONG_LINE_BYTES = 8 << 20
HEAD_BYTES = 8192  # a NUL in the first so many bytes marks a binary file, as git and grep have it

_STOPS = r"\n.,;:!?()\[\]{}<>=+/\"，。、"
CUT = re.compile(rf"\S(?= )|[0-9A-Za-zぁ-ゖァ-ヺ一-龥가-힣](?=[{_STOPS}])|[A-Za-z](?=[0-9])")
_BYTES_CUT = re.compile(rb"[0-9A-Za-z.,;:!?)\"'](?= )|[0-9A-Za-z](?=\n)")


@dataclass(frozen=True)
class Part:
    """A unit of work: a range of one file, read by one process. Plain values: it travels as JSON."""

    path: str
    label: str
    """The file that the user knows; differs from `path` where that is a piece of a packed one."""
    form: Form
    start: int
    """A byte; of parquet a row group. The part's documents are those that begin in [start, end)."""
    end: int
    stored_bytes: int
    """How much of the source's files this part stands for."""
    text_field: str = "text"
    fragment: Fragment | None = None
    """Not whole documents, but a stretch of one, or its end."""
    offset: int = 0
    """Unpacked bytes of the file before `path` begins, and lines."""
    line: int = 0
    temporary: bool = False
    """Made for this part alone; to be deleted after it."""
    file: int = 0
    """Which of the source's files."""
    min_chars: int = 0
    """Documents with fewer characters are left out; fragments never are."""

    def delete_if_temporary(self) -> None:
        """What whoever is done with a part calls."""
        if self.temporary:
            os.unlink(self.path)


def documents(part: Part, skipped: Counter[str], ranged: RangedFile | None = None) -> Iterator[Document]:
    """The documents of a part, in order. Valid only until the next one is asked for.

    Args:
        skipped: what is left out is counted here by reason.
        ranged: the file, where it is not at `part.path` but to be read from its server.

    Raises:
        DataError: a line that is not JSON, a missing field; naming file and line.
    """
    if part.min_chars and not part.fragment:
        for document in documents(dataclasses.replace(part, min_chars=0), skipped, ranged):
            if _has_chars(document, part.min_chars):
                yield document
            else:
                skipped[f"shorter than {part.min_chars} characters"] += 1
    elif part.form == "parquet":
        yield from _parquet(part, skipped, ranged or Path(part.path))
    elif ranged:
        if part.form == "text" and b"\0" in ranged.head(HEAD_BYTES):
            skipped["binary"] += part.start == 0
            return
        yield from (_json_lines if part.form == "jsonl" else _texts)(*_fetched(part, ranged), skipped)
    elif not Path(part.path).stat().st_size:
        skipped["empty"] += part.offset == 0
    else:
        with open(part.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from (_json_lines if part.form == "jsonl" else _texts)(data, part, skipped)


def _fetched(part: Part, ranged: RangedFile) -> tuple[bytes, Part]:
    """What of its file a part's documents need, and the part as one of that: up to where the last of them ends."""
    delimiter = DELIMITERS[part.form]
    width = len(delimiter)
    begin = max(part.start - width, 0)
    data = bytearray(ranged.between(begin, part.end))
    last = data.rfind(delimiter)
    if last >= 0 or part.start == 0:  # else no document begins here
        record = last + width if last >= 0 else 0
        searched = record
        while record < part.end - begin and data.find(delimiter, searched) < 0:
            more = ranged.between(begin + len(data), begin + len(data) + PIECE_BYTES)
            if not more:
                break
            searched = max(len(data) - width + 1, record)
            data += more
    label = f"{part.label} (from byte {begin:,} on)" if begin else part.label
    moved = dataclasses.replace(
        part, label=label, start=part.start - begin, end=part.end - begin, offset=begin
    )
    return bytes(data), moved


def _has_chars(document: Document, n: int) -> bool:
    """Whether there are as many; yes for what is no text at all, which is noticed where it is read."""
    with contextlib.suppress(UnicodeError):
        for piece in document():
            n -= len(piece)
            if n <= 0:
                return True
        return False
    return True


# --- text ---------------------------------------------------------------------------------------------------


def _texts(data: mmap.mmap | bytes, part: Part, skipped: Counter[str]) -> Iterator[Document]:
    if part.offset == 0 and b"\0" in data[:HEAD_BYTES]:  # the head of the file, not of a later piece of it
        skipped["binary"] += part.start == 0
        return
    if part.fragment:
        yield partial(_decoded, data, part.start, part.end)
        return
    for begin, stop in records(data, part):
        # A line end next to a separator belongs to the separator: it stands on a line of its own.
        if begin + part.offset > 0:
            begin += {b"\r\n": 2, b"\n": 1}.get(data[begin : begin + 2], data[begin : begin + 1] == b"\n")
        last = stop == len(data)
        if not last and begin < stop and data[stop - 1] == 10:
            stop -= 2 if stop - begin > 1 and data[stop - 2] == 13 else 1
        if begin < stop:
            yield partial(_decoded, data, begin, stop)
        elif not last:
            skipped["empty"] += 1


def records(data: mmap.mmap | bytes, part: Part) -> Iterator[tuple[int, int]]:
    """[begin, stop) of what stands between delimiters and begins in the part."""
    delimiter = DELIMITERS[part.form]
    begin, width = 0, len(delimiter)
    if part.start:
        found = data.find(delimiter, max(part.start - width, 0), part.end)
        begin = found + width if found >= 0 else part.end
    while begin < part.end:
        found = data.find(delimiter, begin)
        stop = found if found >= 0 else len(data)
        yield begin, stop
        begin = stop + width


def _decoded(data: mmap.mmap | bytes | memoryview, begin: int, stop: int) -> Iterator[str]:
    if stop - begin <= PIECE_BYTES:
        return iter((bytes(data[begin:stop]).decode(),))
    return cut_safely(_decode_blocks(data, begin, stop))


def _decode_blocks(data: mmap.mmap | bytes | memoryview, begin: int, stop: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(begin, stop, PIECE_BYTES):
        yield decoder.decode(bytes(data[at : min(at + PIECE_BYTES, stop)]), at + PIECE_BYTES >= stop)


def cut_safely(blocks: Iterable[str]) -> Iterator[str]:
    """The same text in other pieces: cut only at `CUT`, however far the next one is."""
    held = ""
    for block in blocks:
        searched = max(len(held) - 1, 0)
        held += block
        cut = _last_cut(held, searched)
        if cut:
            yield held[:cut]
            held = held[cut:]
    if held:
        yield held


def _last_cut(text: str, start: int) -> int:
    """The last place from `start` on where `text` may be cut, or 0."""
    width = 1024
    while True:
        begin = max(start, len(text) - width)
        *_, last = 0, *(m.end() for m in CUT.finditer(text, begin))
        if last or begin == start:
            return last
        width *= 32


def cut_near(data: mmap.mmap, at: int, stop: int) -> int:
    """The first byte from `at` on where UTF-8 text may be cut, or `stop`."""
    found = _BYTES_CUT.search(data, at, stop) if at < stop else None
    return found.end() if found else stop


@dataclass(frozen=True)
class TextScan:
    """What one pass over a text file finds."""

    chars: int
    separated: bool
    """It holds `<|endoftext|>`."""
    is_text: bool
    """Neither binary nor blank."""
    invalid_at: int | None
    """The first byte that is not UTF-8."""
    block_chars: tuple[int, ...]
    """Characters that begin in each block of `PIECE_BYTES`."""

    @classmethod
    def of(cls, blocks: Iterable[bytes]) -> TextScan:
        """Of a file in blocks of PIECE_BYTES, the last one shorter."""
        decoder, counts = codecs.getincrementaldecoder("utf-8")(), []
        edge, read, separated, binary, blank, invalid_at = b"", 0, False, False, True, None
        for block in blocks:
            binary = binary or (not read and b"\0" in block[:HEAD_BYTES])
            blank = blank and block.isspace()
            separated = separated or DELIMITERS["text"] in edge + block
            edge = block[-len(DELIMITERS["text"]) :]
            if invalid_at is None:
                pending = len(decoder.getstate()[0])
                try:
                    decoder.decode(block)
                except UnicodeDecodeError as e:
                    invalid_at = read - pending + e.start
            counts.append(len(block) - int(np.count_nonzero(_continues(block))))
            read += len(block)
        if invalid_at is None and decoder.getstate()[0]:
            invalid_at = read - len(decoder.getstate()[0])
        return cls(sum(counts), separated, not binary and not blank, invalid_at, tuple(counts))

    def byte_offset(self, data: mmap.mmap, char: int) -> int:
        """Where character number `char` begins; the end of the text for one past the last."""
        for number, count in enumerate(self.block_chars):
            if char < count:
                block = data[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
                return number * PIECE_BYTES + int(np.flatnonzero(~_continues(block))[char])
            char -= count
        return len(data)


def _continues(block: bytes) -> NDArray[np.bool_]:
    """Which bytes continue a UTF-8 character."""
    continues: NDArray[np.bool_] = (np.frombuffer(block, np.uint8) & 0xC0) == 0x80
    return continues


# --- JSON lines ---------------------------------------------------------------------------------------------

_BLANK = re.compile(rb"[ \t\r\n]*+")
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_SCALAR = re.compile(rb'[^\s,"{}\[\]]++')
_NESTING = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+([{}\[\]])', re.DOTALL)
# Whole escapes, and a surrogate pair in one; at most 2048 x 512 bytes.
_UNITS = re.compile(
    rb"(?:[^\\]{1,512}+|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u....|\\[^u]){1,2048}+", re.DOTALL
)


def _json_lines(data: mmap.mmap | bytes, part: Part, skipped: Counter[str]) -> Iterator[Document]:
    # Lines end at b"\n" alone: U+0085 and U+2028, where str.splitlines cuts, may stand inside a JSON string.
    for begin, stop in records(data, part):
        if stop - begin > LONG_LINE_BYTES and (span := _text_span(data, begin, stop, part.text_field)):
            yield partial(_unescaped, data, *span, partial(_where, data, part, begin))
            continue
        line = data[begin:stop].strip(b" \t\r")
        if not line:
            continue
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            skipped["invalid UTF-8"] += 1
            continue
        except (ValueError, RecursionError) as e:
            said = f"{e.msg} at character {e.pos + 1}" if isinstance(e, json.JSONDecodeError) else str(e)
            raise DataError(f"{_where(data, part, begin)} is not valid JSON: {said}") from None
        text = _field(value, part.text_field, partial(_where, data, part, begin))
        if text is None:
            skipped["empty"] += 1
        else:
            yield partial(_blocks, text)


def _where(data: mmap.mmap | bytes, part: Part, begin: int) -> str:
    """file:line of a record; counted only when something is wrong with it."""
    line = 1 + part.line
    for at in range(0, begin, PIECE_BYTES):
        line += data[at : min(at + PIECE_BYTES, begin)].count(b"\n")
    return f"{part.label}:{line}"


def _field(value: object, name: str, where: Callable[[], str]) -> str | None:
    if not isinstance(value, dict):
        raise DataError(f"{where()}: each line must be a JSON object.", got=type(value).__name__)
    if name not in value:
        raise _missing_field(where(), name, value)
    text = value[name]
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where()}: the field {name!r} is not text.", got=type(text).__name__)
    return text


def _missing_field(where: str, name: str, present: Iterable[str]) -> DataError:
    return DataError(
        f"{where} has no field {name!r}.",
        got=f"the fields {', '.join(sorted(present)) or '(none)'}",
        hint="name the field that holds the text: --text-field NAME (regpt train: --data.text-field)",
    )


def _blocks(text: str) -> Iterator[str]:
    if len(text) <= PIECE_BYTES:
        return iter((text,))
    return cut_safely(text[at : at + PIECE_BYTES] for at in range(0, len(text), PIECE_BYTES))


def _text_span(data: mmap.mmap | bytes, begin: int, stop: int, name: str) -> tuple[int, int] | None:
    """Where the string called `name` stands in the JSON object in [begin, stop); None where it is not found."""
    try:
        at = _skip(_BLANK, data, begin, stop)
        closing = b"{"
        while data[at : at + 1] == closing:
            at = key = _skip(_BLANK, data, at + 1, stop)
            at = _skip(_STRING, data, at, stop)
            is_wanted = json.loads(data[key:at]) == name
            at = _skip(_BLANK, data, at, stop)
            if data[at : at + 1] != b":":
                return None
            at = value = _skip(_BLANK, data, at + 1, stop)
            first = data[at : at + 1]
            if first == b'"':
                at = _skip(_STRING, data, at, stop)
            elif first in (b"{", b"["):
                at = _skip_nested(data, at, stop)
            else:
                at = _skip(_SCALAR, data, at, stop)
            if is_wanted:
                return (value + 1, at - 1) if first == b'"' else None
            at, closing = _skip(_BLANK, data, at, stop), b","
    except ValueError:
        pass  # the whole line is parsed then, and says better what is wrong
    return None


def _skip(pattern: re.Pattern[bytes], data: mmap.mmap | bytes, at: int, stop: int) -> int:
    found = pattern.match(data, at, stop)
    if found is None:
        raise ValueError("not JSON")
    return found.end()


def _skip_nested(data: mmap.mmap | bytes, at: int, stop: int) -> int:
    depth = 0
    while True:
        at = _skip(_NESTING, data, at, stop)
        depth += 1 if data[at - 1 : at] in (b"{", b"[") else -1
        if depth == 0:
            return at


def _unescaped(data: mmap.mmap | bytes, begin: int, stop: int, where: Callable[[], str]) -> Iterator[str]:
    """The text of a JSON string from behind its opening quote up to its closing one."""

    def blocks() -> Iterator[str]:
        decoder, at = codecs.getincrementaldecoder("utf-8")(), begin
        while at < stop:
            found = _UNITS.match(data, at, stop)
            at = found.end() if found else stop
            try:
                yield json.loads(f'"{decoder.decode(found[0], at == stop) if found else chr(0)}"')
            except json.JSONDecodeError as e:
                raise DataError(
                    f"{where()} is not valid JSON: {e.msg} before byte {at} of the file"
                ) from None

    return cut_safely(blocks())


# --- parquet ------------------------------------------------------------------------------------------------


def require_parquet() -> None:
    """Raises DeviceError where nothing is installed that reads parquet: said before a corpus is downloaded in vain."""
    if importlib.util.find_spec("pyarrow") is None:
        raise missing_package("pyarrow", "data", "reading parquet files")


@contextlib.contextmanager
def _parquet_file(stored: Path | RangedFile) -> Iterator[Any]:
    require_parquet()
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(stored, pre_buffer=False, page_checksum_verification=True) as file:
            yield file
    except arrow.ArrowException as e:
        raise DataError(f"{stored} is damaged or not parquet: {e}") from None


def row_groups(stored: Path | RangedFile, text_field: str) -> int:
    """Number of row groups of a parquet file that has the field, as text.

    Raises:
        DataError: it has no such field, or the field holds something else.
    """
    with _parquet_file(stored) as file:
        schema = file.schema_arrow
        if text_field not in schema.names:
            raise _missing_field(str(stored), text_field, schema.names)
        kind = str(schema.field(text_field).type)
        if kind not in ("string", "large_string", "binary", "large_binary"):
            raise DataError(f"{stored}: the field {text_field!r} is not text.", got=kind)
        return int(file.num_row_groups)


def text_rows(stored: Path | RangedFile, text_field: str) -> Iterator[tuple[float, str | None]]:
    """Every row of a parquet file, with the share of the file's rows that end there."""
    with _parquet_file(stored) as file:
        done, total = 0, max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(1024, columns=[text_field], use_threads=False):
            for value in batch.column(0):
                done += 1
                raw = bytes(value.as_buffer()) if value.is_valid else None
                yield done / total, None if raw is None else raw.decode("utf-8", "replace")


def parquet_rows(stored: Path) -> Iterator[dict[str, Any]]:
    """Every row of a parquet file with all its fields. Raises DataError where it is damaged."""
    with _parquet_file(stored) as file:
        for batch in file.iter_batches(1024, use_threads=False):
            yield from batch.to_pylist()


def _parquet(part: Part, skipped: Counter[str], stored: Path | RangedFile) -> Iterator[Document]:
    with _parquet_file(stored) as file:
        groups = range(part.start, part.end)
        for batch in file.iter_batches(64, row_groups=groups, columns=[part.text_field], use_threads=False):
            for value in batch.column(0):
                if not value.is_valid or not len(buffer := memoryview(value.as_buffer())):
                    skipped["empty"] += 1
                else:
                    yield partial(_decoded, buffer, 0, len(buffer))
