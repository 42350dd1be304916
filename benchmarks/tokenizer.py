"""Tokenizers of peers and of regpt, in turn, in one run: learning merges and encoding a corpus, time and memory.

    python benchmarks/tokenizer.py --text 'books/*.jsonl.xz' [--bytes 100000000] [--vocab-size 32768] [--rounds 3]
        [--gpt2-files FOLDER] [--minbpe CLONE] [--path DIR …] [--only NAME,…] [--json FILE]

Each figure is of a process of its own; processes follow one another in turn, as often as --rounds says, and medians are shown:
seconds of wall time and of processors, with reading the text, without starting Python; the process's greatest memory. The
text is the first --bytes of what `open_source` takes, written as JSON lines first, which all read alike.

learning  regpt as `regpt tokenizer train` learns and saves, with either library; tokenizers, rustbpe and bpeasy as their
          documents show it, GPT-2's split; gigatoken's `train_bpe` from the file; minbpe (--minbpe: a clone of
          github.com/karpathy/minbpe) 512 entries of the first megabyte
encoding  GPT-2's ids (--gpt2-files: a folder with encoder.json and vocab.bpe) as an array, a document's pieces of 64K
          characters one by one: regpt's `encode_array` with either back end, tiktoken's `encode_ordinary`, gigatoken's `encode`

Peers that are not installed are left out with a word. --path adds a folder of packages, as `pip install --target DIR` makes it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MINBPE_BYTES, MINBPE_ENTRIES = 1_000_000, 512
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PUBLISHED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # by tiktoken


# --- what is measured; each in a process of its own ------------------------------------------------------------------


def texts(path: Path) -> Iterator[str]:
    """The documents."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def learn_regpt(path: Path, o: argparse.Namespace, library: str) -> int:
    """As the command does it, with progress heard."""
    from regpt.data.corpus import TrainingText
    from regpt.data.sources import open_source
    from regpt.tokenizers.bpe import train_bpe

    text = TrainingText([open_source(str(path))])
    made = train_bpe(text, o.vocab_size, learn_with=library, progress=lambda characters: None)
    made.save(path.parent / "saved")
    return made.vocab_size


def learn_tokenizers(path: Path, o: argparse.Namespace) -> int:
    """Its quick tour, with ByteLevel."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=o.vocab_size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts(path), trainer)
    return made.get_vocab_size()


def learn_rustbpe(path: Path, o: argparse.Namespace) -> int:
    """Its README, with GPT-2's split."""
    import rustbpe

    made = rustbpe.Tokenizer()
    made.train_from_iterator(texts(path), o.vocab_size, pattern=SPLIT)
    return int(made.vocab_size)


def learn_bpeasy(path: Path, o: argparse.Namespace) -> int:
    """Its README, tokens of up to 128 bytes."""
    import bpeasy

    return len(bpeasy.train_bpe_stream(texts(path), SPLIT, 128, o.vocab_size, 1000))


def learn_gigatoken(path: Path, o: argparse.Namespace) -> int:
    """From the file itself: it takes no stream and no other split."""
    import gigatoken

    return len(gigatoken.train_bpe(gigatoken.JsonlFileSource([str(path)]), o.vocab_size, [])[0])


def learn_minbpe(path: Path, o: argparse.Namespace) -> int:
    """A small task: it is meant to be read."""
    sys.path.insert(0, str(o.minbpe))
    made = importlib.import_module("minbpe").RegexTokenizer(PUBLISHED)
    made.train("".join(texts(path))[:MINBPE_BYTES], MINBPE_ENTRIES)
    return len(made.vocab)


def encode_regpt(path: Path, o: argparse.Namespace, backend: str) -> int:
    """Ids of every document."""
    os.environ["REGPT_TOKENIZER_BACKEND"] = backend
    from regpt.tokenizers import open_tokenizer

    tokenizer = open_tokenizer("gpt2", files=o.gpt2_files)
    return sum(len(tokenizer.encode_array(text)) for text in texts(path))


def encode_tiktoken(path: Path, o: argparse.Namespace) -> int:
    """As published, ids to an array."""
    import numpy as np
    import tiktoken

    from regpt.tokenizers.byte_pairs import BytePairTokenizer
    from regpt.tokenizers.pieces import pieces

    ours: Any = _gpt2(o)
    assert isinstance(ours, BytePairTokenizer)
    ranks = {token: rank for rank, token in enumerate(ours._tokens)}
    theirs = tiktoken.Encoding("gpt2", pat_str=PUBLISHED, mergeable_ranks=ranks, special_tokens={})
    return sum(
        len(np.array(theirs.encode_ordinary(p), dtype=np.uint32))
        for text in texts(path)
        for p in pieces(text)
    )


