"""Tokens from one program's files into another's: streamed block by block, `<|endoftext|>` put where the other has it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from regpt.config import SHARD_TOKENS
from regpt.data.foreign import ForeignSet, byte_lengths_of, own_name
from regpt.data.formats import FORMATS
from regpt.data.formats.base import Eot, Writer
from regpt.data.shards import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    SourceFacts,
    SplitFacts,
    dtype_for,
)
from regpt.data.split import Ids, TokenSet, TokenSplit
from regpt.data.unfinished import SHARDS, clear, finish, require_room, unfinished
from regpt.data.writer import SplitWriter
from regpt.errors import DataError
from regpt.tokenizers import Tokenizer
from regpt.train.durable import write_synced

BLOCK = 1 << 20  # ids converted together
SAMPLED_DOCUMENTS = 1000
Target = Literal["nanogpt", "llmc", "megatron", "datatrove", "regpt"]


@dataclass(frozen=True)
class Converted:
    """What `convert` wrote."""

    tokens: dict[str, int]
    """By split, `<|endoftext|>` included."""
    documents: dict[str, int]
    source_eot: Eot
    eot: Eot


def convert(
    source: TokenSet,
    target: Target,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    eot: Eot | None = None,
    source_eot: Eot | None = None,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Converted:
    """Write the tokens of `source` into the new folder `out`, which has its name only when everything is there.

    Args:
        tokenizer: that of the ids; saved beside them. None: one that regpt does not have.
        eot: where `<|endoftext|>` goes; None: where the target's own program puts it.
        source_eot: where it stands; None: as an index shows, or as the source's program does.
        progress: called with (ids done, ids in all).

    Raises:
        DataError: an id is outside the vocabulary, the source's custom cannot be told, `out` exists, the disk is full.
    """
    out = Path(os.path.abspath(out))
    check_request(target, out, tokenizer, eot)
    splits = {name: source.split(name) for name in source.splits}
    ends = {name: _indexed_ends(source, split) for name, split in splits.items()}
    known = source_eot or _custom_of(source, splits, ends)
    wanted: Eot = eot or ("append" if target == "regpt" else FORMATS[target].eot)
    total, before = sum(s.n_tokens for s in splits.values()), 0
    tokens, documents = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    needed = total * dtype_for(source.tokenizer.vocab_size).itemsize
    require_room(out, needed, f"{total:,} ids")
    with unfinished(out) as work:
        clear(work)
        folder = work / SHARDS
        folder.mkdir()
        if tokenizer is not None:
            tokenizer.save(folder / TOKENIZER)
        writers: dict[str, Writer] = {}
        with contextlib.ExitStack() as open_files:
            for name, split in splits.items():
                writer = writers[name] = _writer(target, folder, name, source, tokenizer)
                open_files.callback(writer.abandon)
                stream = _blocks(split, ends[name], known, source.tokenizer.eot_id)
                for done, ids, stops in _moved(stream, known, wanted, source.tokenizer.eot_id):
                    if len(ids) and not 0 <= ids.min() <= ids.max() < source.tokenizer.vocab_size:
                        raise DataError(f"{source.path} holds an id outside the vocabulary.")
                    writer.write(ids, stops)
                    tokens[name] += len(ids)
                    documents[name] += len(stops)
                    progress(before + done, total)
                writer.finish()
                before += split.n_tokens
        if target == "regpt":
            assert tokenizer is not None
            _write_manifest(folder, cast(dict[str, "_ShardWriter"], writers), source, known)
        finish(folder, out)
    return Converted(tokens, documents, known, wanted)


def check_request(target: Target, out: Path, tokenizer: Tokenizer | None, eot: Eot | None) -> None:
    """Refuse what cannot be written, before anything is read.

    Raises:
        DataError: `out` holds something, or our own shards cannot be made so.
    """
    if target == "regpt" and (tokenizer is None or eot not in (None, "append")):
        why = "a tokenizer of regpt's"
        if tokenizer is not None:
            why = "<|endoftext|> behind every document: --eot append"
        raise DataError(f"regpt's own shards need {why}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists already; nothing was written.", hint="another --out")


# --- where documents end ----------------------------------------------------------------------------------------------


def _indexed_ends(source: TokenSet, split: TokenSplit) -> Ids | None:
    """Where documents end by an index; None where only `<|endoftext|>` tells."""
    if isinstance(source, ForeignSet) and not source.has_index:
        return None
    return split.document_ends


def _custom_of(source: TokenSet, splits: dict[str, TokenSplit], ends: dict[str, Ids | None]) -> Eot:
    """Where `<|endoftext|>` stands: as the first documents of the index show, or as the format's program does."""
    if not isinstance(source, ForeignSet):
        return "append"
    firsts, lasts = [], []
    for name, split in splits.items():
        found = ends[name]
        if found is None:
            return source.eot
        stops = found[:SAMPLED_DOCUMENTS]
        starts = np.concatenate([[0], stops[:-1]]) if len(stops) else stops
        lasts += [int(split.read(int(at) - 1, 1)[0]) for at in stops]
        firsts += [int(split.read(int(at), 1)[0]) for at in starts]
    eot_id = source.tokenizer.eot_id
    if all(i == eot_id for i in lasts):
        return "append"
    if all(i == eot_id for i in firsts):
        return "prepend"
    if eot_id not in firsts and eot_id not in lasts:
        return "none"
    raise DataError(
        f"{source.path}: some documents have <|endoftext|> (id {eot_id}) at an end, others have not.",
        hint="--source-eot append, prepend or none",
    )


