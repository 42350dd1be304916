"""Token files of other programs, recognised by names and first bytes: which of them lie at a path, and which split each is."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from regpt.data.formats.base import Format
from regpt.data.formats.datatrove import Datatrove
from regpt.data.formats.llmc import LlmC
from regpt.data.formats.megatron import MAGIC, Megatron
from regpt.data.formats.npy import Npy
from regpt.data.formats.raw import NanoGPT
from regpt.data.shards import FIRST_SHARD, TOKENIZER
from regpt.errors import DataError
from regpt.paths import user_path

NANOGPT, LLMC, MEGATRON, DATATROVE, NPY = NanoGPT(), LlmC(), Megatron(), Datatrove(), Npy()
FORMATS: dict[str, Format] = {f.name: f for f in (NANOGPT, LLMC, MEGATRON, DATATROVE, NPY)}
VAL_WORDS = {"val", "valid", "validation"}
TEST_WORDS = {"test"}
COMPANIONS = (".ds.index", ".ds.metadata", ".ds.loss")
TEXT = re.compile(
    r"\.(txt|text|md|rst|tex|html?|jsonl|ndjson|parquet)(\.gz|\.xz|\.zst)?$", re.IGNORECASE
)  # not .json, .py or .csv: notes about tokens, not their text
ABOUT = re.compile(r"(readme|licen[cs]e)\b.*", re.IGNORECASE)
NANOGPTS_TEXT = "input.txt"  # lies beside the tokens that nanoGPT made of it


@dataclass(frozen=True)
class Found:
    """Files of one format at one place; nothing is read yet but a few bytes to tell the format."""

    path: Path
    format: Format
    files: tuple[Path, ...]
    """Sorted by name."""

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.files[0].parent

    def of_split(self, name: str) -> tuple[Path, ...]:
        """Files whose names say so: val, valid or validation; all others train. Those of a test set belong to neither."""
        if self.path == self.files[0]:
            return self.files if name == "train" else ()
        return tuple(f for f in self.files if split_of(f) == name)


def split_of(path: Path) -> str:
    """train, val or test, by the words of the file's name."""
    words = set(re.findall("[a-z]+", path.stem.lower()))
    if "train" in words:
        return "train"
    return "val" if words & VAL_WORDS else "test" if words & TEST_WORDS else "train"


def recognise(spec: str) -> Found | None:
    """The token files that `spec` names: a file, a folder that holds some, or a glob; None where there are none.

    A `.bin`, `.ds` or `.npy` named by itself, or by a glob that matches nothing else, is one. In a folder: `.ds` with its
    index or metadata; `.bin` with an `.idx` of Megatron's; `.bin` with llm.c's magic number; `train.bin`; `.npy` of whole
    numbers with train or val in the name; or any of these where nothing else lies in the folder.

    Raises:
        DataError: files of several formats lie in the folder, or text beside files that are ids by their names alone.
    """
    path = user_path(spec)
    if path.is_dir():
        ours = (path / FIRST_SHARD).exists()  # even where the manifest is gone
        by_format = {} if ours else _in_folder(path)
    elif path.exists():
        by_format = _named([path])
    elif glob.has_magic(str(path)):
        by_format = _named(Path(p) for p in glob.glob(str(path), recursive=True))
    else:
        return None
    if len(by_format) > 1:
        found = ", ".join(f"{format.name} ({files[0].name}, …)" for format, files in by_format.items())
        raise DataError(
            f"{path} holds token files of several formats.",
            got=found,
            hint=f"a glob that matches one kind, like '{path / '*.bin' if path.is_dir() else path}'",
        )
    for format, files in by_format.items():
        return Found(path if len(files) > 1 or path.is_dir() else files[0], format, tuple(sorted(files)))
    return None


def _named(paths: Iterable[Path]) -> dict[Format, list[Path]]:
    """Files by format that somebody named: their suffix is enough. Nothing if there are others among them, like text."""
    found: dict[Format, list[Path]] = {}
    for path in sorted(p for p in paths if p.is_file()):
        if path.name.endswith(COMPANIONS):
            continue
        pair = path.with_suffix(".bin") if path.suffix == ".idx" else path
        if pair != path and not pair.exists() and not _is_index(path):
            return {}
        format = _format_of(pair)
        if format is None:
            return {}
        if pair not in found.setdefault(format, []):
            found[format].append(pair)
    return found


