"""Slices of one source, each prepared by itself, joined into the shards that one machine would have written."""

from __future__ import annotations

import dataclasses
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from regpt.data.duplicates import Seen
from regpt.data.journal import SEEN, stretches
from regpt.data.prepare import ProgressFunction, finished, publish, require_text
from regpt.data.request import Slice
from regpt.data.shards import TOKENIZER, Manifest, Shards
from regpt.data.split import Ids
from regpt.data.stored import StoredIds, document_lengths, shard_files
from regpt.data.unfinished import SHARDS, clear, clear_leftovers, require_room, unfinished
from regpt.data.writer import SplitWriter
from regpt.errors import DataError

MOST_NAMED = 8  # missing slices in a message


def merge(folders: Sequence[Path], out: Path, *, progress: ProgressFunction = lambda *_: None) -> Manifest:
    """Join all slices of a request into the folder `out`; nothing if that was done before.

    The shards are to the byte those of `prepare` without slices: documents in the source's order, or shuffled; without
    those that are in an earlier slice, if that was asked for.

    Args:
        folders: of the slices, in any order.
        progress: called with (bytes of ids done, bytes in all); may raise to stop the work.

    Raises:
        DataError: a slice is missing, there twice, damaged, or of another request; or as `prepare`.
    """
    slices = _in_order([Shards.open(folder) for folder in folders])
    first = slices[0].manifest
    request = {name: value for name, value in first.request.items() if name != "slice"}
    out = Path(os.path.abspath(out))
    if done := finished(out, request, first.tokenizer.kind):
        clear_leftovers(out)
        return done
    total = sum(f.bytes for s in slices for f in s.manifest.files)
    copies = 2 if "shuffle_seed" in request else 1
    require_room(out, total * copies, f"{len(slices)} slices")
    with unfinished(out) as work:
        clear(work)  # a merge that was stopped begins anew
        done_bytes = 0
        for s in slices:
            for file in s.verify():
                done_bytes += file.bytes
                progress(done_bytes // 2, total)
        shutil.copytree(slices[0].path / TOKENIZER, work / SHARDS / TOKENIZER)
        joined = _Joined(slices, work, request)
        try:
            joined.copy(lambda copied: progress((total + copied) // 2, total))
            specs = {"train": first.source.spec, "val": (first.val_source or first.source).spec}
            require_text(joined.writers, specs, joined.skipped)
            manifest = dataclasses.replace(
                first,
                request=request,
                max_id=max(s.manifest.max_id for s in slices),
                skipped={k: n for k, n in sorted(joined.skipped.items()) if n},
                duplicates=joined.duplicates,
            )
            return publish(work, manifest, joined.writers, out)
        finally:
            joined.close()


def _in_order(found: list[Shards]) -> list[Shards]:
    """Every slice once, the first one first. Raises DataError where they are not all slices of one request."""
    by_number: dict[int, Shards] = {}
    for shards in found:
        written = shards.manifest.request.get("slice")
        if written is None:
            raise DataError(
                f"{shards.path} is not a slice but a whole source.",
                expected="folders made by regpt prepare --slice i/n",
            )
        part, of = Slice.parse(str(written)), str(found[0].manifest.request.get("slice")).partition("/")[2]
        other = sorted(
            name
            for name in {*shards.manifest.request, *found[0].manifest.request} - {"slice"}
            if shards.manifest.request.get(name) != found[0].manifest.request.get(name)
        ) + (["the number of slices"] if str(part.of) != of else [])
        if other:
            raise DataError(
                f"{shards.path} and {found[0].path} are not slices of one request; different: {', '.join(other)}.",
                hint="prepare every slice from the same files by the same options",
            )
        if part.number in by_number:
            raise DataError(f"slice {part} is there twice: {by_number[part.number].path} and {shards.path}.")
        by_number[part.number] = shards
    missing = [str(n) for n in range(1, part.of + 1) if n not in by_number]
    if missing:
        some = ", ".join(missing[:MOST_NAMED]) + (", ..." if len(missing) > MOST_NAMED else "")
        raise DataError(f"of {part.of} slices these are missing: {some}.", got=f"{len(by_number)} folders")
    return [by_number[n] for n in sorted(by_number)]


class _Joined:
    """What has been copied so far."""

    def __init__(self, slices: list[Shards], work: Path, request: dict[str, object]) -> None:
        first = slices[0].manifest
        self.slices, self.dedup, self.single_texts = slices, bool(request.get("dedup")), first.single_texts
        self.seen = Seen(work / SEEN)
        shard_tokens = int(str(request["shard_tokens"]))
        self.writers = {
            name: SplitWriter(work / SHARDS, name, first.itemsize, shard_tokens) for name in first.splits
        }
        self.skipped: Counter[str] = Counter()
        self.duplicates = 0
        for s in slices:
            self.skipped.update(s.manifest.skipped)
            if self.dedup:
                self.duplicates += s.manifest.duplicates or 0
        self.tokenizer = slices[0].load_tokenizer()

    def copy(self, progress: Callable[[int], None]) -> None:
        """All splits, `progress` hearing the bytes copied."""
        copied = 0
        for name, writer in self.writers.items():
            files = [f for s in self.slices for f in shard_files(s.path, s.manifest.files, name)]
            source_bytes = sum(s.splits[name].source_bytes for s in self.slices)
            ids, ahead = StoredIds(files), StoredIds(files)
            try:
                for lengths, ended in document_lengths(files):
                    looked_at = ended and name not in self.single_texts
                    dropped = (
                        self._dropped(ahead, lengths) if looked_at else np.zeros(len(lengths), dtype=bool)
                    )
                    for stretch in stretches(dropped):
                        sizes = lengths[stretch]
                        if dropped[stretch.start]:
                            source_bytes -= sum(
                                self._text_bytes(ids, size, writer.itemsize) for size in sizes.tolist()
                            )
                        else:
                            writer.add(ids, sizes, 0, whole=ended)
                        copied += int(sizes.sum()) * writer.itemsize
                        progress(copied)
            finally:
                ids.close()
                ahead.close()
            writer.total.source_bytes = source_bytes

    def close(self) -> None:
        """Let go of the files, as they are."""
        self.seen.close()
        for writer in self.writers.values():
            writer.abandon()

    def _dropped(self, ahead: StoredIds, lengths: Ids) -> NDArray[np.bool_]:
        """Which of the documents are left out. By their ids, which are equal where the text is."""
        itemsize = next(iter(self.writers.values())).itemsize
        hashes = array("Q")
        for length in lengths.tolist():
            digest = xxhash.xxh3_64()
            for block in ahead.blocks(length * itemsize):
                digest.update(block)
            hashes.append(digest.intdigest())
        repeated = self.seen.add(np.frombuffer(hashes, np.uint64), 0)
        n_repeated = int(repeated.sum())
        self.duplicates += n_repeated
        if not self.dedup:
            return np.zeros(len(lengths), dtype=bool)
        self.skipped["duplicate"] += n_repeated
        return repeated

    def _text_bytes(self, ids: StoredIds, length: int, itemsize: int) -> int:
        """Bytes of text of the next document, without the `<|endoftext|>` at its end."""
        dtype, found = np.dtype(f"<u{itemsize}"), 0
        for block in ids.blocks((length - 1) * itemsize):
            found += len(self.tokenizer.decode_bytes(np.frombuffer(block, dtype).tolist()))
        ids.skip(itemsize)
        return found
