"""What a preparation has written so far, noted now and then, so that after a crash it goes on from there.

shards/         the files of ids, behind which nothing is lost when they are cut to what the journal says
seen.sqlite     the hashes of the documents so far
downloads/      files that are here only to pass
journal.json    how far all of that is; written last
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regpt.data.documents import Part
from regpt.data.duplicates import Seen
from regpt.data.request import Request
from regpt.data.shards import MANIFEST, SPLITS, TOKENIZER, dtype_for
from regpt.data.unfinished import JOURNAL, SHARDS, clear
from regpt.data.workers import FACTS, Tokenized, facts_path
from regpt.data.writer import SplitWriter
from regpt.train.durable import replace_file, sync_folder

SEEN = "seen.sqlite"
DOWNLOADS = "downloads"


COUNTS = ("parts", "bytes", "max_id", "duplicates", "file", "file_parts")
"""Of `Progress`, in the journal by these names."""


def stretches(values: NDArray[Any]) -> Iterator[slice]:
    """Stretches of equal values, in order."""
    cuts = (np.flatnonzero(values[1:] != values[:-1]) + 1).tolist()
    if len(values):
        yield from map(slice, [0, *cuts], [*cuts, len(values)])


class Progress:
    """What is written, and how to go on. Made by `resume` or `begin`."""

    def __init__(self, request: Request, work: Path) -> None:
        self.request, self.work = request, work
        itemsize = dtype_for(request.tokenizer.vocab_size).itemsize
        self.splits = {n: SplitWriter(work / SHARDS, n, itemsize, request.shard_tokens) for n in SPLITS}
        self.parts = self.bytes = self.max_id = self.duplicates = 0
        self.file = self.file_parts = 0
        """The file of the source that is being read, and how many of its parts are done."""
        self.skipped: Counter[str] = Counter()
        self.seen: Seen | None = None

    @classmethod
    def begin(cls, request: Request, work: Path) -> Progress:
        """Nothing written yet; whatever another request left here is removed."""
        clear(work)
        (work / SHARDS / TOKENIZER).mkdir(parents=True)
        request.tokenizer.save(work / SHARDS / TOKENIZER)
        progress = cls(request, work)
        progress.seen = Seen(work / SEEN)
        return progress

    @classmethod
    def resume(cls, request: Request, work: Path) -> Progress | None:
        """As the journal has it; None where there is none of this request."""
        progress = cls(request, work)
        try:
            journal = json.loads((work / JOURNAL).read_bytes())
            if journal["request"] != request.facts:
                return None
            for name in COUNTS:
                setattr(progress, name, int(journal[name]))
            progress.skipped = Counter(journal["skipped"])
            for name, writer in progress.splits.items():
                writer.restore(journal["splits"][name])
            progress.seen = Seen(work / SEEN, progress.parts)
        except (OSError, ValueError, KeyError, TypeError):
            progress.abandon()
            return None
        (work / SHARDS / MANIFEST).unlink(missing_ok=True)
        return progress

    def save(self) -> None:
        """Make everything so far durable, then say so in the journal."""
        assert self.seen is not None
        splits = {name: writer.note() for name, writer in self.splits.items()}
        sync_folder(self.work / SHARDS)
        self.seen.save(self.parts)
        counts = {name: getattr(self, name) for name in (*COUNTS, "skipped")}
        journal = {"request": self.request.facts, "splits": splits, **counts}
        replace_file(self.work / JOURNAL, json.dumps(journal).encode())

    @property
    def tokens(self) -> int:
        """Written so far."""
        return sum(writer.total.tokens for writer in self.splits.values())

    def take(self, split: str, part: Part, path: Path, result: Tokenized, threshold: int) -> None:
        """Append a tokenised part, whose ids lie at `path`, and delete that file."""
        assert self.seen is not None
        facts = np.fromfile(facts_path(path), FACTS)
        dropped = np.zeros(len(facts), dtype=bool)
        if part.fragment is None:
            repeated = self.seen.add(facts["hash"], self.parts)
            n_repeated = int(repeated.sum())
            self.duplicates += n_repeated
            if self.request.selection.dedup:
                dropped = repeated
                self.skipped["duplicate"] += n_repeated
        # Held out where every hash is below `threshold`, which may be 2**64 itself.
        held_out = (
            facts["hash"] <= np.uint64(threshold - 1) if threshold else np.zeros(len(facts), dtype=bool)
        )
        with open(path, "rb") as ids:
            for stretch in stretches(dropped * 2 + held_out):
                name = split if split != "hash" else "val" if held_out[stretch.start] else "train"
                some, writer = facts[stretch], self.splits[name]
                if dropped[stretch.start]:
                    ids.seek(int(some["tokens"].sum()) * writer.itemsize, os.SEEK_CUR)
                else:
                    whole = part.fragment != "middle"
                    writer.add(ids, some["tokens"], int(some["bytes"].sum()), whole=whole)
        for done in (path, facts_path(path)):
            os.unlink(done)
        self.skipped.update(result.skipped)
        self.max_id = max(self.max_id, result.max_id)
        self.bytes += part.stored_bytes
        self.parts += 1
        self.file_parts = self.file_parts + 1 if part.file == self.file else 1
        self.file = part.file

    def abandon(self) -> None:
        """Close the files as they are."""
        for writer in self.splits.values():
            writer.abandon()
        if self.seen is not None:
            self.seen.close()
