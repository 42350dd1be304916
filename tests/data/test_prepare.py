"""prepare: the right ids in the right order and split, the same bytes however it was run, and never half a folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from regpt.data import documents, sources, workers, writer
from regpt.data import prepare as module
from regpt.data.prepare import prepare, training_texts, unusual_split
from regpt.data.shards import Manifest, Shards
from regpt.data.sources import open_source
from regpt.errors import ConfigError, DataError, DeviceError
from regpt.tokenizers import Tokenizer, open_tokenizer
from regpt.tokenizers.chars import train_chars


@pytest.fixture
def tokenizer() -> Tokenizer:
    return open_tokenizer("bytes")


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def make_texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["alpha", "Bête", "漢字", "x1", "don't", "e.g.", "\n", "😀", "of", "the"]
    return [f"{i} " + " ".join(rng.choices(words, k=rng.randint(1, 300))) for i in range(n)]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(out: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The documents of a split, through ids and back."""
    ids = Shards.open(out).split(split)
    ends = ids.document_ends.tolist()
    found = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        *text, last = ids.read(start, end - start).tolist()
        assert last == tokenizer.eot_id and last not in text
        found.append(tokenizer.decode(text))
    return found


# --- the right ids ----------------------------------------------------------------------------------------------------


def test_tiny_shakespeare_has_nanogpts_counts(test_data, tmp_path) -> None:
    """301,966 / 36,059 GPT-2 tokens and 1,003,854 / 111,540 characters, each and one delimiter; and tiktoken's very ids."""
    path = test_data / "small/tinyshakespeare.txt"
    text = path.read_text(encoding="utf-8")
    source = open_source(str(path))
    gpt2 = open_tokenizer("gpt2", files=str(test_data / "tokenizer"))
    chars = train_chars([text])
    for tokenizer, counts in ((gpt2, (301_966, 36_059)), (chars, (1_003_854, 111_540))):
        out = tmp_path / tokenizer.kind
        manifest = prepare(source, tokenizer, out, val_fraction=0.1)
        for name, count, part in zip(
            ("train", "val"), counts, (text[:1_003_854], text[1_003_854:]), strict=True
        ):
            split = Shards.open(out).split(name)
            assert (
                split.n_tokens == count + 1
                and split.n_documents == 1
                and split.source_bytes == len(part.encode())
            )
            assert split.read(0, count).tolist() == tokenizer.encode(part)
            assert split.read(count, 1).tolist() == [tokenizer.eot_id]
        list(Shards.open(out).verify())
        assert manifest == Manifest.read(out)


@pytest.mark.parametrize("shard_tokens", [7, 997, 100_000_000])
def test_documents_come_out_as_they_went_in(tmp_path, monkeypatch, tokenizer, shard_tokens) -> None:
    """In order, each with its end, across files of any size; facts and statistics as counted otherwise."""
    monkeypatch.setattr(sources, "PART_BYTES", 1500)
    texts = [t[:30] for t in make_texts(20)] if shard_tokens == 7 else make_texts(60)
    source = open_source(write_jsonl(tmp_path / "ä b.jsonl", texts))
    manifest = prepare(
        source, tokenizer, tmp_path / "a b/ö", val_fraction=0.3, workers=1, shard_tokens=shard_tokens
    )
    out = tmp_path / "a b" / "ö"
    train, val = texts_of(out, "train", tokenizer), texts_of(out, "val", tokenizer)
    assert 4 <= len(val) <= 30 and sorted(train + val) == sorted(texts)
    assert train == [t for t in texts if t in train] and val == [t for t in texts if t in val]
    assert all(
        f.tokens == shard_tokens
        for f in manifest.files[:-1]
        if f.name not in ("val-00000.bin", last_of(manifest))
    )
    facts = manifest.splits["train"]
    assert facts.documents == len(train) and facts.source_bytes == sum(len(t.encode()) for t in train)
    assert (
        facts.tokens == facts.source_bytes + len(train)
        and facts.longest == max(len(t.encode()) for t in train) + 1
    )
    assert manifest.max_id == tokenizer.eot_id and manifest.dtype == "uint16" and manifest.eot == "appended"
    list(Shards.open(out).verify())