@dataclass(frozen=True)
class _Block:
    """Some ids of a split, and where documents end and begin among them."""

    at: int
    ids: Ids
    starts: Ids
    ends: Ids


def _blocks(split: TokenSplit, ends: Ids | None, eot: Eot, eot_id: int) -> Iterator[_Block]:
    """The split in order. Its end ends the last document, whether that has an end of its own or not."""
    begins = True
    for at in range(0, split.n_tokens, BLOCK):
        n = min(BLOCK, split.n_tokens - at)
        last = at + n == split.n_tokens
        ids = split.read(at, n if last else n + 1)  # the next one tells whether a document ends here
        if ends is not None:
            first, stop = np.searchsorted(ends, (at, at + n), side="right")
            here = ends[first:stop] - at
        elif eot == "append":
            here = np.flatnonzero(ids[:n] == eot_id) + 1
        elif eot == "prepend":
            here = np.flatnonzero(ids == eot_id)
            here = here[here > 0]
        else:
            here = np.empty(0, dtype=np.int64)
        if last and (not len(here) or here[-1] != n):
            here = np.append(here, n)
        starts = here[here < n]
        yield _Block(at, ids[:n], np.append(0, starts) if begins else starts, here)
        begins = bool(len(here)) and int(here[-1]) == n


def _moved(blocks: Iterator[_Block], known: Eot, wanted: Eot, eot_id: int) -> Iterator[tuple[int, Ids, Ids]]:
    """(ids done, ids, ends of documents among them) with `<|endoftext|>` at its new place.

    A document that is empty without it is left out where it goes nowhere.
    """
    open_tokens = 0
    for block in blocks:
        kept = np.ones(len(block.ids), dtype=bool)
        if known != "none":
            places = block.ends - 1 if known == "append" else block.starts
            kept[places[block.ids[places] == eot_id]] = False
        before = np.concatenate([[0], np.cumsum(kept)])  # how many are kept before each place
        ids, ends, starts = block.ids[kept], before[block.ends], before[block.starts]
        if wanted == "append":
            ids = np.insert(ids, ends, eot_id)
            ends = ends + np.arange(1, len(ends) + 1)
        elif wanted == "prepend":
            ids = np.insert(ids, starts, eot_id)
            ends = ends + np.searchsorted(block.starts, block.ends, side="left")
        if len(ends):
            lengths = np.diff(ends, prepend=-open_tokens)
            ends = ends[lengths > 0]
        open_tokens = len(ids) - int(ends[-1]) if len(ends) else open_tokens + len(ids)
        yield block.at + len(block.ids), ids, ends


# --- writing ----------------------------------------------------------------------------------------------------------


def _writer(
    target: Target, folder: Path, split: str, source: TokenSet, tokenizer: Tokenizer | None
) -> Writer:
    if target == "regpt":
        assert tokenizer is not None
        return _ShardWriter(folder, split, tokenizer)
    return FORMATS[target].writer(folder, split, source.tokenizer.vocab_size, own_name(source.tokenizer))


class _ShardWriter(Writer):
    """Our own shards."""

    def __init__(self, folder: Path, split: str, tokenizer: Tokenizer) -> None:
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.shards = SplitWriter(folder, split, self.dtype.itemsize, SHARD_TOKENS)
        self.byte_lengths, self.max_id = byte_lengths_of(tokenizer), 0

    def write(self, ids: NDArray[np.int64], ends: Ids) -> None:
        if not len(ids):
            return
        whole = bool(len(ends)) and int(ends[-1]) == len(ids)
        lengths = np.diff(ends if whole else np.append(ends, len(ids)), prepend=0)
        data = io.BytesIO(ids.astype(self.dtype).tobytes())
        self.shards.add(data, lengths, int(self.byte_lengths[ids].sum()), whole=whole)
        self.max_id = max(self.max_id, int(ids.max()))

    def finish(self) -> None:
        self.shards.finish()

    def abandon(self) -> None:
        self.shards.abandon()

    def facts(self) -> SplitFacts:
        """The totals, for the manifest."""
        return self.shards.facts()


def _write_manifest(folder: Path, writers: dict[str, _ShardWriter], source: TokenSet, eot: Eot) -> None:
    manifest = Manifest(
        tokenizer=source.tokenizer,
        max_id=max(w.max_id for w in writers.values()),
        dtype=dtype_for(source.tokenizer.vocab_size).name,
        source=SourceFacts(source.name, str(source.path), source.fingerprint),
        val_source=None,
        request={"converted": source.fingerprint, "source_eot": eot},
        splits={name: w.facts() for name, w in writers.items()},
        files=tuple(f for w in writers.values() for f in w.shards.files),
        skipped={},
    )
    write_synced(folder / MANIFEST, [manifest.to_json().encode()])
