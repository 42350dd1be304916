"""Which documents are taken and in which order: duplicates, short ones, shuffling; slices and their merge."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from regpt.cli import main
from regpt.data import prepare as preparing
from regpt.data import shuffle as shuffling
from regpt.data import sources
from regpt.data.duplicates import Seen
from regpt.data.merge import merge
from regpt.data.prepare import prepare
from regpt.data.request import Selection, Slice
from regpt.data.shards import Manifest, Shards
from regpt.data.sources import Source, open_source
from regpt.errors import ConfigError, DataError
from regpt.tokenizers import Tokenizer, open_tokenizer


@pytest.fixture
def tokenizer() -> Tokenizer:
    return open_tokenizer("bytes")


def make_texts(n: int, seed: int = 0) -> list[str]:
    """Texts of 1 to 60 words, a third of them twice or more, some short."""
    rng = random.Random(seed)
    words = ["alpha", "Bête", "漢字", "don't", "😀", "of", "the"]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 60))) + f" {i}" for i in range(n)]
    return rng.choices([*texts, "short", "tiny"], k=n)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return str(path)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def texts_of(out: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    ids = Shards.open(out).split(split)
    ends = ids.document_ends.tolist()
    return [
        tokenizer.decode(ids.read(start, end - start - 1).tolist())
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


# --- duplicates and short documents -----------------------------------------------------------------------------------


def test_equal_documents_are_counted_and_left_out_where_asked(tmp_path, tokenizer) -> None:
    texts = make_texts(200)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", texts))
    repeated = len(texts) - len(set(texts))
    assert repeated > 50
    kept = prepare(source, tokenizer, tmp_path / "kept", val_fraction=0)
    assert kept.duplicates == repeated and kept.splits["train"].documents == len(texts)
    assert texts_of(tmp_path / "kept", "train", tokenizer) == texts
    once = prepare(source, tokenizer, tmp_path / "once", val_fraction=0, selection=Selection(dedup=True))
    assert once.duplicates == repeated == once.skipped["duplicate"]
    assert texts_of(tmp_path / "once", "train", tokenizer) == list(dict.fromkeys(texts))
    assert once.splits["train"].source_bytes == sum(len(t.encode()) for t in set(texts))


def test_a_validation_text_that_was_trained_on_is_left_out(tmp_path, tokenizer) -> None:
    source = open_source(write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"]))
    val = open_source(write_jsonl(tmp_path / "b.jsonl", ["four", "two"]))
    selection = Selection(dedup=True)
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0.5, val_source=val, selection=selection)
    assert texts_of(tmp_path / "out", "val", tokenizer) == ["four"]


def test_short_documents_are_left_out_by_characters(tmp_path, tokenizer) -> None:
    texts = ["", "漢字", "four", "fives", "😀😀😀😀😀"]
    source = open_source(write_jsonl(tmp_path / "a.jsonl", texts))
    found = prepare(source, tokenizer, tmp_path / "out", val_fraction=0, selection=Selection(min_chars=5))
    assert texts_of(tmp_path / "out", "train", tokenizer) == ["fives", "😀😀😀😀😀"]
    assert found.skipped == {"shorter than 5 characters": 3}


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (Selection(min_chars=-1), "data.min_chars must not be negative."),
        (Selection(shuffle_seed=-1), "data.shuffle_seed must not be negative."),
    ],
)
def test_a_selection_that_cannot_be_is_refused(tmp_path, tokenizer, selection, message) -> None:
    source = open_source(write_jsonl(tmp_path / "a.jsonl", ["one", "two"]))
    with pytest.raises(ConfigError) as e:
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0, selection=selection)
    assert e.value.what == message and not (tmp_path / "out").exists()


def test_another_selection_is_another_request(tmp_path, tokenizer) -> None:
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0, selection=Selection(dedup=True))
    assert Manifest.read(tmp_path / "out").request["dedup"] is True
    for selection in (Selection(), Selection(dedup=True, shuffle_seed=0)):
        with pytest.raises(DataError, match=r"another request; different: (dedup|shuffle_seed)"):
            prepare(source, tokenizer, tmp_path / "out", val_fraction=0, selection=selection)


def test_seen_hashes_are_a_set(tmp_path) -> None:
    """Beside Python's own, over batches that repeat themselves and one another; taken back to where it was saved."""
    rng = random.Random(0)
    values = [0, 1, 1 << 63, (1 << 64) - 1, *(rng.getrandbits(64) for _ in range(300))]
    seen, known = Seen(tmp_path / "seen"), set[int]()
    for step in range(20):
        batch = rng.choices(values, k=50)
        expected = []
        for h in batch:
            expected.append(h in known)
            known.add(h)
        assert seen.add(np.array(batch, np.uint64), step).tolist() == expected
        if step == 9:
            at_10 = set(known)
        if step in (9, 14):
            seen.save(step + 1)
    seen.close()
    # As after a crash between saving this and saving the journal, which says 10 steps.
    back = Seen(tmp_path / "seen", 10)
    assert back.add(np.array(values, np.uint64), 10).tolist() == [h in at_10 for h in values]
    back.close()
    with pytest.raises(ValueError, match="knows of 15 steps, not of 16"):
        Seen(tmp_path / "seen", 16)