def last_of(manifest: Manifest) -> str:
    return [f.name for f in manifest.files if f.split == "train"][-1]


def test_a_raw_shard_is_a_nanogpt_bin(tmp_path, tokenizer) -> None:
    """np.memmap(…, dtype=np.uint16), as nanoGPT reads it."""
    (tmp_path / "a.txt").write_text("hello")
    prepare(open_source(str(tmp_path / "a.txt")), tokenizer, tmp_path / "out", val_fraction=0)
    data = np.memmap(tmp_path / "out/train-00000.bin", dtype=np.uint16, mode="r")
    assert data.tolist() == [*b"hello", 256]


def test_large_vocabularies_get_uint32(tmp_path, monkeypatch, tokenizer) -> None:
    """Ids above 65,535 arrive whole."""
    big = SimpleNamespace(
        kind="big", vocab_size=70_000, eot_id=69_999, fingerprint="f", save=lambda folder: None
    )
    big.encode_array = lambda text: np.array([65_536 + ord(c) % 1000 for c in text], np.uint32)
    (tmp_path / "a.txt").write_text("abc")
    manifest = prepare(open_source(str(tmp_path / "a.txt")), big, tmp_path / "out", val_fraction=0)
    assert manifest.dtype == "uint32" and manifest.max_id == 69_999
    assert Shards.open(tmp_path / "out").split("train").read(0, 4).tolist() == [
        65_633,
        65_634,
        65_635,
        69_999,
    ]


@pytest.mark.parametrize("bad, vocab_size", [(2**32 - 1, 257), (257, 257), (65_536, 65_536), (70_000, 257)])
def test_ids_outside_the_vocabulary_are_refused(tmp_path, bad, vocab_size) -> None:
    """Never wrapped into another id; nothing is left behind."""
    broken = SimpleNamespace(
        kind="broken", vocab_size=vocab_size, eot_id=256, fingerprint="f", save=lambda folder: None
    )
    broken.encode_array = lambda text: np.array([1, 2, bad], np.uint32)
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(
        DataError,
        match=rf"tokenizer gave the id {bad}.\n  expected: ids from 0 to {vocab_size - 1}",
    ):
        prepare(open_source(str(tmp_path / "a.txt")), broken, tmp_path / "out", val_fraction=0)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_text_that_the_tokenizer_cannot_encode_is_named(tmp_path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["aaa", "abc"])
    with pytest.raises(DataError, match=r"a.jsonl: the character 'b' .* is not among"):
        prepare(open_source(str(tmp_path / "a.jsonl")), train_chars(["a"]), tmp_path / "out", val_fraction=0)


# --- the right split --------------------------------------------------------------------------------------------------


