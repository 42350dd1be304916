"""Another program's token files as a set to train on, in place: checked, split, known by a fingerprint, never copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from regpt.data.formats import Found
from regpt.data.formats.base import Eot, TokenFile
from regpt.data.formats.datatrove import UNKNOWN
from regpt.data.shards import TokenizerFacts
from regpt.data.sources import CONTENT_BYTES
from regpt.data.split import Ids, IdsFile, TokenSplit, mapped
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer

BLOCK = 1 << 21  # ids that are looked at together
SAMPLES = 16  # stretches of a large file that it is known by
SAMPLE = 1 << 13  # ids of each
NAMES_OF_GPT2 = ("gpt2", "openai-community/gpt2")


@dataclass(frozen=True)
class ForeignSet:
    """Token files whose headers and indices are checked. Made by `open_foreign`."""

    path: Path
    format: str
    tokenizer: TokenizerFacts
    files: Mapping[str, tuple[TokenFile, ...]]
    """By split."""
    byte_lengths: Callable[[], Ids]
    """Bytes of text that each id stands for."""
    eot: Eot
    """Where `<|endoftext|>` stands: that is where documents end, unless there is an index."""
    held_out: str
    """Where the validation split comes from, in a sentence."""
    left_out: tuple[str, ...]
    """Files whose names say test."""

    @property
    def name(self) -> str:
        """What the text is called."""
        return self.path.resolve().name

    @property
    def splits(self) -> tuple[str, ...]:
        """train, and val where there is one."""
        return tuple(self.files)

    @property
    def has_index(self) -> bool:
        """Whether the files say where every document ends."""
        return all(f.document_ends is not None for files in self.files.values() for f in files)

    @property
    def stored_bytes(self) -> int:
        """How much the ids take."""
        return sum(f.ids.bytes for files in self.files.values() for f in files)

    @cached_property
    def fingerprint(self) -> str:
        """Hex; another one where the files change: their content, or above 256 MiB their sizes and samples of their ids.

        No times: who copies files, and a run on them, must be able to go on.
        """
        by_content = self.stored_bytes <= CONTENT_BYTES
        digest = xxhash.xxh3_128(f"{self.tokenizer.fingerprint}\0{by_content}".encode())
        for split, files in self.files.items():
            for f in files:
                ids = f.ids
                digest.update(f"\0{split}\0{ids.offset}\0{ids.tokens}\0{ids.dtype.str}\0".encode())
                for stretch in [mapped(ids)] if by_content else _samples(mapped(ids)):
                    digest.update(stretch.data)
        return digest.hexdigest()

    def split(self, name: str) -> TokenSplit:
        """The ids of "train" or "val"."""
        if name not in self.files:
            raise DataError(
                f"{self.path} has no split {name!r}.",
                got=", ".join(self.files),
                hint="--data.val-source FILE, or a --data.val-fraction above 0",
            )
        ids = [f.ids for f in self.files[name]]
        return TokenSplit(
            name,
            ids,
            document_ends=partial(self._document_ends, name),
            source_bytes=partial(_source_bytes, ids, self.byte_lengths),
        )

    def verified(self) -> Iterator[int]:
        """Read every id; yields how many bytes were read since.

        Raises:
            DataError: an id lies outside the vocabulary; naming file and byte.
        """
        for files in self.files.values():
            for f in files:
                for start in range(0, f.ids.tokens, BLOCK):
                    yield check_ids(f.ids, start, self.tokenizer)

    def check_samples(self) -> None:
        """Look at the first and the last ids of every file: what is of another type or byte order shows there."""
        for files in self.files.values():
            for f in files:
                for start in {0, max(f.ids.tokens - BLOCK // 64, 0)} if f.ids.tokens else ():
                    check_ids(f.ids, start, self.tokenizer, BLOCK // 64)

    def _document_ends(self, name: str) -> Ids:
        """Every file's by its index; without one, where `<|endoftext|>` says so, a last unfinished one included."""
        found, start = [np.empty(0, dtype=np.int64)], 0
        for f in self.files[name]:
            if f.document_ends is not None:
                ends = f.document_ends()
            else:
                ids = mapped(f.ids)
                ends = ends_by_eot(ids, self.tokenizer.eot_id, self.eot)
                if start and self.eot == "prepend" and ids[0] == self.tokenizer.eot_id:
                    ends = np.append(0, ends)  # the last document of the file before
            found.append(ends + start)
            start += f.ids.tokens
        ends = np.concatenate(found)
        return np.append(ends, start) if start and (not len(ends) or ends[-1] != start) else ends