def test_what_the_disk_says_to_the_table_is_an_error_of_the_system(tmp_path) -> None:
    """Also where there is no room: then it is the error that every other file gives."""
    with pytest.raises(OSError):
        Seen(tmp_path / "no" / "such" / "folder")
    (tmp_path / "other").write_text("this is no table " * 100)
    with pytest.raises(ValueError, match="other"):
        Seen(tmp_path / "other")


# --- shuffling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bucket_bytes", [1 << 20, 700])
def test_shuffled_documents_are_the_same_in_another_order(
    tmp_path, monkeypatch, tokenizer, bucket_bytes
) -> None:
    """In one bucket and in many; the validation split stays as it is; the same seed gives the same bytes."""
    monkeypatch.setattr(shuffling, "BUCKET_BYTES", bucket_bytes)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(150)))

    def made(name: str, seed: int | None) -> Path:
        prepare(
            source,
            tokenizer,
            tmp_path / name,
            val_fraction=0.2,
            selection=Selection(shuffle_seed=seed),
            shard_tokens=777,
        )
        return tmp_path / name

    plain, one, again, two = made("plain", None), made("one", 1), made("again", 1), made("two", 2)
    orders = [texts_of(folder, "train", tokenizer) for folder in (plain, one, two)]
    assert Counter(orders[0]) == Counter(orders[1]) == Counter(orders[2])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert texts_of(plain, "val", tokenizer) == texts_of(one, "val", tokenizer)
    assert content(one) == content(again)
    assert list(Shards.open(one).verify()) and Manifest.read(one).splits == Manifest.read(plain).splits


def test_every_order_is_equally_likely(tmp_path, monkeypatch, tokenizer) -> None:
    """Three documents, 600 seeds, over two buckets: chi squared with 5 degrees of freedom, 0.1 % at 20.5."""
    monkeypatch.setattr(shuffling, "BUCKET_BYTES", 8)
    manifest = prepare(
        open_source(write_jsonl(tmp_path / "a.jsonl", ["1", "2", "3"])),
        tokenizer,
        tmp_path / "a",
        val_fraction=0,
    )
    files = [(tmp_path / "a", f) for f in manifest.files]
    found: Counter[bytes] = Counter()
    for seed in range(600):
        writer = shuffling.SplitWriter(tmp_path, "train", 2, 1000)
        shuffling.shuffle(files, writer, seed, tmp_path)
        (file,) = writer.finish()
        found[(tmp_path / file.name).read_bytes()] += 1
    assert len(found) == 6 and sum((n - 100) ** 2 / 100 for n in found.values()) < 20.5


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["", "0/3", "4/3", "3", "1/0", "-1/3", "a/b", "1/3/4", "1.5/3"])
def test_what_is_no_slice_is_refused(written) -> None:
    with pytest.raises(ConfigError, match="--slice is not a slice") as e:
        Slice.parse(written)
    assert "1/8 is the first of eight" in str(e.value)