def test_documents_stay_in_their_split_when_others_come(tmp_path, tokenizer) -> None:
    """Split by a hash of the text: about the share asked for, wherever the document stands."""
    texts = make_texts(400)
    held_out = []
    for number, some in enumerate((texts[:200], texts[::-1])):
        out = tmp_path / str(number)
        prepare(open_source(write_jsonl(tmp_path / "a.jsonl", some)), tokenizer, out, val_fraction=0.2)
        held_out.append(set(texts_of(out, "val", tokenizer)))
    assert held_out[0] == held_out[1] & set(texts[:200])
    assert 50 < len(held_out[1]) < 115
    for name in ("0", "1"):
        shutil.rmtree(tmp_path / name)
    prepare(open_source(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "0", val_fraction=0.4)
    assert held_out[1] < set(
        texts_of(tmp_path / "0", "val", tokenizer)
    )  # a larger share holds out more, not others


@pytest.mark.parametrize("n", [2, 3, 7])
def test_few_documents_have_one_held_out(tmp_path, tokenizer, n) -> None:
    """Where no hash falls under the share, the document with the smallest: the same one each time."""
    for i in range(n):
        (tmp_path / f"{i}.txt").write_text(f"document {i}")
    source = open_source(str(tmp_path / "*.txt"))
    prepare(source, tokenizer, tmp_path / "out", val_fraction=1e-6)
    val = texts_of(tmp_path / "out", "val", tokenizer)
    assert len(val) == 1 and len(texts_of(tmp_path / "out", "train", tokenizer)) == n - 1
    assert list(training_texts(source, 1e-6)) == texts_of(tmp_path / "out", "train", tokenizer)


def test_a_split_that_would_be_empty_is_said_before_any_work(tmp_path, tokenizer) -> None:
    source = open_source(write_jsonl(tmp_path / "one.jsonl", ["only", " ", "\n"]))
    with pytest.raises(
        DataError,
        match=r"would hold out the only document or nothing.\n  try: --val-fraction 0",
    ):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0.1)
    source = open_source(write_jsonl(tmp_path / "two.jsonl", ["one", "two"]))
    with pytest.raises(DataError, match="would hold out every one of 2 documents"):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0.9999)
    (tmp_path / "short.txt").write_text("abc")
    with pytest.raises(DataError, match=r"short.txt: 3 characters cannot be split with val_fraction=0.9"):
        prepare(open_source(str(tmp_path / "short.txt")), tokenizer, tmp_path / "out", val_fraction=0.9)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"data.val_fraction must lie in \[0, 1\)"):
            prepare(source, tokenizer, tmp_path / "out", val_fraction=wrong)
    assert sorted(os.listdir(tmp_path)) == ["one.jsonl", "short.txt", "two.jsonl"]


def test_validation_text_of_its_own(tmp_path, tokenizer) -> None:
    """All of the source is for training then; without either there is no validation split."""
    train = open_source(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))
    (tmp_path / "v.txt").write_text("three")
    for val, texts in (
        (write_jsonl(tmp_path / "v.jsonl", ["x", "y"]), ["x", "y"]),
        (str(tmp_path / "v.txt"), ["three"]),
    ):
        out = tmp_path / f"out{len(texts)}"
        manifest = prepare(train, tokenizer, out, val_fraction=0.5, val_source=open_source(val))
        assert (
            texts_of(out, "train", tokenizer) == ["one", "two"] and texts_of(out, "val", tokenizer) == texts
        )
        assert manifest.val_source is not None and manifest.val_source.spec == val
    assert list(prepare(train, tokenizer, tmp_path / "none", val_fraction=0).splits) == ["train"]
    (tmp_path / "v.txt").write_text("")
    with pytest.raises(
        DataError, match=r"v.txt: there is no text for the val split.\n  got: skipped: 1 empty"
    ):
        prepare(
            train, tokenizer, tmp_path / "o", val_fraction=0, val_source=open_source(str(tmp_path / "v.txt"))
        )


