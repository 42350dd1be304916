"""Token files of other programs: any into any without a change, the programs' own readers agree, damage is named."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
import published
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.data import convert as module
from regpt.data import foreign
from regpt.data.convert import Target, convert
from regpt.data.foreign import ForeignSet, byte_lengths_of, open_foreign
from regpt.data.formats import recognise, split_of
from regpt.data.formats.base import Eot
from regpt.data.shards import Shards, TokenizerFacts
from regpt.errors import ConfigError, DataError
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train.durable import lock_file

LAX = settings(
    derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)  # fmt: skip
SOURCES = ("nanogpt", "llmc", "megatron", "datatrove", "npy")
FOREIGN = SOURCES[:4]
BYTES = ByteTokenizer()


def opened(folder: Path | str, vocab: int = 257, **more: object) -> ForeignSet:
    found = recognise(str(folder))
    assert found is not None
    facts = (
        TokenizerFacts.of(BYTES) if vocab == 257 else TokenizerFacts("unknown", str(vocab), vocab, vocab - 1)
    )
    return open_foreign(found, facts, partial(byte_lengths_of, BYTES), **more)  # type: ignore[arg-type]


@pytest.fixture
def unsynced(monkeypatch) -> None:
    """Thousands of small files need not survive a power loss."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@st.composite
def collections(draw: st.DrawFn) -> tuple[int, dict[str, published.Documents]]:
    """A vocabulary and documents, empty ones and an empty validation split among them."""
    vocab = draw(st.sampled_from([257, 50257, 65536, 65537, 200_000]))
    ids = st.one_of(st.integers(0, vocab - 2), st.sampled_from([0, 255, vocab - 2, min(vocab - 2, 65535)]))
    documents = st.lists(st.lists(ids, max_size=12), max_size=6)
    return vocab, {"train": draw(documents.filter(len)), "val": draw(documents)}


def round_trip(tmp: Path, source: str, target: str, files: int, block: int, made: object) -> None:
    vocab, splits = made
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    for split, documents in splits.items():
        published.write(source, tmp, split, documents, vocab, files)
    tokenizer = BYTES if vocab == 257 else None
    target = target if tokenizer or target != "regpt" else "megatron"
    tokens = opened(tmp, vocab)
    list(tokens.verified())
    assert [tokens.split(n).n_documents for n in tokens.splits] == [len(d) for d in splits.values() if d]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        convert(tokens, target, tmp / "there", tokenizer=tokenizer)
        if target == "regpt":
            there = Shards.open(tmp / "there")
            list(there.verified())
            for name in there.splits:
                n = sum(len(d) for d in splits[name])
                assert there.splits[name].source_bytes == n and there.splits[name].documents == len(
                    splits[name]
                )
        else:
            there = opened(tmp / "there", vocab)
            found = {n: published.read(target, tmp / "there", n, vocab) for n in splits}
            assert found == splits
        back = source if source != "npy" else "llmc"
        convert(there, back, tmp / "back", tokenizer=tokenizer)
    assert {n: published.read(back, tmp / "back", n, vocab) for n in splits} == splits
    if source == "nanogpt":
        assert (tmp / "train.bin").read_bytes() == (tmp / "back/train.bin").read_bytes()


@settings(LAX, max_examples=200)
@given(
    source=st.sampled_from(SOURCES), target=st.sampled_from(get_args(Target)), files=st.integers(1, 4),
    block=st.integers(1, 9), made=collections(),
)  # fmt: skip
def test_any_format_into_any(tmp_path, unsynced, source, target, files, block, made) -> None:
    """Written from the published layout, converted, read by the published layout, converted back: the same documents."""
    round_trip(tmp_path / "case", source, target, files, block, made)


@pytest.mark.slow
@settings(LAX, max_examples=5000)
@given(
    source=st.sampled_from(SOURCES), target=st.sampled_from(get_args(Target)), files=st.integers(1, 4),
    block=st.integers(1, 9), made=collections(),
)  # fmt: skip
def test_any_format_into_any_5000_times(tmp_path, unsynced, source, target, files, block, made) -> None:
    round_trip(tmp_path / "case", source, target, files, block, made)


# --- the programs' own code -------------------------------------------------------------------------------------------

DOCUMENTS = [[72, 105], [], [1], [255, 0, 3] * 50]


