"""Text to shards, and shards to batches: peers and regpt in turn, in one run.

    python benchmarks/data.py prepare --text FILES… --tokenizer-files DIR [--nanogpt CLONE] [--megabytes 50] [--rounds 3]
        [--path DIR …] [--json FILE]
    python benchmarks/data.py batches [--gigabytes 10] [--rounds 5] [--folder DIR]

prepare: FILES are JSON lines (.xz too) with a field `text`; cut at blank lines into documents of 3,000 characters or a
little more, about as long as a page of the web. Each figure is of a process of its own, from its start to its end, start-up,
reading, queues and writing included; only bare tiktoken is timed inside, on documents that are in memory already, and writes
nothing. Rounds follow one another; ratios are of a round's own pair, medians are shown. Memory is that of all processes
together at its highest, as often as it was looked at.

regpt             `regpt prepare --tokenizer gpt2`, tiktoken inside
regpt fast        the same with the faster back end, where one is installed (`pip install regpt[fast]`)
nanogpt           data/openwebtext/prepare.py of CLONE (github.com/karpathy/nanoGPT), run as it is but for the source, the
                  number of processes (as many as cores) and the share held out (a tenth: it cuts each split in 1,024 pieces)
tiktoken x1, xN   encode_ordinary over the documents, in one process and in as many as there are cores
tokenizers        Hugging Face's encode_batch over the documents in its own threads, ids written to one file

batches: 64 rows of 1,024 ids and their targets, out of one file of random ids of the size asked for, which is read once
before so that it lies in the page cache; each figure is the mean of a process of its own, processes take turns.

nanogpt           what its get_batch does: open the file anew, draw, copy each row, stack
regpt             `Loader.batch`, permuted windows, over the same file as shards of 100 million ids; memory as a run keeps it
gather            one fancy index into the file; view: one into all its windows (`sliding_window_view`); neither is random
                  without replacement, or knows of shards; a lower bound of what NumPy can do

--path adds a folder of packages for the peers alone, as `pip install --target DIR datasets` makes it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import lzma
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

DOCUMENT_CHARS = 3000
NANOGPT_CHANGES = {  # what stands in its prepare.py, and what it takes here
    'load_dataset("openwebtext", num_proc=num_proc_load_dataset)': 'load_dataset("json", data_files={"train": [SOURCE]})',
    "num_proc = 8": "num_proc = CORES",
    "test_size=0.0005": "test_size=0.1",
}
LOOK_S = 0.05


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def documents(files: Sequence[Path], most_bytes: int) -> Iterator[str]:
    """The text of the files in documents of DOCUMENT_CHARS, cut at blank lines."""
    size = 0
    for path in files:
        with (lzma.open if path.suffix == ".xz" else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                held = ""
                for paragraph in json.loads(line)["text"].split("\n\n"):
                    held += paragraph + "\n\n"
                    if len(held) >= DOCUMENT_CHARS:
                        yield held
                        size += len(held.encode())
                        held = ""
                        if size >= most_bytes:
                            return


# --- in a process of its own ------------------------------------------------------------------------------------------


def gpt2_encoding() -> Any:
    """tiktoken's own gpt2, from the published files, which lie in its cache."""
    import tiktoken

    return tiktoken.get_encoding("gpt2")