def test_training_texts_are_the_training_split(tmp_path, monkeypatch, tokenizer) -> None:
    """What a tokenizer learns from: never the held-out part."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0.3)
    assert list(training_texts(source, 0.3)) == texts_of(tmp_path / "out", "train", tokenizer)
    assert list(training_texts(source, 0)) == make_texts(50)
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress(("é word" * 100).encode()))
    assert "".join(training_texts(open_source(str(tmp_path / "b.txt.xz")), 0.25)) == ("é word" * 100)[:450]


# --- what is not text -------------------------------------------------------------------------------------------------


def test_skipped_files_are_counted_with_their_reason(tmp_path, tokenizer) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("good")
    (folder / "b.txt").write_bytes(b"latin \xe4")
    (folder / "c.txt").write_text("")
    (folder / "d.txt").write_text(" \n\t")
    (folder / "e.bin").write_bytes(b"\x7fELF\0\0")
    (folder / ".f").write_text("hidden")
    manifest = prepare(open_source(str(folder)), tokenizer, tmp_path / "out", val_fraction=0)
    assert manifest.skipped == {"binary": 1, "empty": 2, "hidden": 1, "invalid UTF-8": 1}
    assert texts_of(tmp_path / "out", "train", tokenizer) == ["good"]


@pytest.mark.parametrize("surrogate", ["\\ud800", "a\\udfffb"])
def test_a_long_document_that_turns_out_invalid_is_taken_back(
    tmp_path, monkeypatch, tokenizer, surrogate
) -> None:
    """Also when most of it has been written."""
    monkeypatch.setattr(workers, "BATCH_IDS", 10)
    monkeypatch.setattr(documents, "PIECE_BYTES", 50)
    lines = [
        '{"text": "first one"}',
        '{"text": "' + "long text " * 100 + surrogate + '"}',
        '{"text": "last"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    manifest = prepare(open_source(str(tmp_path / "a.jsonl")), tokenizer, tmp_path / "out", val_fraction=0)
    assert manifest.skipped == {"invalid UTF-8": 1}
    assert texts_of(tmp_path / "out", "train", tokenizer) == ["first one", "last"]


def test_nothing_to_prepare_is_said(tmp_path, tokenizer) -> None:
    """With what was found instead of text."""
    cases = {
        "a.txt": (b"\xff\xfe", "a.txt is not valid UTF-8 at byte 0.\n  try: convert it"),
        "b.txt": (b"ok " * 500_000 + b"\xe4", "b.txt is not valid UTF-8 at byte 1500000."),
        "c.txt": (b"", "c.txt: there is no text for the train split.\n  got: skipped: 1 empty"),
        "d.txt": (b"\0\1", "d.txt: there is no text for the train split.\n  got: skipped: 1 binary"),
        "e.jsonl": (
            b'{"text": ""}\n',
            "e.jsonl: there is no text for the train split.\n  got: skipped: 1 empty",
        ),
        "f.txt": (b"  \n ", "f.txt: there is no text for the train split."),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError) as error:
            prepare(open_source(str(tmp_path / name)), tokenizer, tmp_path / "out", val_fraction=0)
        assert message in str(error.value)
    assert sorted(os.listdir(tmp_path)) == sorted(cases)


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a.txt", "a.jsonl", "a.jsonl.xz", "folder"])
def test_the_number_of_processes_changes_nothing(tmp_path, monkeypatch, tokenizer, kind) -> None:
    """One in this process, or several: every byte of the folder, the manifest too."""
    monkeypatch.setattr(sources, "PART_BYTES", 6000)
    texts = make_texts(120)
    path = tmp_path / "in puß" / kind
    path.parent.mkdir()
    if kind == "folder":
        path.mkdir()
        for i, text in enumerate(texts[:40]):
            (path / f"{i}.txt").write_text(text, encoding="utf-8")
    elif kind == "a.txt":
        path.write_text(" ".join(texts), encoding="utf-8")
    else:
        data = "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()
        path.write_bytes(lzma.compress(data) if kind.endswith("xz") else data)
    source = open_source(str(path))
    found = []
    for n in (1, 3):
        prepare(source, tokenizer, tmp_path / f"öut {n}", val_fraction=0.2, workers=n, shard_tokens=5000)
        found.append(content(tmp_path / f"öut {n}"))
    assert found[0] == found[1] and len(found[0]) > 5


def test_the_same_request_is_done_once(tmp_path, monkeypatch, tokenizer) -> None:
    """And another one into the same folder is refused, saying what differs."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))
    out = tmp_path / "out"
    first = prepare(source, tokenizer, out, val_fraction=0.2)
    before = content(out)
    monkeypatch.setattr(module, "_write", None)
    assert prepare(source, tokenizer, out, val_fraction=0.2, workers=2) == first
    with pytest.raises(
        DataError, match=r"holds shards of another request; different: val_fraction.(.|\n)*delete"
    ):
        prepare(source, tokenizer, out, val_fraction=0.3)
    with pytest.raises(
        DataError,
        match=r"different: tokenizer.\n  got: tokenizer bytes \(\w+\)\n  expected: tokenizer chars \(\w+\)",
    ):
        prepare(source, train_chars(["a"]), out, val_fraction=0.2)
    write_jsonl(tmp_path / "a.jsonl", make_texts(21))
    with pytest.raises(DataError, match="different: source"):
        prepare(open_source(str(tmp_path / "a.jsonl")), tokenizer, out, val_fraction=0.2)
    assert content(out) == before
    (out / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000.bin has another size"):
        prepare(source, tokenizer, out, val_fraction=0.2)


def test_a_folder_with_other_things_is_not_touched(tmp_path, tokenizer) -> None:
    source = open_source(write_jsonl(tmp_path / "a.jsonl", ["x"]))
    (tmp_path / "out").mkdir()
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0)  # empty is welcome
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("years of work")
    for name in ("thesis", "a.jsonl"):
        with pytest.raises(DataError, match=f"{name} is not empty and not a folder of token shards"):
            prepare(source, tokenizer, tmp_path / name, val_fraction=0)


