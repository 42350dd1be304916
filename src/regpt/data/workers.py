"""Parts of a source to ids on disk: in this process, or in several, in an order that does not depend on how many.

The processes are started afresh and told what to do in lines of JSON. So they work alike on every system, need no
`if __name__ == "__main__"` in the caller's script, and end when this process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import xxhash
from numpy.typing import NDArray

import regpt.errors
from regpt.data.documents import Document, Part, documents
from regpt.data.shards import dtype_for
from regpt.errors import DataError, DeviceError, RegptError
from regpt.tokenizers import Tokenizer, load_tokenizer

HASH_SEED = 0x5EED
BATCH_IDS = 1 << 16  # ids are checked and written so many at a time
WAIT_S = 0.5
MANY_WORKERS = 5  # from so many on, the process that feeds them and writes what they give does nothing else
# Ctrl-C reaches every process of a terminal; the one that was called decides.
START = """import json, signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path[:] = json.loads(sys.argv[1])
from regpt.data.workers import serve
serve(sys.argv[2])
"""


@dataclass(frozen=True)
class Tokenized:
    """What became of a part, beside two files: its ids, one document after the other, and `FACTS` of each document."""

    max_id: int
    skipped: dict[str, int]


FACTS = np.dtype([("tokens", "<u8"), ("bytes", "<u8"), ("hash", "<u8")])
"""Of a document: its ids, `<|endoftext|>` included; its text as UTF-8; xxh3_64 of that, which decides its split."""


def facts_path(path: Path) -> Path:
    """Where the facts lie that belong to the ids at `path`."""
    return path.with_name(f"{path.name}.facts")


def document_hash(document: Document) -> int | None:
    """xxh3_64 of the document's text as UTF-8; None where `tokenize` would skip it."""
    digest, blank = xxhash.xxh3_64(seed=HASH_SEED), True
    try:
        for piece in document():
            digest.update(piece.encode())
            blank = blank and (not piece or piece.isspace())
    except UnicodeError:
        return None
    return None if blank else digest.intdigest()


class _Stopped(Exception):
    """Nobody waits for the part any more."""


def tokenize(
    part: Part, tokenizer: Tokenizer, path: Path, stopped: Callable[[], bool] = lambda: False
) -> Tokenized:
    """Write the ids of the part's documents to `path`, each document ended by `<|endoftext|>`; facts beside them.

    Args:
        stopped: asked between pieces of text; once it says yes, this ends with an exception of its own.

    Raises:
        DataError: the text is damaged, or the tokenizer cannot encode it, or gives ids outside its vocabulary.
    """
    skipped: Counter[str] = Counter()
    facts = array("Q")
    eot = np.array([tokenizer.eot_id], dtype=np.uint32)
    with open(path, "wb") as file:
        ids = _Ids(file, tokenizer)
        for document in documents(part, skipped):
            begun, size = ids.total, 0
            digest, blank = xxhash.xxh3_64(seed=HASH_SEED), part.fragment is None
            try:
                for piece in document():
                    if stopped():
                        raise _Stopped
                    raw = piece.encode()
                    digest.update(raw)
                    size += len(raw)
                    blank = blank and (not piece or piece.isspace())
                    ids.add(_encode(tokenizer, piece, part))
            except UnicodeError:
                skipped["invalid UTF-8"] += 1
                ids.take_back(begun)
                continue
            if blank:
                skipped["empty"] += 1
                ids.take_back(begun)
                continue
            if part.fragment != "middle":
                ids.add(eot)
            facts.extend((ids.total - begun, size, digest.intdigest()))
        ids.flush()
    np.frombuffer(facts, FACTS).tofile(facts_path(path))
    if part.temporary:
        os.unlink(part.path)
    return Tokenized(ids.max_id, {k: n for k, n in skipped.items() if n})


def _encode(tokenizer: Tokenizer, piece: str, part: Part) -> NDArray[np.uint32]:
    try:
        return tokenizer.encode_array(piece)
    except DataError as e:
        raise DataError(f"{part.label}: {e.what}", got=e.got, expected=e.expected, hint=e.hint) from None


class _Ids:
    """Ids on their way into a file, checked."""

    def __init__(self, file: BinaryIO, tokenizer: Tokenizer) -> None:
        self.file, self.tokenizer = file, tokenizer
        self.dtype = dtype_for(tokenizer.vocab_size)
        self.held: list[NDArray[np.uint32]] = []
        self.n_held = 0
        self.written = 0
        self.max_id = 0

    @property
    def total(self) -> int:
        return self.written + self.n_held

    def add(self, ids: NDArray[np.uint32]) -> None:
        self.held.append(ids)
        self.n_held += len(ids)
        if self.n_held >= BATCH_IDS:
            self.flush()

    def flush(self) -> None:
        if not self.n_held:
            return
        ids = np.concatenate(self.held)
        high, size = int(ids.max()), self.tokenizer.vocab_size
        if high >= size:  # astype would wrap such an id into another one without a word
            raise DataError(
                f"the {self.tokenizer.kind} tokenizer gave the id {high}.",
                expected=f"ids from 0 to {size - 1}: its vocabulary has {size} entries",
            )
        self.max_id = max(self.max_id, high)
        self.file.write(ids.astype(self.dtype).data)
        self.written += len(ids)
        self.held.clear()
        self.n_held = 0

    def take_back(self, total: int) -> None:
        """Forget the ids behind the first `total`."""
        if total < self.written:
            self.file.seek(total * self.dtype.itemsize)
            self.file.truncate()
            self.written = total
        kept = np.concatenate([*self.held, np.empty(0, np.uint32)])[: total - self.written]
        self.held, self.n_held = [kept], len(kept)