def bare_tiktoken(path: str, processes: int) -> dict[str, float]:
    """Bytes a second of encode_ordinary, documents in memory."""
    import multiprocessing

    with open(path, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    size = sum(len(t.encode()) for t in texts)
    shares = [texts[i::processes] for i in range(processes)]
    context = multiprocessing.get_context("fork")
    ready, results = context.Barrier(processes + 1), context.SimpleQueue()

    def work(share: list[str]) -> None:
        encode = gpt2_encoding().encode_ordinary
        encode("warm up")
        ready.wait()
        results.put(sum(len(encode(t)) for t in share))

    workers = [context.Process(target=work, args=(share,)) for share in shares]
    for worker in workers:
        worker.start()
    ready.wait()
    began = time.perf_counter()
    tokens = sum(results.get() for _ in workers)
    took = time.perf_counter() - began
    for worker in workers:
        worker.join()
    return {"bytes_per_second": size / took, "tokens": tokens}


def hf_tokenizers(path: str, files: str, out: str) -> dict[str, float]:
    """encode_batch of the same vocabulary, by its own threads."""
    import numpy as np

    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer(f"{files}/encoder.json", f"{files}/vocab.bpe")
    eot, tokens = [50256], 0
    with open(path, encoding="utf-8") as lines, open(out, "wb") as written:
        while batch := [json.loads(line)["text"] for line in itertools.islice(lines, 1000)]:
            for encoded in tokenizer.encode_batch(batch):
                ids = np.array(encoded.ids + eot, dtype=np.uint16)
                written.write(ids.tobytes())
                tokens += len(ids)
    return {"tokens": tokens}


def child(job: dict[str, Any]) -> None:
    """Do the job; the last line of output is what was found."""
    kind = job["kind"]
    if kind == "batches":
        print(json.dumps({"batch_s": batch_seconds(job["peer"], job["path"])}))
    elif kind == "tiktoken":
        print(json.dumps(bare_tiktoken(job["path"], job["processes"])))
    else:
        print(json.dumps(hf_tokenizers(job["path"], job["files"], job["out"])))


ROWS, BLOCK, SHARD_TOKENS, BATCHES = 64, 1024, 100_000_000, 1000


def drawer(peer: str, path: str) -> Any:
    """A function that makes the next batch: x, y (64, 1024) int64 tensors."""
    import numpy as np
    import torch

    chance = np.random.default_rng(0)

    def nanogpt() -> Any:
        data = np.memmap(path, dtype=np.uint16, mode="r")
        starts = torch.randint(len(data) - BLOCK, (ROWS,))
        x = torch.stack([torch.from_numpy(data[i : i + BLOCK].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + BLOCK].astype(np.int64)) for i in starts])
        return x, y

    ids = np.memmap(path, dtype=np.uint16, mode="r")
    windows = np.lib.stride_tricks.sliding_window_view(ids, BLOCK + 1)
    offsets = np.arange(BLOCK + 1)

    def targets(rows: Any) -> Any:
        rows = torch.from_numpy(rows.astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def gather() -> Any:
        return targets(ids[chance.integers(len(ids) - BLOCK, size=ROWS)[:, None] + offsets])

    def view() -> Any:
        return targets(windows[chance.integers(len(ids) - BLOCK, size=ROWS)])

    if peer != "regpt":
        return {"nanogpt": nanogpt, "gather": gather, "view": view}[peer]
    from regpt.data.loader import Loader
    from regpt.data.split import IdsFile, TokenSplit
    from regpt.train.allocator import keep_memory

    keep_memory()
    starts = range(0, len(ids), SHARD_TOKENS)
    files = [IdsFile(Path(path), 2 * at, min(SHARD_TOKENS, len(ids) - at), ids.dtype) for at in starts]
    split = TokenSplit("train", files, document_ends=lambda: np.empty(0, np.int64), source_bytes=lambda: 0)
    loader, step = Loader(split, block_size=BLOCK, batch_rows=ROWS, seed=1), itertools.count()
    return lambda: loader.batch(next(step))


def batch_seconds(peer: str, path: str) -> float:
    """Mean over BATCHES, after a tenth of them: what some batches do for those that follow counts."""
    draw, times = drawer(peer, path), []
    for _ in range(BATCHES + BATCHES // 10):
        began = time.perf_counter()
        draw()
        times.append(time.perf_counter() - began)
    return statistics.mean(times[BATCHES // 10 :])


# --- batches ----------------------------------------------------------------------------------------------------------


def batches_table(args: argparse.Namespace) -> str:
    """Measure; the table."""
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="regpt-bench-", dir=args.folder) as name:
        path, chance = Path(name) / "train.bin", np.random.default_rng(0)
        left = int(args.gigabytes * 1e9) // 2
        with open(path, "wb") as file:
            while left:
                n = min(left, 1 << 26)
                file.write(chance.integers(50257, size=n, dtype=np.uint16).data)
                left -= n
        found: dict[str, list[float]] = {}
        for round_ in range(args.rounds):
            for peer in ("nanogpt", "regpt", "gather", "view"):
                with open(path, "rb") as file:  # into the page cache, should it have left it
                    while file.read(1 << 26):
                        pass
                job = json.dumps({"kind": "batches", "peer": peer, "path": str(path)})
                words = [sys.executable, str(Path(__file__).resolve()), "--child", job]
                env = os.environ | {"OMP_NUM_THREADS": "1"}
                said = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
                found.setdefault(peer, []).append(json.loads(said)["batch_s"])
                print(f"round {round_ + 1} {peer}: {found[peer][-1]}", file=sys.stderr, flush=True)
    lines = [
        f"{ROWS} x {BLOCK} out of {args.gigabytes:g} GB",
        "",
        "| | us a batch | nanoGPT's time over it |",
        "| --- | --- | --- |",
    ]
    for peer, times in found.items():
        ratio = statistics.median(a / b for a, b in zip(found["nanogpt"], times, strict=True))
        lines.append(f"| {peer} | {1e6 * statistics.median(times):,.0f} | {ratio:.1f} |")
    return "\n".join(lines)


# --- prepare ----------------------------------------------------------------------------------------------------------


def nanogpt_script(clone: Path, source: Path, folder: Path) -> Path:
    """Its prepare.py with NANOGPT_CHANGES, in `folder`, where it writes its files."""
    text = (clone / "data/openwebtext/prepare.py").read_text(encoding="utf-8")
    for theirs, changed in NANOGPT_CHANGES.items():
        if theirs not in text:
            raise SystemExit(f"{clone}: its prepare.py has no {theirs!r}; another version?")
        text = text.replace(
            theirs, changed.replace("SOURCE", repr(str(source))).replace("CORES", str(cores()))
        )
    path = folder / "prepare.py"
    path.write_text(text, encoding="utf-8")
    return path


def commands(args: argparse.Namespace, source: Path, folder: Path) -> dict[str, list[str]]:
    """The words of each peer's process."""
    me, files = str(Path(__file__).resolve()), str(args.tokenizer_files.resolve())
    words = ["-m", "regpt", "prepare", str(source), "--tokenizer", "gpt2", "--tokenizer-files", files]
    ours = [*words, "--val-fraction", "0.1", "--out", str(folder / "out"), "--json", "--quiet"]

    def job(**values: Any) -> list[str]:
        return [me, "--child", json.dumps({"path": str(source), **values})]

    found = {"regpt": ours}
    if args.fast:
        found["regpt fast"] = ours
    if args.nanogpt:
        found["nanogpt"] = [str(nanogpt_script(args.nanogpt, source, folder))]
    found["tiktoken x1"] = job(kind="tiktoken", processes=1)
    if cores() > 1:
        found[f"tiktoken x{cores()}"] = job(kind="tiktoken", processes=cores())
    found["tokenizers"] = job(kind="tokenizers", files=files, out=str(folder / "ids"))
    return found


def run(words: list[str], env: dict[str, str], folder: Path) -> dict[str, Any]:
    """What one process found, its time from start to end, and the memory of it and its children; or why it failed."""
    for left in ("out", "ids", "hf", "train.bin", "val.bin"):
        path = folder / left
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    with open(folder / "stdout", "w+") as out, open(folder / "stderr", "w+") as err:
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=out, stderr=err)
        memory = _Memory(process.pid)
        status = process.wait()
        took = time.perf_counter() - began
        memory.stop()
        out.seek(0), err.seek(0)
        lines, said = out.read().splitlines(), err.read().strip().splitlines()
    if status:
        return {"failed": said[-1] if said else f"exit status {status}"}
    found: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return {"seconds": took, "memory_bytes": memory.highest} | found


class _Memory:
    """Looks now and then at what a process and its children hold."""

    def __init__(self, pid: int) -> None:
        import psutil

        self.highest, self._done = 0, threading.Event()
        self._process, self._gone = psutil.Process(pid), psutil.Error
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(LOOK_S):
            held = 0
            try:
                for p in (self._process, *self._process.children(recursive=True)):
                    held += p.memory_info().rss
            except self._gone:
                continue
            self.highest = max(self.highest, held)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def environment(args: argparse.Namespace, name: str, folder: Path) -> dict[str, str]:
    """For one peer: offline, its caches in `folder`, the packages of --path."""
    env = os.environ | {
        "TIKTOKEN_CACHE_DIR": str(folder / "tiktoken"),
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if name.startswith("regpt"):
        env["REGPT_TOKENIZER_BACKEND"] = "gigatoken" if name == "regpt fast" else "tiktoken"
    if not name.startswith("regpt") and args.path:
        places = [str(Path(p).resolve()) for p in args.path]
        env["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [env.get("PYTHONPATH")])])
    return env


def keep_for_tiktoken(files: Path, folder: Path) -> None:
    """GPT-2's two files where tiktoken looks for them."""
    folder.mkdir()
    for name in ("encoder.json", "vocab.bpe"):
        url = f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
        key = hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
        shutil.copyfile(files / name, folder / key)


def prepare_table(args: argparse.Namespace) -> str:
    """Measure; the table."""
    with tempfile.TemporaryDirectory(prefix="regpt-bench-") as name:
        folder = Path(name)
        source = folder / "documents.jsonl"
        size = 0
        with open(source, "w", encoding="utf-8") as file:
            for text in documents(args.text, int(args.megabytes * 1e6)):
                file.write(json.dumps({"text": text}) + "\n")
                size += len(text.encode())
        keep_for_tiktoken(args.tokenizer_files, folder / "tiktoken")
        found: dict[str, list[dict[str, Any]]] = {}
        for round_ in range(args.rounds):
            for peer, words in commands(args, source, folder).items():
                result = run(words, environment(args, peer, folder), folder)
                if "failed" not in result:
                    result.setdefault("bytes_per_second", size / result["seconds"])
                found.setdefault(peer, []).append(result)
                print(f"round {round_ + 1} {peer}: {result}", file=sys.stderr, flush=True)
    if args.json:
        args.json.write_text(json.dumps(found))
    return table(found, size)


def table(found: dict[str, list[dict[str, Any]]], size: int) -> str:
    """Medians; ratios of a round's own pair."""
    bare = f"tiktoken x{cores()}"
    lines = [
        f"{size / 1e6:.1f} MB of text, {cores()} cores",
        "",
        f"| | MB/s | of nanoGPT's way | of {bare} | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]

    def ratio(rounds: list[dict[str, Any]], other: str) -> str:
        pairs = [
            p for p in zip(rounds, found.get(other, []), strict=False) if not any("failed" in r for r in p)
        ]
        ratios = [a["bytes_per_second"] / b["bytes_per_second"] for a, b in pairs]
        return f"{statistics.median(ratios):.2f}" if ratios else ""

    for peer, rounds in found.items():
        good = [r for r in rounds if "failed" not in r]
        if not good:
            lines.append(f"| {peer} | failed: {rounds[0]['failed'][:80]} | | | |")
            continue
        rate, memory = (statistics.median(r[k] for r in good) for k in ("bytes_per_second", "memory_bytes"))
        lines.append(
            f"| {peer} | {rate / 1e6:.1f} | {ratio(rounds, 'nanogpt')} | {ratio(rounds, bare)} | {memory / 2**20:,.0f} MiB |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--child"]:
        return child(json.loads(words[1]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    p = kinds.add_parser("prepare")
    p.add_argument("--text", type=Path, nargs="+", required=True)
    p.add_argument("--tokenizer-files", type=Path, required=True)
    p.add_argument("--nanogpt", type=Path)
    p.add_argument("--megabytes", type=float, default=50)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--fast", action="store_true", help="also with the faster back end")
    p.add_argument("--path", action="append", default=[], help="a folder of packages for the peers")
    p.add_argument("--json", type=Path, help="a file for every figure")
    b = kinds.add_parser("batches")
    b.add_argument("--gigabytes", type=float, default=10)
    b.add_argument("--rounds", type=int, default=5)
    b.add_argument(
        "--folder", help="where the file of ids is put for the time; None: the system's temporary folder"
    )
    args = parser.parse_args(words)
    print(prepare_table(args) if args.kind == "prepare" else batches_table(args))


if __name__ == "__main__":
    main()
