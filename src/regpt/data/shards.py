"""Our format for token data: raw files of ids, the ends of documents, and a manifest that says what they are.

    manifest.json       written last: a folder without it is not finished
    train-00000.bin     ids, little-endian uint16 (uint32 where the vocabulary needs it), nothing else
    train-00000.idx     where documents end in that file, in ids, little-endian uint64
    tokenizer/          what `regpt.tokenizers.load_tokenizer` reads

Every document ends with `<|endoftext|>`. A file may end inside a document, which then goes on in the next one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from regpt.data.split import Ids, IdsFile, TokenSplit
from regpt.errors import DataError
from regpt.tokenizers import Tokenizer, load_tokenizer
from regpt.train.durable import sealed, unsealed

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
FIRST_SHARD = "train-00000.bin"
FORMAT = "regpt-shards-1"
SPLITS = ("train", "val")
BLOCK_BYTES = 4 << 20


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The narrowest of our types that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


# --- the manifest -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer wrote the ids."""

    kind: str
    fingerprint: str
    vocab_size: int
    eot_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerFacts:
        """What tokens keep of their tokenizer."""
        return cls(tokenizer.kind, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eot_id)


@dataclass(frozen=True)
class SourceFacts:
    """Where the text came from."""

    name: str
    spec: str
    fingerprint: str


@dataclass(frozen=True)
class SplitFacts:
    """Totals of one split."""

    tokens: int
    documents: int
    source_bytes: int
    """Text of the documents as UTF-8, without what separated them."""
    longest: int
    """Tokens of the longest document."""


@dataclass(frozen=True)
class ShardFile:
    """One file of ids; its index has the same name with .idx."""

    name: str
    split: str
    tokens: int
    documents: int
    """How many end in this file."""
    bytes: int
    xxh3_128: str
    index_xxh3_128: str

    @property
    def index_name(self) -> str:
        """The file with the ends of documents."""
        return self.name.removesuffix(".bin") + ".idx"


