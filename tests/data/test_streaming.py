"""Tokens on the fly: the rows of everything tokenised at once, whoever shares them, wherever they were stopped."""

from __future__ import annotations

import gzip
import itertools
import json
import pickle
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from regpt.data import documents as documents_module
from regpt.data import sources, windows
from regpt.data.prepare import prepare
from regpt.data.shards import Shards
from regpt.data.sources import Source, open_source
from regpt.data.streaming import StreamingTokens
from regpt.data.windows import TextIndex, TokenDataset
from regpt.errors import ConfigError, DataError
from regpt.tokenizers.bytes import ByteTokenizer

LAX = settings(
    derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # fmt: skip
BYTES = ByteTokenizer()
EOT = BYTES.eot_id
TEXTS = [f"{i}: " + "once upon a time there was a little duck. " * (i % 5) for i in range(60)]
ODD = [*TEXTS[:9], "", " \n", "ümlaut € 🦆", *TEXTS[9:]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch) -> None:
    """Many parts of little text."""
    monkeypatch.setattr(sources, "PART_BYTES", 600)


def lines(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": t}) + "\n" for t in texts).encode()


def made(kind: str, folder: Path) -> Source:
    """The texts as a source of this kind."""
    folder.mkdir()
    if kind == "folder":
        for i, text in enumerate(ODD):
            (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
        (folder / "999.txt").write_bytes(b"\xff")
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines(ODD[:30]))
        (folder / "b.jsonl").write_bytes(lines(ODD[30:]))
    elif kind == "packed":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ODD)))
    elif kind == "separated":
        (folder / "a.txt").write_text("<|endoftext|>".join(t for t in ODD), encoding="utf-8")
    elif kind == "single":
        (folder / "a.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    elif kind == "parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"text": ODD}), folder / "a.parquet", row_group_size=7)
    return open_source(str(folder / "a.txt") if kind == "single" else str(folder))


KINDS = ("folder", "jsonl", "packed", "separated", "single", "parquet")


def reference(kind: str) -> list[int]:
    """Everything tokenised at once, end-of-text behind every document."""
    texts = ["\n".join(TEXTS)] if kind == "single" else [t for t in ODD if t.strip()]
    return [i for t in texts for i in (*t.encode(), EOT)]


def flat(rows: Sequence[dict[str, torch.Tensor]]) -> list[int]:
    """What the rows hold, one behind the other; targets must be the inputs one on, across rows too."""
    if not rows:
        return []
    inputs, targets = torch.cat([r["input_ids"] for r in rows]), torch.cat([r["targets"] for r in rows])
    assert torch.equal(inputs[1:], targets[:-1]) and inputs.dtype == torch.int64
    return [*inputs.tolist(), int(targets[-1])]


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [1, 7, 64])
def test_rows_are_those_of_everything_tokenised_at_once(tmp_path, kind, block_size) -> None:
    """No short document is discarded, end-of-text is a target, only what fills no last row is left out."""
    rows = list(StreamingTokens(made(kind, tmp_path / "a"), BYTES, block_size))
    expected = reference(kind)
    assert len(rows) == (len(expected) - 1) // block_size
    assert flat(rows) == expected[: len(rows) * block_size + 1]
    assert all(len(r["input_ids"]) == len(r["targets"]) == block_size for r in rows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_as_prepared(tmp_path, kind) -> None:
    source = made(kind, tmp_path / "a")
    prepare(source, BYTES, tmp_path / "shards", val_fraction=0, workers=1)
    split = Shards.open(tmp_path / "shards").split("train")
    assert flat(list(StreamingTokens(source, BYTES, 1))) == split.read(0, split.n_tokens).tolist()


def test_epochs_go_on_where_the_last_one_ended(tmp_path) -> None:
    source, every = made("jsonl", tmp_path / "a"), reference("jsonl") * 3
    rows = list(StreamingTokens(source, BYTES, 50, epochs=3))
    assert flat(rows) == every[: len(rows) * 50 + 1] and len(rows) == (len(every) - 1) // 50
    endless = itertools.islice(StreamingTokens(source, BYTES, 50, epochs=None), len(rows) + 5)
    assert flat(list(endless)[: len(rows)]) == flat(rows)


def documents_of(ids: Sequence[int]) -> list[tuple[int, ...]]:
    found, last = [], 0
    for end in np.flatnonzero(np.array(ids) == EOT) + 1:
        found.append(tuple(ids[last:end]))
        last = end
    return [*found, tuple(ids[last:])] if last < len(ids) else found


def pairs(rows: Sequence[dict[str, torch.Tensor]]) -> Counter[tuple[int, ...]]:
    return Counter((*r["input_ids"].tolist(), int(r["targets"][-1])) for r in rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 40])