def open_foreign(
    found: Found,
    tokenizer: TokenizerFacts,
    byte_lengths: Callable[[], Ids],
    *,
    val: Found | None = None,
    val_fraction: float = 0.0,
    eot: Eot | None = None,
    asked: str | None = None,
) -> ForeignSet:
    """The token files that `recognise` found, checked but for their ids.

    The validation split is `val`, or the files whose names say so, or else the last `val_fraction` of the tokens by
    position; never what is trained on.

    Args:
        asked: the tokenizer's name as the user gave it, where the files may know better.

    Raises:
        DataError: a file is damaged, the files belong to another tokenizer, or there is nothing to train on.
    """
    if not 0 <= val_fraction < 1:
        raise ConfigError("data.val_fraction must lie in [0, 1).", got=val_fraction)
    train = _opened(found, found.of_split("train"), tokenizer, asked)
    own = _opened(found, found.of_split("val"), tokenizer, asked)
    if not train:
        raise DataError(
            f"{found.path} has no tokens to train on.",
            got=", ".join(f.name for f in found.files[:5]),
            hint="a file that is not named val or test",
        )
    held_out = "none"
    if val is not None:
        own = _opened(val, val.of_split("val") or val.files, tokenizer, asked)
        if not own:
            raise DataError(f"{val.path} has no tokens to validate on.")
        if shared := {f.ids.path.resolve() for f in train} & {f.ids.path.resolve() for f in own}:
            raise DataError(
                f"{min(shared)} cannot be both trained and validated on.", hint="another --data.val-source"
            )
        held_out = f"{val.path}"
    elif own:
        held_out = ", ".join(f.ids.path.name for f in own[:3]) + (", …" if len(own) > 3 else "")
    elif val_fraction:
        train, own = _cut(train, val_fraction, found.path)
        held_out = f"the last {val_fraction:.2%} of the tokens, by position"
    files = {"train": tuple(train)} | ({"val": tuple(own)} if own else {})
    left_out = tuple(f.name for f in found.of_split("test"))
    made = ForeignSet(
        found.path,
        found.format.name,
        tokenizer,
        files,
        byte_lengths,
        eot or found.format.eot,
        held_out,
        left_out,
    )
    made.check_samples()
    return made


def _opened(
    found: Found, paths: tuple[Path, ...], tokenizer: TokenizerFacts, asked: str | None
) -> list[TokenFile]:
    """Files of a split; those without ids are left out, as they have nothing to say."""
    files = [found.format.open_file(path, tokenizer.vocab_size) for path in paths]
    for f in files:
        theirs = f.tokenizer
        ours = (*NAMES_OF_GPT2, own_name(tokenizer)) if tokenizer.kind == "gpt2" else (own_name(tokenizer),)
        if theirs is not None and asked in ("gpt2", "bytes", "chars", "bpe") and theirs not in ours:
            raise DataError(
                f"{f.ids.path} was written with the tokenizer {theirs}, this run asks for {asked}.",
                hint="--tokenizer.name with a folder that holds that tokenizer",
            )
    return [f for f in files if f.ids.tokens]


def own_name(tokenizer: TokenizerFacts) -> str:
    """What we call a tokenizer in other programs' files."""
    if tokenizer.kind == "unknown":
        return UNKNOWN
    return (
        tokenizer.kind
        if tokenizer.kind in ("gpt2", "bytes")
        else f"regpt-{tokenizer.kind}-{tokenizer.fingerprint[:8]}"
    )


def byte_lengths_of(tokenizer: Tokenizer) -> Ids:
    """Bytes of text that each id stands for; none for `<|endoftext|>`."""
    sizes = [len(tokenizer.decode_bytes([i])) for i in range(tokenizer.vocab_size)]
    sizes[tokenizer.eot_id] = 0
    return np.array(sizes, dtype=np.int64)


def _samples(ids: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The first ids, the last ones, and some between at even distances."""
    last = max(len(ids) - SAMPLE, 0)
    return (ids[start : start + SAMPLE] for start in (last * n // (SAMPLES - 1) for n in range(SAMPLES)))


def _cut(files: list[TokenFile], fraction: float, path: Path) -> tuple[list[TokenFile], list[TokenFile]]:
    total = sum(f.ids.tokens for f in files)
    at = int(total * (1 - fraction))
    if at in (0, total):
        raise DataError(f"{path}: {total} tokens cannot be split with val_fraction={fraction}.")
    before: list[TokenFile] = []
    after: list[TokenFile] = []
    start = 0
    for f in files:
        n = f.ids.tokens
        here = min(max(at - start, 0), n)
        before += [f.part(0, here)] if here else []
        after += [f.part(here, n)] if here < n else []
        start += n
    return before, after


def ends_by_eot(ids: NDArray[Any], eot_id: int, eot: Eot) -> Ids:
    """Where documents end by `<|endoftext|>` alone: behind each one, or before each but the first."""
    if eot == "none":
        return np.empty(0, dtype=np.int64)
    found = [np.empty(0, dtype=np.int64)]
    for start in range(0, len(ids), BLOCK):
        places = np.flatnonzero(ids[start : start + BLOCK] == eot_id) + start
        found.append(places + 1 if eot == "append" else places[places > 0])
    return np.concatenate(found)


def check_ids(file: IdsFile, start: int, tokenizer: TokenizerFacts, n: int = BLOCK) -> int:
    """Refuse ids outside the vocabulary among the `n` from `start` on; returns how many bytes were read."""
    block = mapped(file)[start : start + n]
    size = tokenizer.vocab_size
    if len(block) and (int(block.max()) >= size or int(block.min()) < 0):
        place = start + int(np.argmax((block >= size) | (block < 0)))
        swapped = block.byteswap()
        hint = "the tokenizer that wrote the file: --tokenizer.name"
        if int(swapped.max()) < size and int(swapped.min()) >= 0:
            hint = "with numpy's byteswap: its bytes seem to stand in the other order (big-endian)"
        raise DataError(
            f"{file.path} holds an id outside the vocabulary at byte {file.offset + place * file.dtype.itemsize}.",
            got=int(mapped(file)[place]),
            expected=f"0 to {size - 1:,}, as {file.dtype.name} of the tokenizer {tokenizer.kind}",
            hint=hint,
        )
    return block.nbytes


def _source_bytes(files: list[IdsFile], byte_lengths: Callable[[], Ids]) -> int:
    """Bytes of text that the ids stand for."""
    sizes, total = byte_lengths(), 0
    for file in files:
        ids = mapped(file)
        for start in range(0, len(ids), BLOCK):
            total += int(sizes[ids[start : start + BLOCK]].sum())
    return total
