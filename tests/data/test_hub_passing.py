"""Data sets of the hub that are larger than the disk: read from the server by ranges, or prepared file after file."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Fault, HubServer, parquet
from torch.utils.data import DataLoader

from regpt.cli import main
from regpt.config import Config, DataConfig, TokenizerConfig
from regpt.data import download, ranged, sources
from regpt.data import prepare as preparing
from regpt.data.corpus import corpus, tokenizer_for
from regpt.data.prepare import passing, prepare
from regpt.data.shards import Shards
from regpt.data.sources import Source, open_source
from regpt.data.streaming import StreamingTokens
from regpt.errors import DataError
from regpt.tokenizers.bytes import ByteTokenizer

pytestmark = pytest.mark.network
BYTES = ByteTokenizer()
RANDOM = random.Random(0)
GROUPS, GROUP_ROWS = 6, 20
FILES = {
    f"data/train-{n:05}-of-00004.parquet": parquet(
        [f"document {n}.{i} {RANDOM.randbytes(4000).hex()}" for i in range(GROUPS * GROUP_ROWS)],
        rows_in_group=GROUP_ROWS,
    )
    for n in range(4)
}
EVERY_BYTE = sum(map(len, FILES.values()))


def small(n: int, rows: int = 30) -> bytes:
    return parquet([f"small {n}.{i} " * 5 for i in range(rows)], rows_in_group=7)


def lines(n: int) -> bytes:
    rows = ["", " \n", "ümlaut € 🦆", *(f"line {n}.{i} " * (i % 40) for i in range(60))]
    return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()


def separated(ending: str) -> bytes:
    texts = [f"{i}: " + f"once upon a time{ending}" * (i % 60) for i in range(50)]
    return f"{ending}<|endoftext|>{ending}".join([*texts[:20], "", *texts[20:]]).encode()


KINDS = {
    "parquet": {f"data/train-{n}.parquet": small(n) for n in range(3)},
    "empty": {"a.parquet": small(0), "b.parquet": parquet([]), "c.parquet": small(2)},
    "jsonl": {f"train-{n}.jsonl": lines(n) for n in range(3)},
    "packed": {f"train-{n}.jsonl.gz": gzip.compress(lines(n)) for n in range(3)},
    "separated": {"train.txt": separated("\n")},
    "texts": {"a.txt": separated("\r\n"), "b.txt": b"\0" + separated("\n"), "c.txt": b"no end" * 900, "d.txt": b"x"},
    "single": {"train.txt": b"one long text. " * 900},
}  # fmt: skip


def put(hub: HubServer, files: dict[str, bytes], folder: Path) -> Source:
    """The files on the hub as o/n, and on the disk; that of the disk."""
    hub.commit("o/n", files)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return open_source(str(folder / next(iter(files)) if len(files) == 1 else folder))


def plain(rows: object) -> list[list[int]]:
    """Rows with their last target."""
    return [[*r["input_ids"].tolist(), int(r["targets"][-1])] for r in rows]  # type: ignore[attr-defined]


def downloaded(folder: Path) -> list[Path]:
    """Files of data sets that lie there, whole or in part."""
    return [p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".json", ".lock")]


# --- on the fly -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 3])
def test_rows_are_those_of_the_same_files_on_disk(kind, world, hub, tmp_path, monkeypatch) -> None:
    """Row by row, for every rank; nothing is stored but a text that has to be cut by its length."""
    monkeypatch.setattr(sources, "PART_BYTES", 600)
    local = put(hub, KINDS[kind], tmp_path / "local")
    remote = open_source("hf:o/n")
    for rank in range(world):
        settings = {"rank": rank, "world": world, "shuffle_rows": 4, "epochs": 2}
        expected = plain(StreamingTokens(local, BYTES, 33, **settings))
        assert plain(StreamingTokens(remote, BYTES, 33, keep_downloads=False, **settings)) == expected != []
    assert bool(downloaded(tmp_path / "cache")) == (kind == "single")
    if kind == "single":
        return
    list(StreamingTokens(remote, BYTES, 33))
    assert bool(downloaded(tmp_path / "cache")) == (kind == "packed")  # by default once for all processes


def test_articles_are_joined_on_the_fly(hub, tmp_path) -> None:
    rows = [line for n in range(50) for line in ("", f" = {n} = \n", "", f" text of {n} \n" * 5)]
    name = "wikitext-103-raw-v1/train-00000-of-00001.parquet"
    hub.commit("Salesforce/wikitext", {name: parquet(rows)})
    streamed = plain(StreamingTokens(open_source("wikitext-103"), BYTES, 33))
    assert not downloaded(tmp_path / "cache")
    source = open_source("wikitext-103")
    source.files[0].local()
    assert plain(StreamingTokens(source, BYTES, 33)) == streamed != []


def test_a_rank_fetches_its_own_row_groups_alone(hub, tmp_path) -> None:
    """Half of the bytes each, and the footers; all documents are there; nothing lands on the disk."""
    local = put(hub, FILES, tmp_path / "local")
    for rank in range(2):
        before = hub.bytes_of("/cdn/")
        rows = plain(StreamingTokens(open_source("hf:o/n"), BYTES, 512, rank=rank, world=2))
        assert rows == plain(StreamingTokens(local, BYTES, 512, rank=rank, world=2))
        assert 0.49 < (hub.bytes_of("/cdn/") - before) / EVERY_BYTE < 0.6
    assert not downloaded(tmp_path / "cache")


def test_the_first_row_costs_one_footer_and_one_row_group(hub) -> None:
    """However many files there are."""
    hub.commit("o/n", FILES)
    rows = iter(StreamingTokens(open_source("hf:o/n"), BYTES, 512))
    assert not hub.asked("/cdn/")
    next(rows)
    assert {s.path[-24:] for s in hub.asked("/cdn/")} == {"ain-00000-of-00004.parquet"[-24:]}
    assert hub.bytes_of("/cdn/") < 1.2 * EVERY_BYTE / 4 / GROUPS + (1 << 16)


def test_of_a_file_the_footer_is_read_once_and_the_text_column(hub) -> None:
    """However large the footer is, and whatever else a row holds."""
    texts = [f"text {i} {RANDOM.randbytes(200).hex()}" for i in range(400)]
    columns = {"text": texts, "url": [RANDOM.randbytes(4000).hex() for _ in texts]}
    columns |= {f"fact {n}": [f"{n} of {i}" for i in range(400)] for n in range(4)}
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, row_group_size=2)
    content = out.getvalue()
    footer = int.from_bytes(content[-8:-4], "little")
    assert footer > 2 * (1 << 16) and len(content) > 1_500_000
    hub.commit("o/n", {"a.parquet": content})
    rows = plain(StreamingTokens(open_source("hf:o/n"), BYTES, 64))
    assert len(rows) == sum(len(t) + 1 for t in texts) // 64
    metadata = pq.ParquetFile(out).metadata
    of_text = sum(metadata.row_group(g).column(0).total_compressed_size for g in range(200))
    assert hub.bytes_of("/cdn/") <= footer + of_text + 2 * (1 << 16)
    assert len(hub.asked("/cdn/")) <= 200 + 2


@pytest.mark.parametrize("files", ["parquet", "packed"])
def test_a_resumed_stream_fetches_nothing_of_earlier_files(files, hub, tmp_path) -> None:
    """Exactly the rows that were to come, by another object, at the cost of one row group and a footer, or one file."""
    content = FILES if files == "parquet" else KINDS["packed"]
    hub.commit("o/n", content)

    def stream() -> StreamingTokens:
        block_size = 4096 if files == "parquet" else 64
        return StreamingTokens(open_source("hf:o/n"), BYTES, block_size, keep_downloads=False, epochs=2)

    expected = plain(stream())
    for share in (0.45, 0.95):  # in the first epoch, and in the second, which begins anew
        at = int(share * len(expected))
        first = stream()
        begun = list(itertools.islice(first, at))
        state = json.loads(json.dumps(first.state_dict()))
        assert state["file"][2] > 0
        second = stream()
        second.load_state_dict(state)
        begun_with = len(hub.asked("/cdn/"))
        rows = iter(second)
        rest = [next(rows)]
        if files == "parquet":
            served = hub.asked("/cdn/")[begun_with:]
            assert sum(s.sent for s in served) < 1.2 * EVERY_BYTE / 4 / GROUPS + (1 << 16)
        assert not [s for s in hub.asked("/cdn/")[begun_with:] if re.search(r"train-0+[.-]", s.path)]
        assert plain([*begun, *rest, *rows]) == expected
    assert not downloaded(tmp_path / "cache")


def test_every_state_goes_on_exactly(hub, monkeypatch) -> None:
    """Of several streams, stopped at any row of three epochs; the epoch after it reads all files again."""
    monkeypatch.setattr(sources, "PART_BYTES", 600)
    hub.commit("o/n", {**KINDS["parquet"], "data/train-3.parquet": parquet([])})
    source = open_source("hf:o/n")
    settings = {"streams": 4, "shuffle_rows": 3, "epochs": 3}
    expected = plain(StreamingTokens(source, BYTES, 50, **settings))
    for at in range(0, len(expected) + 1, 7):
        first = StreamingTokens(source, BYTES, 50, **settings)
        begun = list(itertools.islice(first, at))
        second = StreamingTokens(source, BYTES, 50, **settings)
        second.load_state_dict(first.state_dict())
        begun += itertools.islice(second, 5)
        third = StreamingTokens(source, BYTES, 50, **settings)
        third.load_state_dict(second.state_dict())
        assert plain([*begun, *third]) == expected
    state = first.state_dict()
    for wrong in ([0, 0], [0, 0, "0"], None):
        with pytest.raises(DataError, match="not the state of a stream"):
            first.load_state_dict({**state, "file": wrong})


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_read_for_themselves(hub, tmp_path) -> None:
    """In forked processes, and in those that get the data set pickled."""
    local = put(hub, KINDS["parquet"], tmp_path / "local")
    remote = StreamingTokens(open_source("hf:o/n"), BYTES, 16, streams=2)
    next(iter(remote))
    remote = pickle.loads(pickle.dumps(remote))  # noqa: S301
    expected = plain(StreamingTokens(local, BYTES, 16, streams=2))
    assert sorted(plain(DataLoader(remote, batch_size=None, num_workers=2))) == sorted(expected)


def test_a_file_of_the_cache_is_read_there(hub, tmp_path) -> None:
    """The parts are the same, so a state goes on when files have come or gone."""
    hub.commit("o/n", FILES)
    source = open_source("hf:o/n")
    expected = plain(StreamingTokens(source, BYTES, 512))
    first = StreamingTokens(source, BYTES, 512)
    begun = list(itertools.islice(first, 100))
    for number in range(4):
        source.files[number].local()
    asked = len(hub.asked("/cdn/"))
    second = StreamingTokens(source, BYTES, 512)
    second.load_state_dict(first.state_dict())
    assert plain([*begun, *second]) == expected and len(hub.asked("/cdn/")) == asked


def test_failures_inside_a_range_are_passed(hub, slept, tmp_path) -> None:
    """What came before a cut is not asked for again; a server that knows no ranges is read from its beginning."""
    local = put(hub, FILES, tmp_path / "local")
    expected = plain(StreamingTokens(local, BYTES, 512))
    faults = [
        Fault(cut=10_000), Fault(429, {"Retry-After": "3"}), Fault(cut=0), Fault(503), Fault(reset=5_000),
        Fault(ignore_range=True), Fault(body=lambda b: b[:-100]), Fault(cut=70_000),
    ]  # fmt: skip
    hub.fail("/cdn/", *[f for fault in faults for f in (fault, Fault())])
    said: list[str] = []
    assert plain(StreamingTokens(open_source("hf:o/n", note=said.append), BYTES, 512)) == expected
    assert 3.0 in slept and len(said) == len(faults) - 1
    assert any("the connection ended after 10,000 of" in s for s in said)
    hub.fail("/cdn/.*00001-of", *[Fault(500)] * download.ATTEMPTS)
    rows = iter(StreamingTokens(open_source("hf:o/n"), BYTES, 512))
    with pytest.raises(DataError, match=r"cannot download .*00001-of-00004.parquet: HTTP 500(.|\n)*a mirror"):
        list(rows)
    hub.gated.add("o/n")
    with pytest.raises(DataError, match="accept its terms"):
        next(iter(StreamingTokens(open_source("hf:o/n"), BYTES, 512)))


def test_what_cannot_be_streamed_is_said(hub, slept, tmp_path, monkeypatch) -> None:
    hub.commit("o/n", FILES | {"bad/a.parquet": bytes(1000), "bad/b.jsonl": b'{"text": "x"}\n' * 60 + b"{\n"})
    monkeypatch.setattr(sources, "PART_BYTES", 300)
    for spec, said in (
        ("hf:o/n:bad/a.parquet", r"bad/a.parquet of hf:o/n.* is damaged or not parquet"),
        ("hf:o/n:bad/b.jsonl", r"bad/b.jsonl \(from byte \d+ on\):\d+ is not valid JSON"),
    ):
        with pytest.raises(DataError, match=said):
            list(StreamingTokens(open_source(spec), BYTES, 8))
    with pytest.raises(
        DataError, match=r"00000-of-00004.parquet of hf.* has no field 'txt'.\n  got: the fields id, text"
    ):
        next(iter(StreamingTokens(open_source("hf:o/n:data", text_field="txt"), BYTES, 8)))
    monkeypatch.setattr(download, "DOCUMENT_BYTES", 100)
    hub.fail("/cdn/", *[Fault(ignore_range=True)] * download.WRONG_ANSWERS)
    source = open_source("hf:o/n:data")
    with pytest.raises(DataError, match="asked for a few of its bytes, the server sends all of them"):
        next(iter(StreamingTokens(source, BYTES, 8)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError, match="is not on this machine, and HF_HUB_OFFLINE is set"):
        next(iter(StreamingTokens(open_source("hf:o/n:data"), BYTES, 8)))


def test_a_ranged_file_is_a_file(hub, tmp_path) -> None:
    """Any seek and read, beside the same file on the disk; its end is asked for once."""
    put(hub, FILES, tmp_path)
    name = next(iter(FILES))
    source = open_source("hf:o/n").streamed()
    file = source.files[0].ranged()
    assert file is not None and file.size == len(FILES[name])
    with open(tmp_path / name, "rb") as other:
        rng = random.Random(1)
        for _ in range(60):
            whence = rng.choice([os.SEEK_SET, os.SEEK_END])
            offset = rng.randint(0, file.size + 10) - (file.size if whence == os.SEEK_END else 0)
            offset = max(offset, -file.size)
            n = rng.choice([0, 1, 8, 1000, 1 << 17])
            assert file.seek(offset, whence) == other.seek(offset, whence)
            assert file.read(n) == other.read(n) and file.tell() == other.tell()
    fresh = file.again()
    asked = len(hub.asked("/cdn/"))
    for _ in range(3):
        assert fresh.between(fresh.size - 100, fresh.size + 7) == FILES[name][-100:]
        assert fresh.between(fresh.size - 300, fresh.size - 50) == FILES[name][-300:-50]
    assert [s.sent for s in hub.asked("/cdn/")[asked:]] == [100, 200]
    assert len(fresh._tail) <= ranged.KEPT_BYTES


# --- prepared ---------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("workers", [1, 2])
def test_files_that_pass_give_the_same_shards(workers, hub, tmp_path, monkeypatch) -> None:
    """The cache stays empty; of training and of validation text two files at most lie there; each is fetched once."""
    dev = {f"dev/dev-{n}.parquet": FILES[name] for n, name in enumerate([*FILES][2:])}
    train = dict(itertools.islice(FILES.items(), 2)) | {"data/train-00009.parquet": small(9)}
    hub.commit("o/n", train | dev)
    monkeypatch.setattr(preparing, "DISCARDED_BYTES", 0)
    held: list[int] = []

    def look(done: int, total: int) -> None:
        for text in ("train", "val"):
            there = downloaded(tmp_path / ".b.partial/downloads" / text)
            held.append(len({p.name.split(".")[0] for p in there}))

    both = open_source("hf:o/n:data"), open_source("hf:o/n:dev", split="validation")
    settings = {"val_fraction": 0, "workers": workers, "shard_tokens": 200_000}
    source, val_source = passing(tmp_path / "b", *both)
    assert source.fingerprint == both[0].fingerprint and source.stored_bytes == both[0].stored_bytes
    prepare(source, BYTES, tmp_path / "b", val_source=val_source, progress=look, **settings)
    assert not downloaded(tmp_path / "cache") and not (tmp_path / ".b.partial").exists()
    assert max(held) == 2
    for name, whole in (train | dev).items():
        assert hub.bytes_of(f"cdn/.*{name}") == len(whole)
    prepare(both[0], BYTES, tmp_path / "a", val_source=both[1], **settings)
    assert content(tmp_path / "a") == content(tmp_path / "b") and len(downloaded(tmp_path / "cache")) == 5


def test_what_the_cache_has_is_used_and_left(hub, tmp_path, monkeypatch) -> None:
    hub.commit("o/n", FILES)
    monkeypatch.setattr(preparing, "DISCARDED_BYTES", 0)
    source = open_source("hf:o/n")
    source.files[0].local()
    for thread in source.files[0].remote[0]._coming.values():
        thread.join()
    kept = downloaded(tmp_path / "cache")
    source, _ = passing(tmp_path / "out", source, None)
    prepare(source, BYTES, tmp_path / "out", val_fraction=0, workers=1)
    assert downloaded(tmp_path / "cache") == kept and len(kept) == 2


SCRIPT = """
import os, sys
from pathlib import Path
from regpt.data import prepare as module
from regpt.data.prepare import passing, prepare
from regpt.data.sources import open_source
from regpt.tokenizers import open_tokenizer