def encode_gigatoken(path: Path, o: argparse.Namespace) -> int:
    """Whole documents, none compared."""
    from gigatoken.gigatoken_rs import load_hf_json

    from regpt.tokenizers.exchange import gigatoken_json

    engine = load_hf_json(gigatoken_json(_gpt2(o).merges, "gpt2"))
    return sum(len(engine.encode(text)) for text in texts(path))


def _gpt2(o: argparse.Namespace) -> Any:
    from regpt.tokenizers import open_tokenizer

    return open_tokenizer("gpt2", files=o.gpt2_files)


WORK: dict[str, Callable[[Path, argparse.Namespace], int]] = {
    "learning: regpt with rustbpe": lambda path, o: learn_regpt(path, o, "rustbpe"),
    "learning: regpt with tokenizers": lambda path, o: learn_regpt(path, o, "tokenizers"),
    "learning: rustbpe": learn_rustbpe,
    "learning: tokenizers": learn_tokenizers,
    "learning: bpeasy": learn_bpeasy,
    "learning: gigatoken": learn_gigatoken,
    "learning 512 of 1 MB: minbpe": learn_minbpe,
    "encoding: regpt with gigatoken": lambda path, o: encode_regpt(path, o, "gigatoken"),
    "encoding: regpt with tiktoken": lambda path, o: encode_regpt(path, o, "tiktoken"),
    "encoding: tiktoken": encode_tiktoken,
    "encoding: gigatoken": encode_gigatoken,
}


# --- in turn ---------------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--text", required=True)
    parser.add_argument("--bytes", type=int, default=100_000_000)
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpt2-files")
    parser.add_argument("--minbpe", type=Path)
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process measures
    o = parser.parse_args(argv)
    if o.one is not None:
        print(json.dumps(measured(o.one, o)))
        return
    names = [n for n in WORK if any(part in n for part in o.only.split(","))]
    if o.minbpe is None and "learning 512 of 1 MB: minbpe" in names:
        names.remove("learning 512 of 1 MB: minbpe")
        print("minbpe left out: --minbpe names no clone")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        size = write_text(o, path)
        rows = in_turn(names, path, o)
    print(f"\n{size / 1e6:,.1f} MB, {o.vocab_size:,} entries, {os.cpu_count()} cores, {o.rounds} rounds")
    print(table(rows, size))
    if o.json:
        o.json.write_text(json.dumps({"bytes": size, "rows": rows}, indent=1))


def write_text(o: argparse.Namespace, path: Path) -> int:
    """The first bytes of the sources, as JSON lines; returns how many there are."""
    from regpt.data.corpus import TrainingText
    from regpt.data.sources import open_source

    size = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in TrainingText([open_source(o.text)]):
            text = text.encode()[: o.bytes - size].decode(errors="ignore")
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if size + 3 >= o.bytes:
                break
    return size


def in_turn(names: list[str], path: Path, o: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Each work's figures of every round; a work that fails is left out with its own words."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(o.rounds):
        for name in list(rows):
            words = ["--text", str(path), "--vocab-size", str(o.vocab_size), "--one", name]
            words += ["--gpt2-files", o.gpt2_files] if o.gpt2_files else []
            words += ["--minbpe", str(o.minbpe)] if o.minbpe else []
            paths = os.pathsep.join([*o.path, os.environ.get("PYTHONPATH", "")])
            done = subprocess.run(
                [sys.executable, __file__, *words],
                capture_output=True,
                text=True,
                env={**os.environ, "PYTHONPATH": paths},
            )
            if done.returncode:
                print(f"{name} left out: {(done.stderr.strip().splitlines() or ['no word'])[-1]}")
                del rows[name]
            else:
                rows[name].append(json.loads(done.stdout.splitlines()[-1]))
                print(f"{name}: {rows[name][-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
    return rows


def measured(name: str, o: argparse.Namespace) -> dict[str, float]:
    """One work, here and now."""
    begun, cpu = time.monotonic(), time.process_time()
    result = WORK[name](Path(o.text), o)
    return {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "result": result,
    }


def table(rows: dict[str, list[dict[str, float]]], size: int) -> str:
    """Medians, in Markdown."""
    lines = [
        "| work | s | cores' s | MB/s | memory, MB | entries or ids |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, figures in rows.items():
        s, cpu, memory = (
            statistics.median(f[key] for f in figures) for key in ("seconds", "cpu_seconds", "memory_bytes")
        )
        here = MINBPE_BYTES if "minbpe" in name else size
        lines.append(
            f"| {name} | {s:.2f} | {cpu:.2f} | {here / 1e6 / s:.1f} | {memory / 1e6:,.0f} | {figures[0]['result']:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