# --- crashes ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from pathlib import Path
from regpt.data import prepare as module, sources
from regpt.data.prepare import prepare
from regpt.tokenizers import open_tokenizer

sources.PART_BYTES, module.JOURNAL_S = 6000, 0
calls = 0

def progress(done, total):
    global calls
    calls += 1
    print(calls, flush=True)
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), 9)

prepare(sources.open_source(sys.argv[1]), open_tokenizer("bytes"), Path(sys.argv[2]), val_fraction=0.2,
        workers=int(sys.argv[3]), shard_tokens=20_000, progress=progress)
"""


def run_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The script above: no main guard, as users write them."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def killed_and_resumed(tmp_path: Path, kills: list[int], workers: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    out = tmp_path / "out"
    expected = run_script(path, tmp_path / "whole", 1, 0)
    assert expected.returncode == 0, expected.stderr
    for kill in kills:
        result = run_script(path, out, workers, kill)
        assert result.returncode == -signal.SIGKILL, result.stderr
        assert not out.exists() and (tmp_path / ".out.partial").exists()
    result = run_script(path, out, workers, 0)
    assert result.returncode == 0, result.stderr
    if kills:
        assert int(result.stdout.split()[-1]) < int(expected.stdout.split()[-1])  # it did not begin anew
    assert content(out) == content(tmp_path / "whole")
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_preparations_go_on_to_the_same_bytes(tmp_path, workers) -> None:
    """SIGKILL twice, then once to the end."""
    killed_and_resumed(tmp_path, [9, 5], workers)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_instant(tmp_path, seed) -> None:
    """SIGKILL at random times, also inside a write or before the first journal; each time the same bytes at the end."""
    rng = random.Random(seed)
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(400))
    run_script(path, tmp_path / "whole", 1, 0)
    for _ in range(20):
        command = [sys.executable, "-c", SCRIPT, path, str(tmp_path / "out"), str(rng.randint(1, 2)), "0"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            try:
                process.wait(timeout=rng.uniform(0.2, 1.0))
            except subprocess.TimeoutExpired:
                process.kill()
        assert not (tmp_path / "out").exists() or content(tmp_path / "out") == content(tmp_path / "whole")
    run_script(path, tmp_path / "out", 2, 0)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("spoil", ["journal", "shard", "other request"])
def test_what_cannot_be_gone_on_with_is_begun_anew(tmp_path, spoil) -> None:
    """A torn journal, a file that is shorter than noted, or leftovers of another request."""
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(150))
    run_script(path, tmp_path / "whole", 1, 0)
    run_script(path, tmp_path / "out", 1, 9)
    work = tmp_path / ".out.partial"
    if spoil == "journal":
        (work / "journal.json").write_text("{")
    elif spoil == "shard":
        (work / "shards/train-00000.bin").write_bytes(b"x")
    else:
        path = write_jsonl(tmp_path / "a.jsonl", make_texts(151))
        run_script(path, tmp_path / "whole2", 1, 0)
    run_script(path, tmp_path / "out", 1, 0)
    assert content(tmp_path / "out") == content(
        tmp_path / ("whole2" if spoil == "other request" else "whole")
    )


class Stopped(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped])
def test_interrupted_work_leaves_no_process_and_no_folder(tmp_path, monkeypatch, tokenizer, error) -> None:
    """Ctrl-C, or an exception out of `progress`: nobody goes on in the background, and the next call finishes."""
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(100)))
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise error

    before = {p.pid for p in psutil.Process().children(recursive=True)}
    with pytest.raises(error):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0.2, workers=2, progress=progress)
    assert {p.pid for p in psutil.Process().children(recursive=True)} == before
    assert os.listdir(tmp_path) == ["a.jsonl"]
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0.2, workers=2)
    prepare(source, tokenizer, tmp_path / "whole", val_fraction=0.2, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_processes_end_with_the_one_that_started_them(tmp_path) -> None:
    """Also when that one is killed, and also in the middle of a long document."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"some words " * 2_000_000)
    command = [sys.executable, "-c", SCRIPT, str(path), str(tmp_path / "out"), "3", "0"]  # itself and two
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        workers = psutil.Process(process.pid).children()
        while len(workers) < 2 and process.poll() is None:
            workers = psutil.Process(process.pid).children()
        process.kill()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive


def test_a_process_that_dies_is_said(tmp_path, monkeypatch, tokenizer) -> None:
    """As the kernel kills one when memory runs out."""
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(100)))
    before = {p.pid for p in psutil.Process().children()}

    def progress(done: int, total: int) -> None:
        for child in psutil.Process().children():
            if child.pid not in before:
                child.kill()

    with pytest.raises(
        DeviceError, match=r"a tokenising process ended with exit status -?\d+ at .*a.jsonl.\n  try: fewer"
    ):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0, workers=2, progress=progress)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_errors_of_a_process_are_those_of_one_process(tmp_path, monkeypatch, tokenizer) -> None:
    """File, line, fields and hint come through."""
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    path = tmp_path / "a.jsonl"
    write_jsonl(path, make_texts(100))
    path.write_text(path.read_text() + '{"body": "x"}\n')
    said = []
    for n in (1, 2):
        with pytest.raises(DataError) as error:
            prepare(open_source(str(path)), tokenizer, tmp_path / "out", val_fraction=0, workers=n)
        said.append(str(error.value))
    assert said[0] == said[1] and said[0].startswith(
        f"{path}:101 has no field 'text'.\n  got: the fields body\n  try: "
    )
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_a_second_preparation_is_refused_by_name(tmp_path, tokenizer) -> None:
    """While the first one runs; its number is said."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(5)))

    def progress(done: int, total: int) -> None:
        with pytest.raises(DataError, match=rf"out is being written by another process, pid {os.getpid()}."):
            prepare(source, tokenizer, tmp_path / "out", val_fraction=0)

    prepare(source, tokenizer, tmp_path / "out", val_fraction=0, progress=progress)
    assert texts_of(tmp_path / "out", "train", tokenizer) == make_texts(5)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_equal_documents_are_not_all_held_out(tmp_path: Path) -> None:
    """They stay together, so nothing sensible is left for one of the splits: said, with the share, before any work."""
    lonely = 0
    for name in ("a", "b", "c", "d", "e", "f"):  # by chance either kind has the smaller hash
        for i in range(5):
            (tmp_path / f"{i}.txt").write_text(f"the same {name}\n" * 1000)
        (tmp_path / "other.txt").write_text(f"another {name}\n")
        source = open_source(str(tmp_path / "*.txt"))
        try:
            manifest = prepare(source, open_tokenizer("bytes"), tmp_path / f"out-{name}", val_fraction=0.005)
        except DataError as e:
            lonely += 1
            assert "would hold out 100% of the text (equal documents stay together) or nothing" in str(e)
            assert "--val-fraction 0" in str(e) and not (tmp_path / f"out-{name}").exists()
        else:
            assert manifest.splits["val"].documents == 1 and unusual_split(manifest, 0.005) is None
    assert 0 < lonely < 6


def test_a_large_share_held_out_is_worth_a_word(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"number {i}\n" * 1000)
    manifest = prepare(
        open_source(str(tmp_path / "*.txt")), open_tokenizer("bytes"), tmp_path / "out", val_fraction=0.005
    )
    said = unusual_split(manifest, 0.005)
    assert said is not None and said.startswith(
        "33% of the text is held out for validation, where 0.5% was asked"
    )


def test_a_disk_too_small_is_said_before_any_work(tmp_path, monkeypatch, tokenizer) -> None:
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=source.source_bytes))
    with pytest.raises(
        DataError,
        match=r"disk full: .*out needs about 0.\d+ MB for 0.\d+ MB of text.\n  got: 0.\d+ MB free",
    ):
        prepare(source, tokenizer, tmp_path / "deep/er/out", val_fraction=0)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize("where", ["shards", "ids"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch, tokenizer, where, n) -> None:
    """ENOSPC while writing: one message, and the space is given back."""
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "shards":
        monkeypatch.setattr(writer._HashedFile, "write", full)
    else:
        monkeypatch.setattr(workers if n == 1 else workers._Pool, "tokenize" if n == 1 else "_ask", full)
    with pytest.raises(
        DataError, match=r"disk full while writing .*out; what was written is removed.\n  try: free"
    ):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0.1, workers=n)
    assert os.listdir(tmp_path) == ["a.jsonl"]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to mount a small disk"
)
@pytest.mark.parametrize("n", [1, 2])
def test_a_real_disk_that_fills(tmp_path, monkeypatch, tokenizer, n) -> None:
    """A tmpfs of 3 MB, and an estimate that believes it is larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (tmp_path / "a.txt").write_bytes(b"word " * 2_000_000)
        monkeypatch.setattr(module, "require_room", lambda *_: None)
        with pytest.raises(DataError, match="disk full while writing"):
            prepare(open_source(str(tmp_path / "a.txt")), tokenizer, disk / "out", val_fraction=0, workers=n)
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys
from pathlib import Path
from regpt.data.prepare import prepare
from regpt.data.sources import open_source
from regpt.tokenizers import open_tokenizer