def _in_folder(folder: Path) -> dict[Format, list[Path]]:
    """Files by format that speak for themselves: a folder of text may hold all kinds of files beside it."""
    found: dict[Format, list[Path]] = {}
    files = sorted(p for p in folder.iterdir() if p.is_file())
    for path in files:
        if path.suffix == ".idx" and _is_index(path):
            path = path.with_suffix(".bin")
        format = _format_of(path)
        if format is not None and _is_sure(format, path) and path not in found.setdefault(format, []):
            found[format].append(path)
    # One whose first bytes are damaged among others is not left out in silence.
    for format in (LLMC, NPY):
        if format in found:
            found[format] = sorted({*found[format], *_like(found[format], files)})
    for format in (MEGATRON, DATATROVE):
        if format in found:
            found[format] = sorted({*found[format], *(p for p in files if _format_of(p) is format)})
    if MEGATRON in found:  # a .bin that has lost its index
        found[MEGATRON] = sorted({*found[MEGATRON], *(p for p in files if p.suffix == ".bin")})
        found.pop(NANOGPT, None)
    if NPY in found:
        found[NPY] = sorted({*found[NPY], *(p for p in files if p.suffix == ".npy" and _has_split_word(p))})
    found = {format: paths for format, paths in found.items() if paths}
    for format in (NANOGPT, NPY):
        if format in found:
            _check_no_text(folder, found[format][0], {NANOGPTS_TEXT} if format is NANOGPT else set())
    if not found and not any(p.is_dir() and p.name != TOKENIZER for p in folder.iterdir()):
        return _named(files)  # nothing else lies there: a damaged one is told so, not taken for text
    return found


def _check_no_text(folder: Path, ids: Path, allowed: set[str]) -> None:
    """Refuse a folder of text with a file that may be ids, or numbers that go with the text, such as its labels."""
    for here, folders, files in os.walk(folder):
        folders[:] = [n for n in folders if not n.startswith(".") and n != TOKENIZER]
        for name in sorted(set(files) - allowed):
            if TEXT.search(name) and not ABOUT.fullmatch(name) and not name.startswith("."):
                raise DataError(
                    f"{folder} may be a folder of text or one of tokens.",
                    got=f"{Path(here, name).relative_to(folder)}, and {ids.name}, which has nothing that says it holds ids",
                    hint=f"for the tokens name the file, or a glob: '{folder / ('*' + ids.suffix)}'; "
                    "for the text a folder of its own",
                )


def _is_sure(format: Format, path: Path) -> bool:
    """Whether the file shows what it is, by its first bytes, by what lies beside it, or by nanoGPT's names."""
    if format is MEGATRON:
        index = path.with_suffix(".idx")
        return index.is_file() and _is_index(index)
    if format is DATATROVE:
        return any(path.with_name(path.name + end).exists() for end in (".index", ".metadata"))
    if format is NPY:
        return _has_split_word(path) and NPY.recognises(path)
    return format is LLMC or path.name in ("train.bin", "val.bin")


def _has_split_word(path: Path) -> bool:
    """Whether the file's name says train or val."""
    return bool(set(re.findall("[a-z]+", path.stem.lower())) & {"train", *VAL_WORDS})


def _like(sure: list[Path], files: list[Path]) -> set[Path]:
    """Files whose names differ from these in digits alone."""
    patterns = {re.sub(r"\d+", "0", f.name) for f in sure}
    return {f for f in files if re.sub(r"\d+", "0", f.name) in patterns}


def _format_of(path: Path) -> Format | None:
    if path.suffix == ".ds":
        return DATATROVE
    if path.suffix == ".npy":
        return NPY
    if path.suffix != ".bin":
        return None
    if path.with_suffix(".idx").exists():
        return MEGATRON
    if not path.exists():  # an index of Megatron's without its pair: opening says so
        return MEGATRON
    return LLMC if LLMC.recognises(path) else NANOGPT


def _is_index(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