@dataclass(frozen=True)
class Manifest:
    """What a shard folder holds. Equal text, tokenizer and settings give equal bytes, so no times stand in it."""

    tokenizer: TokenizerFacts
    max_id: int
    dtype: str
    """uint16 or uint32, little-endian."""
    source: SourceFacts
    val_source: SourceFacts | None
    request: dict[str, Any]
    """All that decides the bytes of the shards; `prepare` compares it."""
    splits: dict[str, SplitFacts]
    files: tuple[ShardFile, ...]
    skipped: dict[str, int]
    """What was left out, by reason."""
    duplicates: int | None = None
    """Documents whose text is that of an earlier one, left out or not. None: written before they were counted."""
    single_texts: tuple[str, ...] = ()
    """Splits that are one text, or a part of one: those are never taken for duplicates."""
    eot: str = "appended"
    format: str = FORMAT

    @property
    def fingerprint(self) -> str:
        """Hex; equal where tokenizer and ids are equal, wherever the text came from."""
        digest = xxhash.xxh3_128(self.tokenizer.fingerprint.encode())
        for f in self.files:
            digest.update(f"\0{f.split}\0{f.xxh3_128}\0{f.index_xxh3_128}".encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """As the file has it, with the hash of itself at its end."""
        return json.dumps(sealed(dataclasses.asdict(self)), indent=1, ensure_ascii=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """The manifest in the folder `path`.

        Raises:
            DataError: there is none, or it is damaged or of another format.
        """
        file = path / MANIFEST
        try:
            values = json.loads(file.read_bytes())
            if values["format"] != FORMAT:
                raise DataError(f"{file}: another format.", got=values["format"], expected=FORMAT)
            values = unsealed(values, required=False)
            if values is None:
                raise DataError(
                    f"{file} has changed since it was written.",
                    hint="prepare the shards again, or copy the whole folder",
                )
            values["tokenizer"] = TokenizerFacts(**values["tokenizer"])
            values["source"] = SourceFacts(**values["source"])
            values["val_source"] = values["val_source"] and SourceFacts(**values["val_source"])
            values["splits"] = {name: SplitFacts(**facts) for name, facts in values["splits"].items()}
            values["single_texts"] = tuple(values.get("single_texts", ()))
            values["files"] = tuple(ShardFile(**f) for f in values["files"])
            manifest = cls(**values)
            manifest._check(file)
        except FileNotFoundError:
            raise DataError(
                f"{path} is not a folder of token shards: it has no {MANIFEST}.",
                hint="regpt prepare SOURCE --out DIR makes one; a stopped preparation is finished by the same command",
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise DataError(f"{file} is damaged or not of regpt: {type(e).__name__}: {e}") from None
        return manifest

    def _check(self, file: Path) -> None:
        """Whether its parts agree. Raises DataError, or TypeError where a number is not one."""
        size = self.tokenizer.vocab_size
        if self.dtype not in ("uint16", "uint32") or size > 1 << 8 * self.itemsize:
            raise DataError(f"{file}: {self.dtype} cannot hold a vocabulary of {size:,} ids.")
        if not 0 <= self.max_id < size or not 0 <= self.tokenizer.eot_id < size:
            raise DataError(
                f"{file}: ids outside the vocabulary.",
                got=f"largest id {self.max_id}",
                expected=f"below {size}",
            )
        for name, facts in self.splits.items():
            files = [f for f in self.files if f.split == name]
            got = (sum(f.tokens for f in files), sum(f.documents for f in files))
            if name not in SPLITS or got != (facts.tokens, facts.documents):
                raise DataError(
                    f"{file}: the files of split {name!r} do not add up.",
                    got=f"{got[0]} tokens, {got[1]} documents",
                    expected=f"{facts.tokens} tokens, {facts.documents} documents",
                )
        for f in self.files:
            if Path(f.name).name != f.name or not f.name.endswith(".bin") or f.split not in self.splits:
                raise DataError(f"{file}: not the name of a shard in this folder: {f.name!r}.")
            if f.bytes != f.tokens * self.itemsize:
                raise DataError(
                    f"{file}: {f.name} cannot have {f.tokens} ids in {f.bytes} bytes of {self.dtype}."
                )

    @property
    def itemsize(self) -> int:
        """Bytes of one id."""
        return np.dtype(self.dtype).itemsize


# --- the shards -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """A finished shard folder, its sizes checked. Made by `Shards.open`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path | str) -> Shards:
        """The shards in the folder `path`.

        Raises:
            DataError: something is missing, has another size than the manifest says, or lies outside the folder.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        root = path.resolve()
        for f in manifest.files:
            for name, size in ((f.name, f.bytes), (f.index_name, 8 * f.documents)):
                file = path / name
                if not file.is_file():
                    raise DataError(
                        f"{file} is missing.", hint="prepare the shards again, or copy the whole folder"
                    )
                if file.resolve().parent != root:
                    raise DataError(f"{file} is a link out of its folder.", got=str(file.resolve()))
                if file.stat().st_size != size:
                    raise DataError(
                        f"{file} has another size than when it was written.",
                        got=f"{file.stat().st_size} bytes",
                        expected=f"{size} bytes",
                        hint="prepare the shards again, or copy the file again",
                    )
        return cls(path, manifest)

    @property
    def splits(self) -> Mapping[str, SplitFacts]:
        """Which splits there are, and their totals."""
        return self.manifest.splits

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that lies beside the shards, once it is sure that it wrote them."""
        tokenizer = load_tokenizer(self.path / TOKENIZER)
        if tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise DataError(
                f"{self.path / TOKENIZER} is not the tokenizer that these shards were written with.",
                got=tokenizer.fingerprint,
                expected=self.tokenizer.fingerprint,
                hint="prepare the shards again, or copy the whole folder",
            )
        return tokenizer

    def split(self, name: str) -> TokenSplit:
        """The ids of "train" or "val"."""
        if name not in self.splits:
            raise DataError(
                f"{self.path} has no split {name!r}.",
                got=", ".join(self.splits),
                hint="prepare it with --val-fraction or --val-source",
            )
        facts = self.splits[name]
        of_split = [f for f in self.manifest.files if f.split == name]
        files = [IdsFile(self.path / f.name, 0, f.tokens, self._dtype) for f in of_split]
        return TokenSplit(
            name,
            files,
            document_ends=partial(self._document_ends, of_split),
            source_bytes=partial(int, facts.source_bytes),
        )

    @property
    def name(self) -> str:
        """What the text is called."""
        return self.manifest.source.name

    @property
    def tokenizer(self) -> TokenizerFacts:
        """Which tokenizer wrote the ids."""
        return self.manifest.tokenizer

    @property
    def fingerprint(self) -> str:
        """Hex; equal where tokenizer and ids are equal."""
        return self.manifest.fingerprint

    @property
    def stored_bytes(self) -> int:
        """What `verified` reads, but for the indices."""
        return sum(f.bytes for f in self.manifest.files)

    def verified(self) -> Iterator[int]:
        """`verify`; yields how many bytes each file had."""
        return (f.bytes for f in self.verify())

    def verify(self) -> Iterator[ShardFile]:
        """Read every file whole; yields each one that is as it was written.

        Raises:
            DataError: a file has changed, or holds what our format cannot hold.
        """
        for f in self.manifest.files:
            ends = np.fromfile(self.path / f.index_name, dtype="<u8")
            self._same(f.index_name, xxhash.xxh3_128_hexdigest(ends.data), f.index_xxh3_128)
            digest, high = xxhash.xxh3_128(), 0
            with open(self.path / f.name, "rb") as file:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    high = max(high, int(np.frombuffer(block, self._dtype).max()))
            self._same(f.name, digest.hexdigest(), f.xxh3_128)
            if high > self.manifest.max_id:
                raise DataError(
                    f"{self.path / f.name} holds the id {high}.", expected=f"{self.manifest.max_id} at most"
                )
            ids = (
                np.memmap(self.path / f.name, self._dtype, mode="r") if f.tokens else np.empty(0, self._dtype)
            )
            if len(ends) and (
                ends[-1] > f.tokens or (np.diff(ends.astype(np.int64), prepend=0) < 1).any()
                or (ids[ends - 1] != self.manifest.tokenizer.eot_id).any()
            ):  # fmt: skip
                raise DataError(f"{self.path / f.index_name} does not say where documents end.")
            yield f

    def _same(self, name: str, got: str, expected: str) -> None:
        if got != expected:
            raise DataError(
                f"{self.path / name} has changed since it was written.",
                got=f"xxh3_128 {got}",
                expected=f"xxh3_128 {expected}",
                hint="prepare the shards again, or copy the file again",
            )

    def _document_ends(self, files: list[ShardFile]) -> Ids:
        starts = np.cumsum([0] + [f.tokens for f in files])
        ends = [
            np.fromfile(self.path / f.index_name, dtype="<u8").astype(np.int64) + start
            for f, start in zip(files, starts, strict=False)
        ]
        return np.concatenate(ends) if ends else np.empty(0, dtype=np.int64)

    @property
    def _dtype(self) -> np.dtype[Any]:
        return np.dtype(self.manifest.dtype).newbyteorder("<")