def test_slices_cover_every_byte_once() -> None:
    for total, n in itertools.product((0, 1, 5, 100), (1, 2, 3, 7)):
        covered = Counter(b for i in range(n) for b in Slice(i + 1, n).within(total))
        assert covered == Counter(range(total + 1))


def mixed_folder(folder: Path) -> Source:
    """Text with separators, JSONL, packed JSONL, parquet of several row groups, an empty file, a binary one."""
    folder.mkdir()
    texts = make_texts(400)
    (folder / "a.txt").write_text("<|endoftext|>".join(texts[:100]), encoding="utf-8")
    write_jsonl(folder / "b.jsonl", texts[100:200])
    packed = "".join(json.dumps({"text": t}) + "\n" for t in texts[200:300])
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(packed.encode(), mtime=0))
    table = pyarrow.table({"text": texts[300:]})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=9)
    (folder / "e.txt").write_bytes(b"")
    (folder / "f.txt").write_bytes(b"\0binary")
    (folder / "z.txt").write_bytes(b"")
    return open_source(str(folder))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(
    ("selection", "own_val"),
    [
        ({}, False),
        ({"dedup": True, "min_chars": 8}, False),
        ({"dedup": True, "shuffle_seed": 3}, True),
    ],
)
def test_merged_slices_are_what_one_machine_makes(
    tmp_path, monkeypatch, tokenizer, n, selection, own_val
) -> None:
    """To the byte, manifest included."""
    monkeypatch.setattr(sources, "PART_BYTES", 2000)
    source = mixed_folder(tmp_path / "source")
    val = open_source(write_jsonl(tmp_path / "val.jsonl", make_texts(60, seed=9))) if own_val else None

    def made(name: str, part: Slice | None) -> Path:
        prepare(
            source,
            tokenizer,
            tmp_path / name,
            val_fraction=0.2,
            val_source=val,
            selection=Selection(**selection, slice=part),
            shard_tokens=1500,
        )
        return tmp_path / name

    whole = made("whole", None)
    parts = [made(f"part-{i}", Slice(i + 1, n)) for i in range(n)]
    random.Random(0).shuffle(parts)
    seen: list[tuple[int, int]] = []
    merge(parts, tmp_path / "merged", progress=lambda *done: seen.append(done))
    assert content(tmp_path / "merged") == content(whole)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]
    assert not list(tmp_path.glob(".*.partial"))
    assert merge(parts, tmp_path / "merged") == Manifest.read(whole)  # nothing is done twice