@pytest.mark.filterwarnings("ignore")
def test_megatrons_own_reader_and_builder(tmp_path) -> None:
    """Megatron reads what we write as we do, and we read what its builder writes, several sequences a document too."""
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset", exc_type=ImportError)
    import torch

    (tmp_path / "nano").mkdir()
    published.write("nanogpt", tmp_path / "nano", "train", DOCUMENTS, 257)
    convert(opened(tmp_path / "nano"), "megatron", tmp_path / "out", tokenizer=BYTES)
    theirs = indexed.IndexedDataset(str(tmp_path / "out/train_text_document"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [[*d, 256] for d in DOCUMENTS]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4] and theirs.index.dtype == np.uint16

    (tmp_path / "built").mkdir()
    for dtype in (np.uint16, np.int32):
        builder = indexed.IndexedDatasetBuilder(str(tmp_path / "built/x_train.bin"), dtype=dtype)
        builder.add_item(torch.tensor([1, 2, 256]))
        builder.add_item(torch.tensor([3, 256]))
        builder.end_document()
        builder.add_document(torch.tensor([4, 5, 6, 256]), [2, 2])
        builder.finalize(str(tmp_path / "built/x_train.idx"))
        split = opened(tmp_path / "built").split("train")
        assert split.read(0, 9).tolist() == [1, 2, 256, 3, 256, 4, 5, 6, 256]
        assert split.document_ends.tolist() == [5, 9]


def test_datatroves_own_reader_and_writer(tmp_path) -> None:
    """The same of datatrove."""
    dataset = pytest.importorskip("datatrove.utils.dataset", exc_type=ImportError)
    writing = pytest.importorskip("datatrove.pipeline.tokens.tokenizer", exc_type=ImportError)
    (tmp_path / "nano").mkdir()
    published.write("nanogpt", tmp_path / "nano", "train", DOCUMENTS, 257)
    convert(opened(tmp_path / "nano"), "datatrove", tmp_path / "out", tokenizer=BYTES)
    theirs = dataset.DatatroveFileDataset(str(tmp_path / "out/train_00000.ds"), seq_len=4)
    ids = [i for n in range(len(theirs)) for i in theirs[n]["input_ids"].tolist()]
    every = published.flat([[*d, 256] for d in DOCUMENTS])
    assert ids == every[: len(every) // 5 * 5]

    for size, vocab in ((2, 257), (4, 70_000)):
        folder = tmp_path / f"written-{size}"
        file = writing.TokenizedFile(
            str(folder), "00000_unshuffled.ds", tokenizer_name_or_path="some/model", save_final_metadata=True, token_size=size
        )  # fmt: skip
        for document in DOCUMENTS:
            file.write([*document, 256], None)
        file.close()
        split = opened(folder, vocab).split("train")
        assert split.read(0, split.n_tokens).tolist() == every
        assert split.document_ends.tolist() == np.cumsum([len(d) + 1 for d in DOCUMENTS]).tolist()
    with pytest.raises(DataError, match="written with the tokenizer some/model, this run asks for bytes"):
        opened(tmp_path / "written-2", asked="bytes")


# --- where <|endoftext|> stands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("custom", ["append", "prepend", "none"])
@pytest.mark.parametrize("target", ["megatron", "datatrove"])
def test_an_index_shows_the_custom(tmp_path, custom, target) -> None:
    """Written with each custom, found again from the index; documents that vanish without end-of-text are left out."""
    (tmp_path / "nano").mkdir()
    published.write("nanogpt", tmp_path / "nano", "train", DOCUMENTS, 257)
    convert(opened(tmp_path / "nano"), target, tmp_path / "out", tokenizer=BYTES, eot=custom)
    made = convert(opened(tmp_path / "out"), "nanogpt", tmp_path / "back", tokenizer=BYTES)
    assert made.source_eot == custom and made.eot == "append"
    expected = DOCUMENTS if custom != "none" else [d for d in DOCUMENTS if d]
    assert published.read("nanogpt", tmp_path / "back", "train", 257) == expected


def test_a_mixed_custom_must_be_named(tmp_path) -> None:
    published.write_megatron(tmp_path / "x", [[1, 256], [2, 3]], "<u2")
    with pytest.raises(
        DataError, match=r"some documents have <\|endoftext\|> \(id 256\).*\n  try: --source-eot"
    ):
        convert(opened(tmp_path), "nanogpt", tmp_path / "out", tokenizer=BYTES)
    convert(opened(tmp_path), "nanogpt", tmp_path / "out", tokenizer=BYTES, source_eot="append")
    assert np.fromfile(tmp_path / "out/train.bin", "<u2").tolist() == [1, 256, 2, 3, 256]


@pytest.mark.parametrize("eot, expected", [("append", [5, 6, 256, 7, 256]), ("prepend", [256, 5, 6, 256, 7])])
def test_unfinished_and_begun_documents(tmp_path, eot: Eot, expected) -> None:
    """nanoGPT's last document may lack its end, llm.c's training files begin inside one: both count as documents."""
    np.array([5, 6, 256, 7], "<u2").tofile(tmp_path / "train.bin")
    tokens = opened(tmp_path)
    assert tokens.split("train").document_ends.tolist() == [3, 4]
    convert(tokens, "nanogpt", tmp_path / "out", tokenizer=BYTES, eot=eot)
    assert np.fromfile(tmp_path / "out/train.bin", "<u2").tolist() == expected
    begun = opened(tmp_path, eot="prepend")
    assert begun.split("train").document_ends.tolist() == [2, 4]
    assert opened(tmp_path, eot="none").split("train").document_ends.tolist() == [4]


# --- which files, which split -----------------------------------------------------------------------------------------


def test_validation_is_never_trained_on(tmp_path) -> None:
    """By name, by position, or by a source of its own; files of a test set belong to neither."""
    for split, documents in {"train": [[1]] * 50, "val": [[2]] * 5, "test": [[3]] * 5}.items():
        published.write("llmc", tmp_path, split, documents, 257)
    tokens = opened(tmp_path, val_fraction=0.5)
    assert tokens.left_out == ("fineweb_test_000000.bin",)
    assert set(tokens.split("train").read(0, 100).tolist()) == {1, 256}
    assert set(tokens.split("val").read(0, 10).tolist()) == {2, 256} and tokens.splits == ("train", "val")
    one = str(tmp_path / "fineweb_train_000000.bin")
    cut = opened(one, val_fraction=0.25)
    assert (cut.split("train").n_tokens, cut.split("val").n_tokens) == (75, 25)
    assert cut.held_out == "the last 25.00% of the tokens, by position"
    assert cut.split("val").read(0, 3).tolist() == [1, 256, 1]
    assert opened(one).splits == ("train",)
    own = opened(one, val=recognise(str(tmp_path / "*_test_*.bin")))
    assert set(own.split("val").read(0, 10).tolist()) == {3, 256}
    with pytest.raises(DataError, match="cannot be both trained and validated on"):
        opened(one, val=recognise(one))
    with pytest.raises(DataError, match="cannot be split with val_fraction"):
        opened(one, val_fraction=0.999)
    with pytest.raises(ConfigError, match=r"val_fraction must lie in \[0, 1\)"):
        opened(one, val_fraction=1.0)


@pytest.mark.parametrize("format", SOURCES)
def test_a_split_cut_by_position_keeps_its_documents(tmp_path, format) -> None:
    """Also in the middle of a document, and of a file."""
    published.write(format, tmp_path, "train", [[1, 2, 3], [4, 5], [6], [7, 8]], 257, files=2)
    whole, cut = opened(tmp_path), opened(tmp_path, val_fraction=0.5)
    n, ends = whole.split("train").n_tokens, whole.split("train").document_ends
    at = cut.split("train").n_tokens
    both = [*cut.split("train").document_ends, *(cut.split("val").document_ends + at)]
    assert sorted({*ends.tolist(), at}) == both and at == n // 2
    parts = [cut.split(name).read(0, cut.split(name).n_tokens) for name in cut.splits]
    assert np.concatenate(parts).tolist() == whole.split("train").read(0, n).tolist()


def test_files_of_different_types_are_one_split(tmp_path) -> None:
    """Read as a type that holds all of them: none wraps into another id."""
    published.write("llmc", tmp_path, "train", [[1, 2]], 257)
    (tmp_path / "fineweb_train_000000.bin").rename(tmp_path / "a_train.bin")
    published.write("llmc", tmp_path, "train", [[70_000, 3]], 80_000)
    split = opened(tmp_path, 80_000).split("train")
    assert split.rows(np.array([1, 4]), 3).tolist() == [[1, 2, 79_999], [70_000, 3, 256]]


def test_a_folder_for_validation_has_its_own_name_for_it(tmp_path) -> None:
    """The other set's validation files, where it has some; all of it else."""
    for name, splits in {"a": ("train",), "b": ("train", "val"), "c": ("train",)}.items():
        (tmp_path / name).mkdir()
        for split in splits:
            published.write("nanogpt", tmp_path / name, split, [[len(split)] * 4], 257)
    for name, first in {"b": 3, "c": 5}.items():
        tokens = opened(tmp_path / "a", val=recognise(str(tmp_path / name)))
        assert tokens.split("val").read(0, 5).tolist() == [first] * 4 + [256]


@pytest.mark.parametrize(
    "name, split",
    [("val.bin", "val"), ("x_val_000.npy", "val"), ("00000_validation.ds", "val"), ("valid-text.bin", "val"),
     ("test.bin", "test"), ("train_valid_english.bin", "train"), ("evaluation.bin", "train"), ("00000_shuffled.ds", "train")],
)  # fmt: skip
def test_the_split_by_the_name(name, split) -> None:
    assert split_of(Path(name)) == split


def test_what_is_not_token_files(tmp_path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/train-00000.bin").write_bytes(b"\1\0")
    (tmp_path / "ours/train-00000.idx").write_bytes(bytes(8))
    assert recognise(str(tmp_path / "ours")) is None  # our own, its manifest gone
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "model.bin").write_bytes(b"\0" * 100)
    np.save(tmp_path / "weights.npy", np.zeros(3))
    assert (
        recognise(str(tmp_path)) is None
        and recognise("hf:a/b") is None
        and recognise(str(tmp_path / "*.txt")) is None
    )
    for name in ("other.ds", "tool.bin", "tool.idx", "train_loss.npy"):
        (tmp_path / name).write_bytes(b"\0" * 100)
    np.save(tmp_path / "val_loss.npy", np.zeros(3))
    assert recognise(str(tmp_path)) is None and recognise(str(tmp_path / "*")) is None
    for name in ("tool.bin", "train_loss.npy", "other.ds"):  # but what is named itself is
        assert recognise(str(tmp_path / name)) is not None
        (tmp_path / name).unlink()
    published.write("llmc", tmp_path, "train", [[1]], 257)
    published.write("datatrove", tmp_path, "train", [[1]], 257)
    with pytest.raises(DataError, match=r"several formats.\n  got: .*llmc \(fineweb_train_000000.bin, …\)"):
        recognise(str(tmp_path))
    (tmp_path / "two").mkdir()
    for format in ("nanogpt", "llmc"):
        published.write(format, tmp_path / "two", "train", [[1]], 257)
    with pytest.raises(DataError, match="two holds token files of several formats"):
        recognise(str(tmp_path / "two"))
    (tmp_path / "three").mkdir()
    published.write("datatrove", tmp_path / "three", "train", [[1], [2]], 257, files=2)
    for end in ("index", "metadata"):
        (tmp_path / f"three/00001_train_shuffled.ds.{end}").unlink()
    assert opened(tmp_path / "three").split("train").read(0, 4).tolist() == [1, 256, 2, 256]
    found = recognise(str(tmp_path / "*.ds*"))
    assert found is not None and found.format.name == "datatrove"
    (tmp_path / "only").mkdir()
    published.write("llmc", tmp_path / "only", "val", [[1]], 257)
    with pytest.raises(DataError, match=r"has no tokens to train on.\n  got: fineweb_val_000000.bin"):
        opened(tmp_path / "only")
    with pytest.raises(DataError, match="has no split 'val'"):
        opened(tmp_path / "*.ds").split("val")


@pytest.mark.parametrize(
    "ids, text",
    [
        ("y_train.npy", "a.txt"),
        ("y_train.npy", "neg/0_2.txt"),
        ("y_train.npy", "input.txt"),
        ("train.bin", "a.jsonl.zst"),
        ("val.bin", "B.PARQUET"),
        ("train.bin", "notes/input.md"),
    ],
)
def test_text_beside_what_may_be_ids(tmp_path, ids, text) -> None:
    """Labels are not trained on as tokens, nor text left aside: which of them is meant must be said."""
    for name in (
        "README.md",
        "LICENSE.txt",
        ".hidden.txt",
        "prepare.py",
        "meta.json",
        "tokenizer/merges.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("about the tokens")
    with open(tmp_path / ids, "wb") as file:
        np.save(file, np.ones(9, "<i8")) if ids.endswith(".npy") else np.ones(9, "<u2").tofile(file)
    alone = recognise(str(tmp_path))
    assert alone is not None and [f.name for f in alone.files] == [ids]
    (tmp_path / text).parent.mkdir(exist_ok=True)
    (tmp_path / text).write_text("some text")
    said = rf"may be a folder of text or one of tokens.\n  got: {text}, and {ids}, which(.|\n)*'{tmp_path}/\*\.\w+'"
    with pytest.raises(DataError, match=said):
        recognise(str(tmp_path))
    for named in (tmp_path / ids, tmp_path / f"*{Path(ids).suffix}"):
        found = recognise(str(named))
        assert found is not None and found.files == (tmp_path / ids,)
    if "/" not in text:
        assert recognise(str(tmp_path / f"*{Path(text).suffix}")) is None


def test_text_beside_what_shows_that_it_is_ids(tmp_path) -> None:
    """A magic number or an index is enough; nanoGPT's input.txt belongs to its tokens."""
    for format in ("llmc", "megatron", "datatrove", "nanogpt"):
        (tmp_path / format).mkdir()
        published.write(format, tmp_path / format, "train", [[1]], 257)
        (tmp_path / format / ("input.txt" if format == "nanogpt" else "a.txt")).write_text("some text")
        found = recognise(str(tmp_path / format))
        assert found is not None and found.format.name == format


# --- damage -----------------------------------------------------------------------------------------------------------


def edited(path: Path, at: int, new: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[at : at + len(new)] = new
    path.write_bytes(data)


def swapped(path: Path, start: int = 0, width: int = 2) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:start] + np.frombuffer(data[start:], f"<u{width}").byteswap().tobytes())


def longer(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def shorter(path: Path, n: int) -> None:
    path.write_bytes(path.read_bytes()[:-n])


BIN, IDX, DS, NPY = (
    "text_train_0.bin",
    "text_train_0.idx",
    "00000_train_shuffled.ds",
    "edufineweb_train_000000.npy",
)
LLMC = "fineweb_train_000000.bin"
DAMAGE = [
    (
        "nanogpt",
        lambda p: shorter(p / "train.bin", 1),
        r"train.bin ends inside an id, at byte 158.*\n  got: 159 bytes",
    ),
    (
        "nanogpt",
        lambda p: edited(p / "train.bin", 6, b"\1\2"),
        r"train.bin holds an id outside .* at byte 6.\n  got: 513\n  expected: 0 to 256",
    ),
    ("nanogpt", lambda p: swapped(p / "train.bin"), r"train.bin holds an id outside (.|\n)*\(big-endian\)"),
    (
        "nanogpt",
        lambda p: np.arange(1, 300, dtype="<u4").tofile(p / "train.bin"),
        "train.bin holds ids of 32 bits",
    ),
    (
        "nanogpt",
        lambda p: np.arange(1, 300, dtype="<i8").tofile(p / "train.bin"),
        "train.bin holds ids of 32 bits",
    ),
    ("nanogpt", lambda p: (p / "train.bin").write_bytes(bytes(1100)), "begins like an llm.c file"),
    (
        "llmc",
        lambda p: shorter(p / LLMC, 1),
        r"_000000.bin is cut off at byte 1183: its header, at byte 8, says 80 ids",
    ),
    (
        "llmc",
        lambda p: shorter(p / LLMC, 2),
        r"is cut off at byte 1182.*\n  got: 1182 bytes\n  expected: 1184 bytes",
    ),
    ("llmc", lambda p: longer(p / LLMC, b"\0\0"), r"goes on behind byte 1184"),
    ("llmc", lambda p: shorter(p / LLMC, 170), r"ends inside its header, at byte 1014"),
    (
        "llmc",
        lambda p: swapped(p / LLMC, width=4),
        r"was written with its bytes in the other order \(big-endian\), its magic number at byte 0",
    ),
    (
        "llmc",
        lambda p: swapped(p / LLMC, 1024),
        r"outside the vocabulary at byte 1028.\n  got: 512(.|\n)*big-endian",
    ),
    (
        "llmc",
        lambda p: edited(p / LLMC, 4, b"\2"),
        r"another version of the format, at byte 4.\n  got: 2\n  expected: 1",
    ),
    (
        "llmc",
        lambda p: edited(p / LLMC, 8, b"\xff\xff\xff\xff"),
        r"impossible number of ids in its header, at byte 8.\n  got: -1",
    ),
    (
        "llmc",
        lambda p: edited(p / LLMC, 0, np.int32(20240522).tobytes()),
        r"multiple-choice questions \(byte 0\)",
    ),
    (
        "llmc",
        lambda p: edited(p / LLMC, 1030, b"\xff\xff"),
        r"outside the vocabulary at byte 1030.\n  got: 65535",
    ),
    ("npy", lambda p: shorter(p / NPY, 1), r"npy is cut off at byte 287: its header says 80 ids of uint16"),
    ("npy", lambda p: edited(p / NPY, 0, b"X"), r"npy is not a .npy file: byte 0"),
    ("npy", lambda p: edited(p / NPY, 12, b"XXXX"), r"npy has a damaged header"),
    (
        "npy",
        lambda p: np.save(p / NPY, np.zeros(4)),
        r"is not one row of token ids.*\n  got: <f8 of shape \(4,\)",
    ),
    (
        "npy",
        lambda p: np.save(p / NPY, np.zeros(4, ">u2")),
        r"is not one row of token ids.*\n  got: >u2.*\n  expected: .*little-endian",
    ),
    ("npy", lambda p: np.save(p / NPY, np.array([1, -5], "<i4")), r"at byte 132.\n  got: -5"),
    (
        "npy",
        lambda p: np.save(p / NPY, np.array([{}], dtype=object), allow_pickle=True),
        r"not one row of token ids.*\n  got: \|O",
    ),
    (
        "megatron",
        lambda p: shorter(p / BIN, 2),
        r"0.bin is cut off at byte 158: text_train_0.idx says 80 ids of uint16 in 4 seq",
    ),
    ("megatron", lambda p: (p / BIN).unlink(), r"0.bin is missing"),
    ("megatron", lambda p: edited(p / IDX, 0, b"TNT"), r"0.idx is no index of Megatron: byte 0"),
    (
        "megatron",
        lambda p: edited(p / IDX, 9, (1).to_bytes(8, "big")),
        r"0.idx was written with its bytes in the other order \(big-endian\): byte 9",
    ),
    (
        "megatron",
        lambda p: edited(p / IDX, 9, b"\7"),
        r"0.idx was written of another version: byte 9.\n  got: 7",
    ),
    (
        "megatron",
        lambda p: edited(p / IDX, 17, b"\6"),
        r"a type that ids cannot have, at byte 17.\n  got: code 6",
    ),
    (
        "megatron",
        lambda p: edited(p / IDX, 18, b"\5"),
        r"0.idx is cut off at byte 122: its header, at byte 18, says 5 seq",
    ),
    (
        "megatron",
        lambda p: edited(p / IDX, 34, b"\xff\xff\xff\xff"),
        r"sequence of negative length, at byte 34.\n  got: -1",
    ),
    ("megatron", lambda p: edited(p / IDX, 58, b"\x90\x90"), r"where sequence 1 cannot lie, at byte 58"),
    (
        "megatron",
        lambda p: edited(p / IDX, 82, b"\1"),
        r"documents that do not cover its sequences, from byte 82 on",
    ),
    (
        "megatron",
        lambda p: edited(p / IDX, 98, b"\0"),
        r"documents out of order, at byte 98.\n  got: 0\n  expected: 1 or more",
    ),
    ("megatron", lambda p: shorter(p / IDX, 100), r"ends inside its header, at byte 22"),
    (
        "megatron",
        lambda p: edited(p / BIN, 4, b"\xff\xff"),
        r"0.bin holds an id outside the vocabulary at byte 4",
    ),
    (
        "datatrove",
        lambda p: shorter(p / DS, 2),
        r"shuffled.ds is cut off at byte 158: .*index says 80 ids, of uint16",
    ),
    ("datatrove", lambda p: shorter(p / f"{DS}.index", 3), r"index ends inside a number, at byte 24"),
    ("datatrove", lambda p: shorter(p / f"{DS}.index", 8), r"shuffled.ds goes on behind byte"),
    (
        "datatrove",
        lambda p: edited(p / f"{DS}.index", 8, b"\1"),
        r"index is damaged at byte 8: documents must end one behind.*\n  got: 1\n  expected: 20",
    ),
    ("datatrove", lambda p: swapped(p / f"{DS}.index", width=8), r"big-endian|cut off"),
    ("datatrove", lambda p: (p / f"{DS}.metadata").write_text("x"), r"metadata is damaged"),
    (
        "datatrove",
        lambda p: (p / f"{DS}.metadata").write_text("gpt2|3\n80\n80 T"),
        r"metadata is damaged: ids of 3 bytes",
    ),
    (
        "datatrove",
        lambda p: (p / f"{DS}.metadata").write_text("gpt2|2\n81\n81 T"),
        r"does not belong to its files.\n  got: 81 ids\n  expected: 80",
    ),
    (
        "datatrove",
        lambda p: (p / f"{DS}.loss").write_bytes(b"\1" * 80),
        r"loss says on which tokens to train",
    ),
]


@pytest.mark.parametrize("case", range(len(DAMAGE)), ids=lambda n: f"{n}-{DAMAGE[n][0]}")
def test_damage_is_refused_with_file_and_offset(tmp_path, case) -> None:
    format, damage, message = DAMAGE[case]
    published.write(format, tmp_path, "train", [[i + 1 for i in range(19)] for _ in range(4)], 257)
    list(opened(tmp_path).verified())
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        list(opened(tmp_path).verified())


@pytest.mark.parametrize(
    "format, file, message",
    [("llmc", "fineweb_train_000001.bin", "has no magic number of llm.c at byte 0"),
     ("npy", "edufineweb_train_000001.npy", "is not a .npy file: byte 0"),
     ("megatron", "text_train_1.idx", "is no index of Megatron: byte 0")],
)  # fmt: skip
def test_a_damaged_magic_number_among_others(tmp_path, format, file, message) -> None:
    """Such a file is not left out in silence."""
    published.write(format, tmp_path, "train", [[1, 2, 3]] * 20, 257, files=3)
    edited(tmp_path / file, 0, b"\0")
    with pytest.raises(DataError, match=f"{file} {message}"):
        opened(tmp_path)


@settings(LAX, max_examples=150)
@given(format=st.sampled_from(["llmc", "megatron", "datatrove", "npy"]), data=st.data())
def test_any_flipped_byte_of_headers_and_indices(tmp_path, unsynced, format, data) -> None:
    """Is refused, or leaves sound ids: whatever happens, no other error, and no id outside the vocabulary."""
    folder = tmp_path / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    published.write(format, folder, "train", DOCUMENTS, 257)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    size = min(path.stat().st_size, 1100)
    edited(path, data.draw(st.integers(0, size - 1)), bytes([data.draw(st.integers(0, 255))]))
    try:
        if recognise(str(folder)) is None:
            return
        tokens = opened(folder)
        list(tokens.verified())
        split = tokens.split("train")
        ids, ends = split.read(0, split.n_tokens), split.document_ends
    except DataError as e:
        assert str(folder) in str(e)
        return
    assert ids.max() < 257 and (np.diff(ends, prepend=0) > 0).all() and ends[-1] == split.n_tokens


# --- the whole set ----------------------------------------------------------------------------------------------------


def test_the_last_id_of_many_is_looked_at(tmp_path) -> None:
    """In blocks, far behind the samples; without `verified` only the beginnings and the ends are."""
    ids = np.zeros(5_000_001, "<u2") + 7
    ids[2_500_000] = 300
    ids.tofile(tmp_path / "train.bin")
    tokens = opened(tmp_path)
    with pytest.raises(DataError, match=r"at byte 5000000.\n  got: 300"):
        list(tokens.verified())
    ids[2_500_000], ids[-1] = 7, 300
    ids.tofile(tmp_path / "train.bin")
    with pytest.raises(DataError, match=r"at byte 10000000.\n  got: 300"):
        opened(tmp_path)


def test_the_fingerprint_is_that_of_the_content(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        published.write("llmc", tmp_path / name, "train", DOCUMENTS, 257, files=2)
    one, two = opened(tmp_path / "one"), opened(tmp_path / "two")
    assert one.fingerprint == two.fingerprint != opened(tmp_path / "one", val_fraction=0.5).fingerprint
    edited(tmp_path / "two/fineweb_train_000000.bin", 1026, b"\5")
    assert opened(tmp_path / "two").fingerprint != one.fingerprint


def test_large_files_are_known_by_samples_not_by_times(tmp_path, monkeypatch) -> None:
    """A copy made later is the same text; another id at the beginning, in a sample between, or at the end is another."""
    monkeypatch.setattr(foreign, "CONTENT_BYTES", 0)
    documents = [[n % 256 for n in range(foreign.SAMPLE * 40)]]
    (tmp_path / "one").mkdir()
    published.write("llmc", tmp_path / "one", "train", documents, 257)
    one = opened(tmp_path / "one").fingerprint
    copied = Path(shutil.copytree(tmp_path / "one", tmp_path / "two"), "fineweb_train_000000.bin")
    os.utime(copied, (1, 1))
    assert opened(tmp_path / "two").fingerprint == one
    tokens = len(documents[0]) + 1
    third_sample = (tokens - foreign.SAMPLE) * 2 // (foreign.SAMPLES - 1)
    for place in (0, third_sample, third_sample + foreign.SAMPLE - 1, tokens - 1):
        before = copied.read_bytes()
        edited(copied, 1024 + 2 * place, b"\x07\0" if before[1024 + 2 * place] != 7 else b"\x08\0")
        assert opened(tmp_path / "two").fingerprint != one
        copied.write_bytes(before)
    published.write("llmc", tmp_path / "two", "train", [documents[0][:-1]], 257)
    assert opened(tmp_path / "two").fingerprint != one
    assert opened(tmp_path / "one", val_fraction=0.5).fingerprint != one
    published.write("llmc", tmp_path / "one", "val", [[1]], 257)
    assert opened(tmp_path / "one").fingerprint != one  # also of a few ids


def test_bytes_of_text_are_counted_by_the_tokenizer(tmp_path) -> None:
    """So bits per byte mean the same as on prepared text; end-of-text counts nothing."""
    published.write("nanogpt", tmp_path, "train", DOCUMENTS, 257)
    assert opened(tmp_path).split("train").source_bytes == sum(map(len, DOCUMENTS))


# --- writing ----------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_half_made_stays(tmp_path, monkeypatch) -> None:
    (tmp_path / "nano").mkdir()
    published.write("nanogpt", tmp_path / "nano", "train", DOCUMENTS, 257)
    tokens, out = opened(tmp_path / "nano"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(DataError, match="out exists already; nothing was written"):
        convert(tokens, "llmc", out, tokenizer=BYTES)
    assert [p.name for p in out.iterdir()] == ["mine"]

    def stopped(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(tokens, "llmc", tmp_path / "new", tokenizer=BYTES, progress=stopped)
    full = OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(module, "_moved", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(DataError, match=r"disk full while writing .*new; what was written is removed"):
            convert(tokens, "llmc", tmp_path / "new", tokenizer=BYTES)
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(
            DataError, match=r"disk full: .*new needs about .* for .* ids.\n  got: 0.00 MB free"
        ):
            convert(tokens, "llmc", tmp_path / "new", tokenizer=BYTES)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nano", "out"]
    convert(tokens, "llmc", tmp_path / "new", tokenizer=BYTES)


def test_what_a_killed_process_left_is_cleared_and_a_living_one_is_not_disturbed(tmp_path) -> None:
    (tmp_path / "nano").mkdir()
    published.write("nanogpt", tmp_path / "nano", "train", DOCUMENTS, 257)
    left = tmp_path / ".new.partial/files"
    left.mkdir(parents=True)
    (left / "text_train_000001.bin").write_bytes(b"half")
    with open(tmp_path / ".new.partial/lock", "ab") as lock:
        assert lock_file(lock)
        with pytest.raises(DataError, match=r"new is being written by another process"):
            convert(opened(tmp_path / "nano"), "llmc", tmp_path / "new", tokenizer=BYTES)
        assert (left / "text_train_000001.bin").read_bytes() == b"half"
    convert(opened(tmp_path / "nano"), "llmc", tmp_path / "new", tokenizer=BYTES)
    assert published.read("llmc", tmp_path / "new", "train", 257) == DOCUMENTS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nano", "new"]


def test_ids_that_were_not_checked_are_not_written_wrapped(tmp_path) -> None:
    """An id beyond the target's type would become another one."""
    np.concatenate([np.full(100_000, 7), [70_000], np.full(100_000, 7)]).astype("<u4").tofile(
        tmp_path / "x.u4"
    )
    header = np.zeros(256, "<i4")
    header[:3] = 20240801, 7, 200_001
    (tmp_path / "train.bin").write_bytes(header.tobytes() + (tmp_path / "x.u4").read_bytes())
    with pytest.raises(DataError, match="holds an id outside the vocabulary"):
        convert(opened(tmp_path / "train.bin"), "nanogpt", tmp_path / "out", tokenizer=BYTES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["llmc", "megatron"])
def test_memory_does_not_grow_with_the_tokens(tmp_path, monkeypatch, target) -> None:
    """Four times the tokens, the same peak: also where an index is written."""
    monkeypatch.setattr(module, "BLOCK", 1 << 14)
    peaks = []
    for n in (250_000, 1_000_000):
        folder = tmp_path / str(n)
        folder.mkdir()
        ids = np.arange(n) % 257
        ids.astype("<u2").tofile(folder / "train.bin")
        tokens = opened(folder)
        tracemalloc.start()
        convert(tokens, target, folder / "out", tokenizer=None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] < 20_000_000


def test_llmc_files_are_cut_and_numbered(tmp_path, monkeypatch) -> None:
    """Validation is number 0, training begins with 1, as llm.c's own scripts have it."""
    from regpt.data.formats import llmc

    monkeypatch.setattr(llmc, "SHARD_TOKENS", 60)
    for split in ("train", "val"):
        published.write("nanogpt", tmp_path, split, DOCUMENTS, 257)
    convert(opened(tmp_path), "llmc", tmp_path / "out", tokenizer=BYTES)
    names = sorted(p.name for p in (tmp_path / "out").glob("*.bin"))
    train = ["text_train_000001.bin", "text_train_000002.bin", "text_train_000003.bin"]
    assert names == [*train, "text_val_000000.bin", "text_val_000001.bin", "text_val_000002.bin"]
    assert published.read("llmc", tmp_path / "out", "train", 257) == DOCUMENTS


def test_what_our_shards_need(tmp_path) -> None:
    published.write("nanogpt", tmp_path, "train", DOCUMENTS, 257)
    with pytest.raises(DataError, match="regpt's own shards need a tokenizer of regpt's"):
        convert(opened(tmp_path), "regpt", tmp_path / "out", tokenizer=None)
    with pytest.raises(DataError, match=r"regpt's own shards need <.endoftext.> behind every document"):
        convert(opened(tmp_path), "regpt", tmp_path / "out", tokenizer=BYTES, eot="prepend")