def peaks():
    # Not ru_maxrss of this process: it counts what the process that started it had in use.
    status = Path("/proc/self/status").read_text()
    here = int(status.split("VmHWM:")[1].split()[0])
    return [kib >> 10 for kib in (here, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)]

tokenizer = open_tokenizer(sys.argv[3], files=sys.argv[4] or None)
prepare(open_source(sys.argv[1]), tokenizer, Path(sys.argv[2]), val_fraction=0, workers=2)
print(json.dumps(peaks()))
"""


def peak_mib(path: Path, out: Path, kind: str = "bytes", files: str = "") -> list[int]:
    """Peak memory of the first process and of the largest other one, in MiB."""
    command = [sys.executable, "-c", MEASURE, str(path), str(out), kind, files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def write_one_line(path: Path, megabytes: int) -> None:
    """One JSON document on one line, with a character that makes Python take four bytes for each of a whole string."""
    open_with: Callable[..., object] = lzma.open if path.suffix == ".xz" else open
    with open_with(path, "wb") as file:
        file.write(b'{"id": [1, {"a": "b"}], "text": "\xf0\x9f\x98\x80')
        block = b"It is a truth, \\u00e9 universally\\n acknowledged. " * (1_000_000 // 48)
        for _ in range(megabytes):
            file.write(block)
        file.write(b'", "after": 1}\n')


linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")


@linux
def test_a_long_document_takes_little_memory(tmp_path) -> None:
    """Of 30 MB on one line only the line itself is added: as Python text it would be 120 MB, and as ids over 700."""
    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl"
    write_one_line(small, 1)
    write_one_line(large, 30)
    low, high = peak_mib(small, tmp_path / "a"), peak_mib(large, tmp_path / "b")
    assert all(after - before < 45 for after, before in zip(high, low, strict=True))  # either may have had it


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", ["long.jsonl", "long.jsonl.xz", "long.txt"])
def test_a_document_of_200_mb_takes_under_600_mib(tmp_path, test_data, name) -> None:
    """All processes together, GPT-2's tokenizer and its text on one line."""
    write_one_line(tmp_path / name, 200)
    peaks = peak_mib(tmp_path / name, tmp_path / "out", "gpt2", str(test_data / "tokenizer"))
    print(name, peaks)
    assert sum(peaks) < 600
    facts = Manifest.read(tmp_path / "out").splits["train"]
    assert facts.documents == 1 and facts.source_bytes > 180_000_000