def test_no_document_is_doubled_or_missed(tmp_path, kind, world) -> None:
    """By content, over all ranks; more of them than parts, too. Rows of one id show every token of a stream."""
    source = made(kind, tmp_path / "a")
    shares = [flat(list(StreamingTokens(source, BYTES, 1, rank=r, world=world))) for r in range(world)]
    found = [d for ids in shares for d in documents_of(ids)]
    if kind == "single":  # stretches of one text, the last one ended
        assert sum(map(len, found)) == len(reference(kind)) and sum(d[-1] == EOT for d in found) == 1
    else:
        assert Counter(found) == Counter(documents_of(reference(kind)))


def test_ranks_share_what_the_streams_are(tmp_path) -> None:
    """As many streams, any number of ranks: the same rows."""
    source = made("jsonl", tmp_path / "a")
    whole = pairs(list(StreamingTokens(source, BYTES, 16, streams=6)))
    for world in (2, 3, 6):
        parts = [StreamingTokens(source, BYTES, 16, rank=r, world=world, streams=6) for r in range(world)]
        assert sum((pairs(list(part)) for part in parts), Counter()) == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (1, 4)])
def test_the_order_is_the_same_for_ranks_and_workers(tmp_path, world, workers) -> None:
    """Row k of all is row k // world of rank k % world, whoever reads it."""
    source = made("jsonl", tmp_path / "a")
    whole = StreamingTokens(source, BYTES, 16, streams=4, epochs=None, shuffle_rows=5)
    expected = [r["input_ids"].tolist() for r in itertools.islice(whole, 200)]
    ranks = []
    for rank in range(world):
        data = StreamingTokens(
            source, BYTES, 16, rank=rank, world=world, streams=4, epochs=None, shuffle_rows=5
        )
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        ranks.append([r["input_ids"].tolist() for r in itertools.islice(loader, 200 // world)])
    assert [row for turn in zip(*ranks, strict=True) for row in turn] == expected


def test_shuffling_is_by_blocks_and_by_seed(tmp_path) -> None:
    source = made("jsonl", tmp_path / "a")

    def rows(**more: int) -> list[tuple[int, ...]]:
        return [tuple(r["input_ids"].tolist()) for r in StreamingTokens(source, BYTES, 16, **more)]

    plain, one, other = rows(), rows(shuffle_rows=10, seed=1), rows(shuffle_rows=10, seed=2)
    assert one == rows(shuffle_rows=10, seed=1) and plain != one != other
    for at in range(0, len(plain), 10):
        assert sorted(plain[at : at + 10]) == sorted(one[at : at + 10]) == sorted(other[at : at + 10])


# --- resume -----------------------------------------------------------------------------------------------------------


@LAX
@given(
    kind=st.sampled_from(["jsonl", "packed", "single", "separated"]), at=st.integers(0, 400),
    streams=st.integers(1, 5), shuffle=st.integers(0, 9), block_size=st.sampled_from([5, 16, 100]),
)  # fmt: skip
def test_resume_is_exact(tmp_path_factory, kind, at, streams, shuffle, block_size) -> None:
    """Stopped after any row, its state through JSON, continued by another object: the rows that would have come."""
    folder = tmp_path_factory.getbasetemp() / f"resume-{kind}"
    source = (
        open_source(str(folder / "a.txt") if kind == "single" else str(folder))
        if folder.exists()
        else made(kind, folder)
    )
    settings = {"streams": streams, "shuffle_rows": shuffle, "epochs": 2}
    expected = [r["input_ids"].tolist() for r in StreamingTokens(source, BYTES, block_size, **settings)]
    at = min(at, len(expected))
    first = StreamingTokens(source, BYTES, block_size, **settings)
    begun = [r["input_ids"].tolist() for r in itertools.islice(first, at)]
    state = json.loads(json.dumps(first.state_dict()))
    second = StreamingTokens(source, BYTES, block_size, **settings)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert begun + [r["input_ids"].tolist() for r in second] == expected
    assert [r["input_ids"].tolist() for r in second] == expected  # and then from the beginning again


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_resume_in_torchdatas_loader(tmp_path) -> None:
    """With workers, each of which keeps its own state."""
    loading = pytest.importorskip("torchdata.stateful_dataloader", exc_type=ImportError)
    source = made("jsonl", tmp_path / "a")

    def loader() -> DataLoader:
        data = StreamingTokens(source, BYTES, 16, shuffle_rows=4, epochs=2)
        return loading.StatefulDataLoader(data, batch_size=3, num_workers=2)

    expected = [b["input_ids"].tolist() for b in loader()]
    first = loader()
    iterator = iter(first)
    begun = [next(iterator)["input_ids"].tolist() for _ in range(11)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert begun + [b["input_ids"].tolist() for b in second] == expected


def test_a_state_of_something_else_is_refused(tmp_path) -> None:
    source = made("jsonl", tmp_path / "a")
    data = StreamingTokens(source, BYTES, 16)
    next(iter(data))
    state = data.state_dict()
    with pytest.raises(
        DataError, match=r"another stream; different: block_size, seed.\n  got: 16, 0\n  expected: 8, 3"
    ):
        StreamingTokens(source, BYTES, 8, seed=3).load_state_dict(state)
    (tmp_path / "a/c.jsonl").write_bytes(lines(["more"]))
    with pytest.raises(DataError, match="another stream; different: source"):
        StreamingTokens(open_source(str(tmp_path / "a")), BYTES, 16).load_state_dict(state)
    for broken in ({}, {**state, "cursors": {"0": [1, 2]}}, {**state, "cursors": 3}, {**state, "turn": None}):
        with pytest.raises(DataError, match="not the state of a stream"):
            StreamingTokens(source, BYTES, 16).load_state_dict(broken)
    two = StreamingTokens(source, BYTES, 16, rank=1, world=2)
    two.load_state_dict(state)
    with pytest.raises(
        DataError,
        match=r"another number of ranks or workers.\n  got: streams 0 of 1\n  expected: streams 1 of 2",
    ):
        next(iter(two))


def test_what_a_stream_cannot_be(tmp_path) -> None:
    source = made("jsonl", tmp_path / "a")
    for wrong in ({"block_size": 0}, {"epochs": 0}, {"rank": 2, "world": 2}, {"shuffle_rows": -1}):
        with pytest.raises(ConfigError, match="a stream needs block_size and epochs of 1 or more"):
            StreamingTokens(source, BYTES, **{"block_size": 8, **wrong})
    with pytest.raises(
        ConfigError, match=r"3 streams cannot be shared evenly by 2 ranks of 1 workers(.|\n)*multiple of 2"
    ):
        next(iter(StreamingTokens(source, BYTES, 8, world=2, streams=3)))
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank/a.jsonl").write_bytes(lines([" ", "\n"]))
    with pytest.raises(DataError, match="blank: there is no text in it"):
        next(iter(StreamingTokens(open_source(str(tmp_path / "blank")), BYTES, 8, epochs=None, streams=2)))
    (tmp_path / "latin.txt").write_bytes(b"abc \xe9 def")
    with pytest.raises(DataError, match=r"latin.txt is not valid UTF-8 at byte 4"):
        list(StreamingTokens(open_source(str(tmp_path / "latin.txt")), BYTES, 8))


def test_no_unpacked_piece_is_left_behind(tmp_path, monkeypatch) -> None:
    """Neither of parts that are others', nor when a reader leaves in the middle."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    source = made("packed", tmp_path / "a")
    data = StreamingTokens(source, BYTES, 8, rank=1, world=3, epochs=2)
    rows = iter(data)
    most = max(len(list((tmp_path / "work").rglob("unpacked*"))) for _ in rows)
    assert most <= 2 and not list((tmp_path / "work").iterdir())
    rows = iter(data)
    next(rows)
    rows.close()
    assert not list((tmp_path / "work").iterdir())


def test_data_sets_travel_to_other_processes(tmp_path, make_shards) -> None:
    """As started workers get them."""
    source = made("jsonl", tmp_path / "a")
    split = make_shards(reference("jsonl"), vocab_size=257).split("train")
    every = [
        StreamingTokens(source, BYTES, 16),
        TokenDataset(split, 16),
        TokenDataset(TextIndex(source, BYTES, cache=tmp_path / "cache"), 16),
    ]
    for data in every:
        first = next(iter(data))["input_ids"]
        assert torch.equal(next(iter(pickle.loads(pickle.dumps(data))))["input_ids"], first)  # noqa: S301


# --- by number --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "packed"])
def test_an_index_gives_the_same_ids(tmp_path, cache, kind) -> None:
    """In any order, over pieces and documents, and again from the index on disk."""
    source, expected = made(kind, tmp_path / "a"), reference(kind)
    for _ in range(2):
        index = TextIndex(source, BYTES, cache=cache)
        assert index.n_tokens == len(expected) and index.n_documents == expected.count(EOT)
        assert index.read(0, len(expected)).tolist() == expected
        rng = np.random.default_rng(0)
        for start in rng.integers(0, len(expected) - 40, 50).tolist():
            assert index.read(start, 40).tolist() == expected[start : start + 40]
    assert len(list(cache.iterdir())) == 1
    for start, n in ((-1, 2), (0, len(expected) + 1)):
        with pytest.raises(IndexError, match="is not within"):
            index.read(start, n)


def test_a_document_of_several_pieces(tmp_path, cache, monkeypatch) -> None:
    """Its end-of-text goes with its last piece."""
    monkeypatch.setattr(documents_module, "PIECE_BYTES", 100)
    (tmp_path / "a.jsonl").write_bytes(lines(["word " * 300, "x", "other " * 90]))
    source = open_source(str(tmp_path / "a.jsonl"))
    expected = [i for t in ("word " * 300, "x", "other " * 90) for i in (*t.encode(), EOT)]
    index = TextIndex(source, BYTES, cache=cache)
    assert len(index.units) > 10 and index.n_documents == 3
    assert index.read(0, len(expected)).tolist() == expected
    for at in range(0, 60, 7):
        first = StreamingTokens(source, BYTES, 32)
        begun = list(itertools.islice(first, at))
        second = StreamingTokens(source, BYTES, 32)
        second.load_state_dict(first.state_dict())
        rows = begun + list(second)
        assert flat(rows) == expected[: len(rows) * 32 + 1] and len(rows) == (len(expected) - 1) // 32


class Counting(ByteTokenizer):
    calls = 0

    def encode_array(self, text: str) -> NDArray[np.uint32]:
        Counting.calls += 1
        return super().encode_array(text)


def test_a_kept_index_is_not_built_again(tmp_path, cache, monkeypatch) -> None:
    """And what was tokenised last is kept; a damaged index is made anew, one of other text is another."""
    source, tokenizer = made("folder", tmp_path / "a"), Counting()
    TextIndex(source, tokenizer, cache=cache)
    Counting.calls = 0
    index = TextIndex(source, tokenizer, cache=cache)
    assert Counting.calls == 0
    index.read(10, 2)
    index.read(11, 2)
    assert Counting.calls == 1
    monkeypatch.setattr(windows, "KEPT_TOKENS", 100)
    index.read(0, index.n_tokens)
    assert sum(len(ids) for ids in index._kept.values()) == index._kept_tokens <= 300
    path = next(cache.iterdir())
    for wrong in (b"", b"\x93NUMPY junk", path.read_bytes()[:-3]):
        path.write_bytes(wrong)
        assert TextIndex(source, tokenizer, cache=cache).n_tokens == index.n_tokens
    changed = tmp_path / "a/000.txt"
    index._kept.clear()
    changed.write_text("0: longer")
    with pytest.raises(
        DataError, match=r"000.txt has changed since its index was made.\n  got: 10 tokens\n  expected: 4"
    ):
        index.read(0, 2)
    assert TextIndex(open_source(str(tmp_path / "a")), tokenizer, cache=cache).n_tokens == index.n_tokens + 6


def test_what_has_no_index(tmp_path, cache) -> None:
    with pytest.raises(DataError, match=r"a.jsonl.gz is packed(.|\n)*try: unpack it, prepare it"):
        TextIndex(made("packed", tmp_path / "a"), BYTES, cache=cache)
    (tmp_path / "blank.jsonl").write_bytes(lines([" "]))
    with pytest.raises(DataError, match=r"blank.jsonl: there is no text in it"):
        TextIndex(open_source(str(tmp_path / "blank.jsonl")), BYTES, cache=cache)


def test_windows_tile_the_tokens(tmp_path, cache, make_shards) -> None:
    """Of shards and of an index alike; as a map-style data set in others' loaders, shared by their samplers."""
    source, expected = made("jsonl", tmp_path / "a"), reference("jsonl")
    shards = make_shards(expected, vocab_size=257, shard_tokens=700).split("train")
    for tokens in (shards, TextIndex(source, BYTES, cache=cache)):
        data = TokenDataset(tokens, 32)
        assert len(data) == (len(expected) - 1) // 32
        assert flat([data[i] for i in range(len(data))]) == expected[: len(data) * 32 + 1]
        assert torch.equal(data[-1]["input_ids"], data[len(data) - 1]["input_ids"])
        for outside in (len(data), -len(data) - 1):
            with pytest.raises(IndexError, match="window"):
                data[outside]
        seen = []
        for rank in range(2):
            sampler = DistributedSampler(data, 2, rank, shuffle=True, drop_last=False)
            loader = DataLoader(data, batch_size=4, sampler=sampler, num_workers=rank)
            seen += [row for batch in loader for row in batch["input_ids"].tolist()]
        assert {tuple(r) for r in seen} == {tuple(expected[i * 32 : i * 32 + 32]) for i in range(len(data))}
    with pytest.raises(ConfigError, match=r"block_size=9000000 needs at least 9000001 tokens"):
        TokenDataset(shards, 9_000_000)


def test_a_table_without_rows_does_not_go_on_for_ever(tmp_path) -> None:
    """Its epochs are empty, and nobody asked how many there are."""
    path = tmp_path / "empty.parquet"
    pyarrow.parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])).close()
    data = StreamingTokens(open_source(str(path)), ByteTokenizer(), block_size=4, epochs=None)
    with pytest.raises(DataError, match="there is no text in it"):
        next(iter(data))
