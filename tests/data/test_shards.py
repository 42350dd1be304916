"""Shards: what is read is what was written, and whatever is damaged is named before it is used."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.data import split as module
from regpt.data.shards import Shards, dtype_for
from regpt.errors import DataError

LAX = settings(
    derandomize=True,
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@LAX
@given(n=st.integers(1, 200), shard_tokens=st.integers(1, 80), data=st.data())
def test_reading_across_files_and_around_the_end(make_shards, n, shard_tokens, data) -> None:
    """read and gather agree with plain indexing for any start and length."""
    ids = np.random.default_rng(n).integers(0, 50257, n)
    split = make_shards(ids, shard_tokens=shard_tokens).split("train")
    start = data.draw(st.integers(0, n))
    length = data.draw(st.integers(0, n - start))
    assert split.read(start, length).tolist() == ids[start : start + length].tolist()
    starts = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=5)), dtype=np.int64)
    window = data.draw(st.integers(1, 3 * n))
    gathered = split.gather(starts, window)
    assert gathered.shape == (len(starts), window) and gathered.dtype == np.int64
    assert np.array_equal(gathered, ids[(starts[:, None] + np.arange(window)) % n])


def test_reading_outside_is_an_error(make_shards) -> None:
    split = make_shards(range(10)).split("train")
    for start, n in ((-1, 2), (9, 2), (11, 0), (3, -1)):
        with pytest.raises(IndexError, match="not within the 10 ids"):
            split.read(start, n)


def test_document_ends_are_those_of_the_split(make_shards) -> None:
    """Also of documents that run over several files, and that end where a file ends."""
    split = make_shards(range(20), shard_tokens=4, ends=[1, 4, 15, 16, 20]).split("train")
    assert split.document_ends.tolist() == [1, 4, 15, 16, 20] and split.n_documents == 5


def test_many_files_are_not_all_open_at_once(make_shards, monkeypatch) -> None:
    monkeypatch.setattr(module, "OPEN_FILES", 3)
    monkeypatch.setattr(module, "MAPPED_FILES", 2)
    split = make_shards(range(100), shard_tokens=5).split("train")
    for start in (0, 50, 99, 20, 0):
        assert split.gather(np.array([start]), 100)[0].tolist() == [(start + i) % 100 for i in range(100)]
        assert split.gather(np.array([start // 5 * 5]), 5)[0].tolist() == [
            start // 5 * 5 + i for i in range(5)
        ]
        assert len(split._open) <= 2 and len(split._descriptors) <= 3


@pytest.mark.parametrize("can_read_at", [True, False])
def test_rows_read_and_rows_mapped_are_the_same(make_shards, monkeypatch, can_read_at) -> None:
    """As on systems that cannot read at a place; in another process too."""
    monkeypatch.setattr(module, "CAN_READ_AT", can_read_at)
    split = pickle.loads(pickle.dumps(make_shards(range(1000), shard_tokens=70).split("train")))  # noqa: S301
    starts = np.array([0, 3, 140, 930, 66])
    for length in (1, 4, 100):
        expected = [[(s + i) % 1000 for i in range(length)] for s in starts.tolist()]
        assert split.gather(starts, length).tolist() == expected


def test_a_file_that_became_shorter_is_an_error(make_shards) -> None:
    """Not a fault of the machine, as reading a mapped page behind the end is."""
    shards = make_shards(range(100), shard_tokens=50)
    split = shards.split("train")
    assert split.gather(np.array([60]), 4).tolist() == [[60, 61, 62, 63]]
    os.truncate(shards.path / "train-00001.bin", 10)
    with pytest.raises(DataError, match="a file of the train split has become shorter"):
        split.gather(np.array([60]), 4)
    (shards.path / "train-00000.bin").unlink()
    with pytest.raises(DataError, match=r"train-00000.bin cannot be read"):
        split.gather(np.array([0]), 4)


@pytest.mark.parametrize(
    "vocab_size, name", [(257, "uint16"), (65536, "uint16"), (65537, "uint32"), (200_000, "uint32")]
)
def test_the_type_holds_the_vocabulary(make_shards, vocab_size, name) -> None:
    """uint32 as soon as uint16 could wrap; files are little-endian and nothing else: a nanoGPT .bin."""
    assert dtype_for(vocab_size).name == name
    shards = make_shards([0, vocab_size - 1, 5], vocab_size=vocab_size)
    assert shards.split("train").read(0, 3).tolist() == [0, vocab_size - 1, 5]
    raw = np.fromfile(
        shards.path / "train-00000.bin", dtype="<" + name.replace("uint16", "u2").replace("uint32", "u4")
    )
    assert raw.tolist() == [0, vocab_size - 1, 5]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(make_shards) -> Shards:
    made = make_shards(np.arange(1000) % 256, shard_tokens=400, ends=[10, 1000], vocab_size=257)
    ids = np.fromfile(made.path / "train-00000.bin", "<u2")
    assert ids[9] == 9  # not the end-of-text id: `verify` would say so
    return made


def edit(path: Path, **changes: object) -> None:
    """Change values of the manifest; a dotted name goes down."""
    values = json.loads((path / "manifest.json").read_text())
    for name, value in changes.items():
        *way, last = name.split("__")
        inner = values
        for step in way:
            inner = inner[int(step) if step.isdigit() else step]
        inner[last] = value
    values.pop("xxh3_128", None)  # as folders of before had none: what follows is about their contents
    (path / "manifest.json").write_text(json.dumps(values))


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Shards.open(path)


def test_files_that_are_missing_or_of_another_size(shards) -> None:
    path = shards.path
    file = path / "train-00001.bin"
    data = file.read_bytes()
    for wrong in (data[:-1], data[:-2], data + b"\0\0", b""):
        file.write_bytes(wrong)
        refused(
            path, rf"train-00001.bin has another size .*\n  got: {len(wrong)} bytes\n  expected: 800 bytes"
        )
    file.unlink()
    refused(path, "train-00001.bin is missing")
    file.write_bytes(data)
    (path / "train-00002.idx").write_bytes(b"")
    refused(path, r"train-00002.idx has another size .*\n  got: 0 bytes\n  expected: 8 bytes")
    (path / "manifest.json").unlink()
    refused(path, r"is not a folder of token shards: it has no manifest.json.\n  try: regpt prepare")
    refused(path / "nowhere", "is not a folder of token shards")


@pytest.mark.parametrize("name", ["../train-00000.bin", "/etc/passwd", "sub/train-00000.bin", "..", "a.idx"])
def test_names_that_lead_elsewhere(shards, name) -> None:
    edit(shards.path, files__0__name=name)
    refused(shards.path, "not the name of a shard in this folder")


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_that_lead_elsewhere(shards, tmp_path) -> None:
    file = shards.path / "train-00000.bin"
    (tmp_path / "secret").write_bytes(file.read_bytes())
    file.unlink()
    file.symlink_to(tmp_path / "secret")
    refused(shards.path, r"train-00000.bin is a link out of its folder.\n  got: .*secret")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"format": "regpt-shards-9"}, r"another format.\n  got: regpt-shards-9\n  expected: regpt-shards-1"),
        ({"dtype": "uint32"}, r"train-00000.bin cannot have 400 ids in 800 bytes of uint32"),
        ({"dtype": "float32"}, "float32 cannot hold a vocabulary of 257"),
        ({"tokenizer__vocab_size": 70000}, "uint16 cannot hold a vocabulary of 70,000 ids"),
        ({"max_id": 257}, r"ids outside the vocabulary.\n  got: largest id 257\n  expected: below 257"),
        ({"tokenizer__eot_id": 300}, "ids outside the vocabulary"),
        (
            {"splits__train__tokens": 999},
            r"split 'train' do not add up.\n  got: 1000 tokens, 2 documents\n  expected: 999",
        ),
        ({"files__0__tokens": 401}, "do not add up"),
        ({"files__0__bytes": 802}, "cannot have 400 ids in 802 bytes"),
        ({"files__0__split": "test"}, "do not add up"),
        ({"files__0__tokens": None}, "is damaged or not of regpt: TypeError"),
        ({"surprise": 1}, "is damaged or not of regpt: TypeError: .*surprise"),
        ({"files": 3}, "is damaged or not of regpt"),
        ({"tokenizer": "gpt2"}, "is damaged or not of regpt"),
    ],
)
def test_a_manifest_that_contradicts_itself(shards, changes, message) -> None:
    edit(shards.path, **changes)
    refused(shards.path, message)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"format": 1', "null", '{"a": 1}', "[" * 100_000])
def test_a_manifest_that_is_not_one(shards, text) -> None:
    (shards.path / "manifest.json").write_text(text)
    refused(shards.path, "manifest.json is damaged or not of regpt")


def test_every_flipped_bit_is_found(make_shards) -> None:
    """`open` looks at sizes only; `verify` at every byte of ids and indices."""
    shards = make_shards(range(256), shard_tokens=100, ends=[256], vocab_size=257)
    assert [f.name for f in shards.verify()] == ["train-00000.bin", "train-00001.bin", "train-00002.bin"]
    rng = np.random.default_rng(0)
    for name in ("train-00000.bin", "train-00002.bin", "train-00002.idx"):
        whole = (shards.path / name).read_bytes()
        for bit in rng.choice(8 * len(whole), min(60, 8 * len(whole)), replace=False).tolist():
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            (shards.path / name).write_bytes(damaged)
            with pytest.raises(
                DataError, match=rf"{name} has changed since it was written.\n  got: xxh3_128"
            ):
                list(Shards.open(shards.path).verify())
        (shards.path / name).write_bytes(whole)
    list(shards.verify())


def test_ids_and_ends_are_checked_beyond_their_hashes(make_shards) -> None:
    """A file written wrong by another program, with right hashes."""
    shards = make_shards([1, 2, 3, 256, 4], vocab_size=257, ends=[4])
    edit(shards.path, max_id=255)
    with pytest.raises(DataError, match=r"train-00000.bin holds the id 256"):
        list(Shards.open(shards.path).verify())
    for ends in ([3, 5], [5, 5], [2, 1]):
        shards = make_shards([1, 2, 3, 256, 4], vocab_size=257, ends=ends)
        if ends != [2, 1]:  # in order, but no end-of-text (4) there, or none between
            edit(shards.path, tokenizer__eot_id=4, max_id=256)
        with pytest.raises(DataError, match="does not say where documents end"):
            list(Shards.open(shards.path).verify())


def test_a_split_that_is_not_there(shards) -> None:
    with pytest.raises(
        DataError, match=r"has no split 'val'.\n  got: train\n  try: prepare it with --val-fraction"
    ):
        shards.split("val")


def test_the_fingerprint_is_that_of_ids_and_tokenizer(make_shards) -> None:
    """Wherever the text came from, equal ids have an equal fingerprint."""
    one, same, other = (make_shards(ids).manifest for ids in ([1, 2, 3], [1, 2, 3], [1, 2, 4]))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_a_manifest_knows_its_own_bytes(shards) -> None:
    """Also where nothing else would notice; one of before there was a hash is still read."""
    file = shards.path / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"skipped": {}', '"skipped": {"empty": 1}'))
    refused(shards.path, "manifest.json has changed since it was written")
    values = json.loads(text)
    del values["xxh3_128"]
    file.write_text(json.dumps(values))
    assert Shards.open(shards.path).manifest == shards.manifest