module.DISCARDED_BYTES = 0

def progress(done, total):
    if done > float(sys.argv[1]) * total:
        os.kill(os.getpid(), 9)

out = Path("out")
source, _ = passing(out, open_source("hf:o/n"), None)
prepare(source, open_tokenizer("bytes"), out, val_fraction=0.1, workers=2, progress=progress)
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_killed_preparation_does_not_fetch_again_what_it_finished(hub, tmp_path) -> None:
    """SIGKILL in the third file, and again in the last; then the same bytes as without."""
    hub.commit("o/n", FILES)
    for share, status in ((0.6, -signal.SIGKILL), (0.85, -signal.SIGKILL), (2.0, 0)):
        asked = len(hub.asked("/cdn/"))
        command = [sys.executable, "-c", SCRIPT, str(share)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        assert made.returncode == status, made.stderr
        whole = [s.path[-23:-17] for s in hub.asked("/cdn/")[asked:] if s.status == 200]
        assert share == 0.6 or not {"-00000", "-00001"} & {*whole}
        for name, size in ((n, len(c)) for n, c in FILES.items()):
            left = [p for p in downloaded(tmp_path / ".out.partial/downloads") if p.name == Path(name).name]
            assert not left or left[0].stat().st_size == size
    assert not downloaded(tmp_path / "cache") and not (tmp_path / ".out.partial").exists()
    prepare(open_source("hf:o/n"), BYTES, tmp_path / "whole", val_fraction=0.1, workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_lost_network_loses_no_work(hub, slept, tmp_path, monkeypatch) -> None:
    """What the journal has stays, and the same command goes on from there."""
    hub.commit("o/n", FILES)
    monkeypatch.setattr(preparing, "DISCARDED_BYTES", 0)
    source, _ = passing(tmp_path / "out", open_source("hf:o/n"), None)
    hub.fail("/cdn/.*00003-of", *[Fault(500)] * download.ATTEMPTS)
    with pytest.raises(DataError, match="cannot download"):
        prepare(source, BYTES, tmp_path / "out", val_fraction=0, workers=1)
    assert (tmp_path / ".out.partial/journal.json").exists()
    asked = len(hub.asked("/cdn/"))
    source, _ = passing(tmp_path / "out", open_source("hf:o/n"), None)
    manifest = prepare(source, BYTES, tmp_path / "out", val_fraction=0, workers=1)
    assert manifest.splits["train"].documents == 4 * GROUPS * GROUP_ROWS
    assert not [s for s in hub.asked("/cdn/")[asked:] if "00000-of" in s.path or "00001-of" in s.path]


def test_room_for_two_files_is_enough(hub, tmp_path, monkeypatch) -> None:
    """The same disk holds the shards; less than that is refused before the first byte."""
    hub.commit("o/n", FILES)
    usage = shutil.disk_usage(tmp_path)
    two = max(a + b for a, b in itertools.pairwise(map(len, FILES.values())))

    def free(n: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n))

    source, _ = passing(tmp_path / "out", open_source("hf:o/n"), None)
    shards = 2 * source.source_bytes  # bytes as uint16
    free(two + shards - 1)
    with pytest.raises(DataError, match=r"disk full: .* of text and the download [\d.]+ MB more"):
        prepare(source, BYTES, tmp_path / "out", val_fraction=0)
    free(two - 1)
    with pytest.raises(DataError, match=r"GB more in .*\.out\.partial/downloads(.|\n)*--out on another disk"):
        source.files[0].local()
    assert not hub.asked("/cdn/")
    free(two + shards)
    assert (
        prepare(source, BYTES, tmp_path / "out", val_fraction=0, workers=1).splits["train"].documents == 480
    )


def test_packed_files_texts_and_articles_pass(hub, tmp_path, monkeypatch) -> None:
    """A text of one file is known for one with separators by its beginning, so it is not downloaded for that."""
    monkeypatch.setattr(preparing, "DISCARDED_BYTES", 0)
    rows = [line for n in range(50) for line in ("", f" = {n} = \n", "", f" text of {n} \n" * 5)]
    hub.commit("Salesforce/wikitext", {"wikitext-103-raw-v1/train-00000-of-00001.parquet": parquet(rows)})
    for number, kind in enumerate(("packed", "jsonl", "separated", "texts", "single", "articles")):
        if kind != "articles":
            hub.commit(f"o/{kind}", KINDS[kind])
        spec = "wikitext-103" if kind == "articles" else f"hf:o/{kind}"
        out = tmp_path / str(number)
        source, _ = passing(out, open_source(spec), None)
        prepare(source, BYTES, out, val_fraction=0.1, workers=1)
        assert not downloaded(tmp_path / "cache")
        prepare(open_source(spec), BYTES, tmp_path / f"kept-{kind}", val_fraction=0.1, workers=1)
        assert content(out) == content(tmp_path / f"kept-{kind}")
        shutil.rmtree(tmp_path / "cache")


def test_a_tokenizer_learns_from_the_server(hub, tmp_path) -> None:
    """Where nothing is kept, its pass over the text leaves nothing either; the same tokenizer."""
    hub.commit("o/n", KINDS["parquet"])
    made = []
    for source in (passing(tmp_path / "out", open_source("hf:o/n"), None)[0], open_source("hf:o/n")):
        asked = TokenizerConfig(name="bpe", vocab_size=280)
        made.append(tokenizer_for(asked, source, None, 0.1, lambda *_: None).fingerprint)
        assert bool(downloaded(tmp_path)) == (len(made) == 2)
    assert made[0] == made[1]


def test_on_the_command_line_and_in_a_run(hub, tmp_path, capsys) -> None:
    """The setting is said in both; what is downloaded, and how much of it lies there at a time, is said first."""
    hub.commit("o/n", FILES)
    command = ["prepare", "hf:o/n", "--out", "out", "--tokenizer", "bytes", "--keep-downloads", "false"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert "to download, at most" in said and ".out.partial/downloads" in said
    assert main(command) == 0
    assert "to download" not in capsys.readouterr().err
    data = DataConfig(source="hf:o/n", keep_downloads=False, workers=1, val_fraction=0.1)
    _, shards = corpus(Config(data=data, tokenizer=TokenizerConfig(name="bytes")))
    assert isinstance(shards, Shards) and not downloaded(tmp_path / "cache")
    kept = Config(data=DataConfig(source="hf:o/n", val_fraction=0.1), tokenizer=TokenizerConfig(name="bytes"))
    assert corpus(kept)[1].path == shards.path and not downloaded(tmp_path / "cache")