# --- how it is called -------------------------------------------------------------------------------------------------


def test_a_script_without_a_main_guard_works(tmp_path) -> None:
    """With several processes: nothing imports the caller's script again."""
    write_jsonl(tmp_path / "a.jsonl", make_texts(30))
    script = tmp_path / "my script.py"
    script.write_text(
        "from pathlib import Path\nprint('once')\n"
        "from regpt.data.prepare import prepare\nfrom regpt.data.sources import open_source\n"
        "from regpt.tokenizers import open_tokenizer\n"
        "m = prepare(open_source('a.jsonl'), open_tokenizer('bytes'), Path('out'), val_fraction=0, workers=2)\n"
        "print(m.splits['train'].documents)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == (["once", "30"], "")


def note(seen: list[tuple[int, int]], done: int, total: int) -> None:
    seen.append((done, total))


def test_progress_counts_the_bytes_of_the_files(tmp_path, monkeypatch, tokenizer) -> None:
    """From 0 to all of them, packed or not."""
    monkeypatch.setattr(sources, "PART_BYTES", 3000)
    write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    (tmp_path / "b.jsonl.xz").write_bytes(lzma.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "b.jsonl.xz"):
        seen: list[tuple[int, int]] = []
        source = open_source(str(tmp_path / name))
        prepare(source, tokenizer, tmp_path / f"{name}-out", val_fraction=0, progress=partial(note, seen))
        size = (tmp_path / name).stat().st_size
        assert seen[0] == (0, size) and seen[-1] == (size, size) and seen == sorted(seen)


def test_the_manifest_says_it_all(tmp_path, tokenizer) -> None:
    """Tokenizer, source, request, and for every file its size and hash."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))
    manifest = prepare(source, tokenizer, tmp_path / "out", val_fraction=0.2)
    assert dataclasses.asdict(manifest.tokenizer) == {
        "kind": "bytes", "fingerprint": tokenizer.fingerprint, "vocab_size": 257, "eot_id": 256
    }  # fmt: skip
    assert (manifest.source.name, manifest.source.fingerprint) == ("a", source.fingerprint)
    assert manifest.request["val_fraction"] == 0.2 and [f.split for f in manifest.files] == ["train", "val"]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "manifest.json", "tokenizer", "train-00000.bin", "train-00000.idx", "val-00000.bin", "val-00000.idx"
    ]  # fmt: skip