def test_slices_of_one_text(tmp_path, monkeypatch, tokenizer) -> None:
    """Split by position; a slice may end inside the text."""
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    (tmp_path / "a.txt").write_text(" ".join(make_texts(60)), encoding="utf-8")
    source = open_source(str(tmp_path / "a.txt"))
    prepare(source, tokenizer, tmp_path / "whole", val_fraction=0.1, shard_tokens=999)
    parts = [tmp_path / f"part-{i}" for i in range(3)]
    for i, part in enumerate(parts):
        selection = Selection(slice=Slice(i + 1, 3))
        prepare(source, tokenizer, part, val_fraction=0.1, selection=selection, shard_tokens=999)
    merge(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


def test_slices_of_one_text_whose_halves_are_equal(tmp_path, tokenizer) -> None:
    """They are two parts of one text, not a document and its duplicate."""
    (tmp_path / "a.txt").write_text("word " * 100)
    source = open_source(str(tmp_path / "a.txt"))
    selections = [Selection(dedup=True), *(Selection(dedup=True, slice=Slice(i, 2)) for i in (1, 2))]
    for name, selection in zip("abc", selections, strict=True):
        prepare(source, tokenizer, tmp_path / name, val_fraction=0.5, selection=selection)
    merge([tmp_path / "b", tmp_path / "c"], tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "a")
    assert Manifest.read(tmp_path / "merged").splits["val"].documents == 1


def test_more_slices_than_parts(tmp_path, tokenizer) -> None:
    """Most are empty, which is no error."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"]))
    prepare(source, tokenizer, tmp_path / "whole", val_fraction=0)
    parts = [tmp_path / f"part-{i}" for i in range(4)]
    for i, part in enumerate(parts):
        prepare(source, tokenizer, part, val_fraction=0, selection=Selection(slice=Slice(i + 1, 4)))
    assert [Manifest.read(p).splits["train"].documents for p in parts] == [3, 0, 0, 0]
    merge(parts, tmp_path / "merged")
    assert content(tmp_path / "merged") == content(tmp_path / "whole")


@pytest.fixture
def three(tmp_path: Path, tokenizer: Tokenizer) -> list[Path]:
    """Three slices."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(50)))
    for i in (1, 2, 3):
        selection = Selection(slice=Slice(i, 3))
        prepare(source, tokenizer, tmp_path / f"{i}", val_fraction=0, selection=selection)
    return [tmp_path / f"{i}" for i in (1, 2, 3)]


def test_what_cannot_be_merged_is_said(tmp_path, tokenizer, three) -> None:
    a, b, c = three
    source = open_source(str(tmp_path / "a.jsonl"))
    prepare(source, tokenizer, tmp_path / "whole", val_fraction=0)
    prepare(source, tokenizer, tmp_path / "of-two", val_fraction=0, selection=Selection(slice=Slice(2, 2)))
    other = Selection(dedup=True, slice=Slice(2, 3))
    prepare(source, tokenizer, tmp_path / "other", val_fraction=0, selection=other)
    for folders, message in [
        ([a, c], "of 3 slices these are missing: 2."),
        ([a, b, c, b], "slice 2/3 is there twice"),
        ([a, tmp_path / "whole"], "is not a slice but a whole source"),
        ([tmp_path / "whole"], "is not a slice but a whole source"),
        ([a, tmp_path / "of-two"], "not slices of one request; different: the number of slices."),
        ([a, tmp_path / "other", c], "not slices of one request; different: dedup."),
        ([a, tmp_path], "is not a folder of token shards"),
    ]:
        with pytest.raises(DataError) as e:
            merge(folders, tmp_path / "out")
        assert message in str(e.value)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_damaged_slice_is_refused(tmp_path, three) -> None:
    file = three[0] / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"1/train-00000.bin has changed since it was written"):
        merge(three, tmp_path / "out")
    assert not (tmp_path / ".out.partial").exists()


