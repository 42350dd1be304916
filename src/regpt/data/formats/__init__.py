"""Token files of other programs, recognised by names and first bytes: which of them lie at a path, and which split each is."""

from __future__ import annotations

import glob
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
from regpt.data.shards import FIRST_SHARD
from regpt.errors import DataError
from regpt.paths import user_path

NANOGPT, LLMC, MEGATRON, DATATROVE, NPY = NanoGPT(), LlmC(), Megatron(), Datatrove(), Npy()
FORMATS: dict[str, Format] = {f.name: f for f in (NANOGPT, LLMC, MEGATRON, DATATROVE, NPY)}
VAL_WORDS = {"val", "valid", "validation"}
TEST_WORDS = {"test"}


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

    A `.bin`, `.ds` or `.npy` named by itself, or by a glob, is one. In a folder: `.ds` files; `.bin` with an `.idx` of
    Megatron's; `.bin` with llm.c's magic number; `train.bin`; `.npy` named train or val.

    Raises:
        DataError: files of several formats lie there.
    """
    path = user_path(spec)
    if path.is_dir():
        by_format = (
            {} if (path / FIRST_SHARD).exists() else _in_folder(path)
        )  # our own, even without a manifest
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
    """Files by format that somebody named: their suffix is enough."""
    found: dict[Format, list[Path]] = {}
    for path in sorted(p for p in paths if p.is_file()):
        pair = path.with_suffix(".bin") if path.suffix == ".idx" and _is_index(path) else path
        format = _format_of(pair)
        if format is not None and pair not in found.setdefault(format, []):
            found[format].append(pair)
    return found


def _in_folder(folder: Path) -> dict[Format, list[Path]]:
    """Files by format that speak for themselves."""
    found: dict[Format, list[Path]] = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        if path.suffix == ".idx" and _is_index(path):
            path = path.with_suffix(".bin")
        format = _format_of(path)
        sure = (
            format in (MEGATRON, LLMC, DATATROVE)
            or (format is NPY and {*re.findall("[a-z]+", path.stem.lower())} & {"train", *VAL_WORDS})
            or (format is NANOGPT and path.name in ("train.bin", "val.bin"))
        )
        if format is not None and sure and path not in found.setdefault(format, []):
            found[format].append(path)
    if LLMC in found:  # one whose first bytes are damaged among others is not left out in silence
        found[LLMC] = sorted({*found[LLMC], *found.pop(NANOGPT, []), *_like(found[LLMC], folder)})
    return found


def _like(files: list[Path], folder: Path) -> set[Path]:
    """Files whose names differ from these in digits alone."""
    patterns = {re.sub(r"\d+", "0", f.name) for f in files}
    return {p for p in folder.iterdir() if re.sub(r"\d+", "0", p.name) in patterns}


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