# --- several processes ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def tokenizing(
    workers: int, tokenizer: Tokenizer, folder: Path, work: Path, tick: Callable[[], None]
) -> Iterator[Callable[[Iterable[Part]], Iterator[tuple[Part, Path, Tokenized]]]]:
    """A function that tokenises parts and gives them back in their order, with the files of their ids.

    Args:
        folder: where `tokenizer` is saved, for the other processes.
        work: where files of ids are put; whoever takes one deletes it.
        tick: called while waiting; may raise to stop.
    """
    if workers == 1:
        path = work / "ids"
        yield lambda parts: ((part, path, tokenize(part, tokenizer, path)) for part in parts)
        return
    pool = _Pool(workers, folder, tokenizer)
    try:
        yield lambda parts: pool.ordered(parts, work, tick)
    finally:
        pool.close()


class _Pool:
    """Processes, each fed by a thread of ours; of few, this one is the first, and is at work while the others start."""

    def __init__(self, workers: int, folder: Path, tokenizer: Tokenizer) -> None:
        command = [sys.executable, "-c", START, json.dumps(sys.path), str(folder)]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }  # numpy's, not needed
        self.n_workers, self.tokenizer = workers, tokenizer
        self.threads = ThreadPoolExecutor(workers)
        self.stopped = threading.Event()
        self.workers: list[subprocess.Popen[str]] = []
        self.idle: queue.SimpleQueue[subprocess.Popen[str] | None] = queue.SimpleQueue()  # None: this process
        works_here = workers < MANY_WORKERS
        if works_here:
            self.idle.put(None)
        for _ in range(workers - works_here):
            pipe = subprocess.PIPE
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", env=environment)
            self.workers.append(process)
            self.idle.put(process)

    def ordered(
        self, parts: Iterable[Part], work: Path, tick: Callable[[], None]
    ) -> Iterator[tuple[Part, Path, Tokenized]]:
        """Results in the order of `parts`, with a bounded number of parts under way."""
        waiting: deque[tuple[Part, Path, Future[Tokenized]]] = deque()
        for number, part in enumerate(parts):
            path = work / f"ids-{number}"
            waiting.append((part, path, self.threads.submit(self._ask, part, path)))
            if len(waiting) > 2 * self.n_workers:
                yield self._next(waiting, tick)
        while waiting:
            yield self._next(waiting, tick)

    def _next(
        self, waiting: deque[tuple[Part, Path, Future[Tokenized]]], tick: Callable[[], None]
    ) -> tuple[Part, Path, Tokenized]:
        part, path, future = waiting.popleft()
        while wait([future], WAIT_S).not_done:
            tick()
        return part, path, future.result()

    def _ask(self, part: Part, path: Path) -> Tokenized:
        worker = self.idle.get()
        if worker is None:
            try:
                return tokenize(part, self.tokenizer, path, self.stopped.is_set)
            finally:
                self.idle.put(None)
        assert worker.stdin and worker.stdout
        try:
            worker.stdin.write(json.dumps([dataclasses.asdict(part), str(path)]) + "\n")
            worker.stdin.flush()
            line = worker.stdout.readline()
        except OSError:
            line = ""
        finally:
            self.idle.put(worker)
        if not line:
            raise DeviceError(
                f"a tokenising process ended with exit status {worker.wait()} at {part.label}.",
                hint="fewer --workers, if memory is short",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise _error(answer["error"])
        return Tokenized(**answer)

    def close(self) -> None:
        """End the processes now, and our own work at the next piece."""
        self.stopped.set()
        for worker in self.workers:
            worker.kill()
        self.threads.shutdown(cancel_futures=True)
        for worker in self.workers:
            worker.communicate()


def serve(folder: str) -> None:
    """The life of a tokenising process: a line in, a line out, until there are no more lines."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what any library prints must not stand among the answers
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    tokenizer: Tokenizer | None = None
    while True:
        part, path = json.loads(requests.get())
        try:
            tokenizer = tokenizer or load_tokenizer(Path(folder))
            _answer(answers, dataclasses.asdict(tokenize(Part(**part), tokenizer, Path(path))))
        except Exception as e:
            _answer(answers, {"error": _as_dict(e)})


def _listen(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the process that asks is gone, so nobody waits for what is under way


def _answer(answers: TextIO, value: dict[str, Any]) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()


def _as_dict(e: Exception) -> dict[str, Any]:
    if isinstance(e, RegptError):
        said = {k: None if v is None else str(v) for k, v in (("got", e.got), ("expected", e.expected))}
        return {"kind": type(e).__name__, "what": e.what, "hint": e.hint, **said}
    if isinstance(e, OSError):
        return {"kind": "OSError", "args": [e.errno, e.strerror, e.filename]}
    return {"kind": "fault", "trace": traceback.format_exc()}


def _error(value: dict[str, Any]) -> Exception:
    kind = value.pop("kind")
    if kind == "OSError":
        return OSError(*value["args"])
    if kind == "fault":
        return RuntimeError(f"in a tokenising process:\n{value['trace']}")
    made: RegptError = getattr(regpt.errors, kind)(**value)
    return made