def test_what_a_stopped_merge_left_is_in_nobodys_way(tmp_path, three) -> None:
    merge(three, tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(three, tmp_path / "out", progress=stop)
    shutil.copytree(three[0], tmp_path / ".out.partial/shards")  # as a killed one leaves it
    merge(three, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


# --- crashes ----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys
from pathlib import Path
from regpt.data import prepare as module, shuffle, sources
from regpt.data.prepare import prepare
from regpt.data.request import Selection
from regpt.tokenizers import open_tokenizer

sources.PART_BYTES, shuffle.BUCKET_BYTES = 3000, 5000
if sys.argv[4] == "shuffle":  # what is noted then is what is noted before shuffling
    module.JOURNAL_S = 1e9
    module.shuffle = lambda *_: os.kill(os.getpid(), 9)
else:
    module.JOURNAL_S = 0
prepare(sources.open_source(sys.argv[1]), open_tokenizer("bytes"), Path(sys.argv[2]), val_fraction=0.2,
        selection=Selection(dedup=True, shuffle_seed=5), workers=int(sys.argv[3]), shard_tokens=100_000)
"""


def script(*arguments: object) -> list[str]:
    return [sys.executable, "-c", SCRIPT, *map(str, arguments)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_while_shuffling_nothing_is_tokenised_again(tmp_path, tokenizer) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    mixed_folder(folder)
    subprocess.run(script(folder, tmp_path / "whole", 1, ""), check=True)
    killed = subprocess.run(script(folder, out, 1, "shuffle"), check=False)
    assert killed.returncode == -signal.SIGKILL
    journal = json.loads((tmp_path / ".out.partial/journal.json").read_text())
    assert journal["bytes"] == open_source(str(folder)).stored_bytes
    subprocess.run(script(folder, out, 1, ""), check=True)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_instant_with_everything_on(tmp_path, seed) -> None:
    """Twenty kills a seed, packed files, parquet, duplicates and shuffling: the same bytes at the end."""
    rng = random.Random(seed)
    folder, out = tmp_path / "source", tmp_path / "out"
    mixed_folder(folder)
    subprocess.run(script(folder, tmp_path / "whole", 1, ""), check=True)
    kills = 0
    while kills < 20:
        with subprocess.Popen(script(folder, out, rng.randint(1, 2), "")) as process:
            try:
                process.wait(timeout=rng.uniform(0.3, 1.5))
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
        if out.exists():
            assert content(out) == content(tmp_path / "whole")
            shutil.rmtree(out)
    subprocess.run(script(folder, out, 2, ""), check=True)
    assert content(out) == content(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_a_slice_is_nothing_to_train_on(three, capsys) -> None:
    assert (
        main(["train", "demo", "--data.source", str(three[0]), "--tokenizer.name", "bytes", "--out", "run"])
        == 2
    )
    assert "is only slice 1/3 of" in capsys.readouterr().err and not Path("run").exists()
    assert main(["inspect", str(three[0])]) == 0
    assert "slice      1/3 of its source" in capsys.readouterr().out


# --- unfinished work --------------------------------------------------------------------------------------------------


def stop_late(done: int, total: int) -> None:
    if done > total // 2:
        raise KeyboardInterrupt


def test_what_failed_goes_on_where_its_journal_is(tmp_path, monkeypatch, tokenizer) -> None:
    """A disk that is full, a network that is gone, a Ctrl-C: what was noted stays, and is not done again."""
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    monkeypatch.setattr(preparing, "JOURNAL_S", 0)
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(60)))
    prepare(source, tokenizer, tmp_path / "whole", val_fraction=0.2)
    for error in (
        OSError(28, "No space left on device"),
        DataError("the server is gone."),
        KeyboardInterrupt(),
    ):

        def fail(done: int, total: int, error: BaseException = error) -> None:
            if done > total // 2:
                raise error

        with pytest.raises((DataError, KeyboardInterrupt)) as e:
            prepare(source, tokenizer, tmp_path / "out", val_fraction=0.2, progress=fail)
        if isinstance(error, OSError):
            assert "what was written is in" in str(e.value) and "goes on from there" in str(e.value)
        seen: list[int] = []
        prepare(
            source,
            tokenizer,
            tmp_path / "out",
            val_fraction=0.2,
            progress=lambda done, _, s=seen: s.append(done),
        )
        assert seen[0] > source.stored_bytes // 3
        assert content(tmp_path / "out") == content(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")


def test_others_do_not_take_a_stopped_preparations_folder(tmp_path, monkeypatch, tokenizer, three) -> None:
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    monkeypatch.setattr(preparing, "JOURNAL_S", 0)
    source = open_source(str(tmp_path / "a.jsonl"))
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer, tmp_path / "out", val_fraction=0, progress=stop_late)
    before = content(tmp_path / ".out.partial")
    with pytest.raises(DataError, match=r".out.partial holds a preparation that was stopped"):
        merge(three, tmp_path / "out")
    assert content(tmp_path / ".out.partial") == before


def test_leftovers_of_what_is_finished_are_cleared(tmp_path, tokenizer) -> None:
    """Of a process that was killed between the rename and its last line; not while somebody works there."""
    source = open_source(write_jsonl(tmp_path / "a.jsonl", make_texts(20)))
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0)
    shutil.copytree(tmp_path / "out", tmp_path / ".out.partial/shards")
    prepare(source, tokenizer, tmp_path / "out", val_fraction=0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]
