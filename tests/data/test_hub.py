"""Data sets of the hub, from a server of our own that speaks its API: which files, in which order, through every failure."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from hub_server import Fault, HubServer, parquet

import regpt.data.hub
from regpt.cli import main
from regpt.config import Config, DataConfig, TokenizerConfig, load_preset
from regpt.data import download, sources
from regpt.data.articles import articles
from regpt.data.corpus import corpus, data_folder, known_corpus, text_identity
from regpt.data.documents import documents
from regpt.data.hub import Spec
from regpt.data.layout import choose, matching
from regpt.data.named import NAMED_SETS
from regpt.data.prepare import prepare
from regpt.data.shards import Shards
from regpt.data.sources import Source, open_source, open_sources
from regpt.errors import ConfigError, DataError, DeviceError
from regpt.tokenizers import load_tokenizer, open_tokenizer

pytestmark = pytest.mark.network
SHARDS = {
    f"data/train-{n:05}-of-00003.parquet": parquet([f"document {n}.{i}" for i in range(120)])
    for n in range(3)
}
FIRST = "data/train-00000-of-00003.parquet"


def texts(source: Source, work: Path) -> list[str]:
    """The documents of a source, read here."""
    work.mkdir(exist_ok=True)
    found = []
    for part in source.parts(work):
        found += ["".join(d()) for d in documents(part, sources.Counter())]
        if part.temporary:
            Path(part.path).unlink()
    return found


def labels(spec: str, split: str = "train") -> list[str]:
    return [f.label for f in open_source(spec, split=split).files]


# --- which files ------------------------------------------------------------------------------------------------------

FINEWEB = """---
license: odc-by
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: CC-MAIN-2013-20
  data_files:
  - split: train
    path: data/CC-MAIN-2013-20/*
---
# FineWeb-Edu
"""
WIKI = "".join(
    [
        "---\nconfigs:\n",
        *(
            f"- config_name: {c}\n  data_files:\n"
            + "".join(f"  - split: {s}\n    path: {c}/{s}-*\n" for s in ("test", "train", "validation"))
            for c in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
        ),
        "---\n",
    ]
)


def small(name: str) -> bytes:
    return parquet([f"{name} {i}" for i in range(3)])


def files(*names: str, readme: str = "") -> dict[str, bytes]:
    lines = [json.dumps({"text": f"line {i}"}).encode() for i in range(3)]
    made = {n: small(n) if n.endswith(".parquet") else b"\n".join(lines) + b"\n" for n in names}
    return made | ({"README.md": readme.encode()} if readme else {})


CRAWLS = (
    "data/CC-MAIN-2013-20/train-00000-of-00002.parquet",
    "data/CC-MAIN-2013-20/train-00001-of-00002.parquet",
)
EDU = files(
    *CRAWLS,
    "data/CC-MAIN-2024-10/train-00000-of-00001.parquet",
    "sample/10BT/000_00000.parquet",
    "sample/10BT/001_00000.parquet",
    "sample/100BT/000_00000.parquet",
    readme=FINEWEB,
)
STORIES = files("data/train-00000-of-00002-1ab.parquet", "data/train-00001-of-00002-2ab.parquet") | files(
    "data/validation-00000-of-00001-3ab.parquet", ".gitattributes", "TinyStoriesV2-GPT4-train.txt"
)
REPOSITORIES = {
    "sharded": (STORIES, "", {"train": 2, "validation": 1}),
    "yaml default": (EDU, "", {"train": 3}),
    "yaml config": (EDU, "sample-10BT", {"train": 2}),
    "yaml folder": (EDU, "CC-MAIN-2013-20", {"train": 2}),
    "yaml splits": (
        files(*(f"{c}/{s}-00000-of-00001.parquet" for c in ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
                for s in ("test", "train", "validation")), readme=WIKI),
        "wikitext-2-raw-v1",
        {"train": 1, "validation": 1, "test": 1},
    ),
    "default: true": (
        files("a/x.jsonl", "b/x.jsonl", readme="---\nconfigs:\n- config_name: a\n  data_files: a/x.jsonl\n"
              "- config_name: b\n  default: true\n  data_files: ['b/*.jsonl']\n---\n"),
        "",
        {"train": 1},
    ),
    "data_dir": (
        files("en/train.jsonl", "en/test.jsonl", "de/train.jsonl",
              readme="---\nconfigs:\n- config_name: en\n  data_dir: en\n- config_name: de\n  data_dir: de\n---\n"),
        "en",
        {"train": 1, "test": 1},
    ),
    "names": (files("train_0.jsonl", "train_1.jsonl", "my-test.jsonl"), "", {"train": 2, "test": 1}),
    "names in folders": (files("plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet"),
                         "", {"train": 2}),
    "folders": (files("x/train/b.parquet", "x/train/a.parquet", "x/dev/a.parquet"), "", {"train": 2, "validation": 1}),
    "everything": (files("b.parquet", "sub/a.parquet", ".hidden/c.parquet", "__pycache__/d.parquet"), "", {"train": 2}),
    "more of one form": (files("a.jsonl", "b.parquet", "c.parquet"), "", {"train": 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_files_and_splits_are_those_of_the_datasets_library(kind, hub, tmp_path, monkeypatch) -> None:
    """Where that library is installed its documents are compared, one by one; else how many files there are."""
    content, config, splits = REPOSITORIES[kind]
    hub.commit("owner/name", content)
    spec = f"hf:owner/name{f':{config}' if config else ''}"
    for split, count in splits.items():
        source = open_source(spec, split=split)
        assert len(source.files) == count
        if importlib.util.find_spec("datasets"):
            assert texts(source, tmp_path / "work") == _with_datasets(
                hub, config, split, tmp_path, monkeypatch
            )


def _with_datasets(hub: HubServer, config: str, split: str, tmp_path: Path, monkeypatch) -> list[str]:
    """What `datasets.load_dataset` gives, from the same server, without telling it anything but the names."""
    import datasets
    import huggingface_hub

    # These libraries read the environment when they are imported, which an earlier test may have done.
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_ENDPOINT", hub.url, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    datasets.disable_progress_bars()
    made = datasets.load_dataset(
        "owner/name",
        config or None,
        split=split,
        cache_dir=str(tmp_path / "datasets"),
        verification_mode="no_checks",
    )
    return list(made["text"])


@pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="the datasets library is not installed")
def test_datasets_streams_the_same_texts(hub, tmp_path, monkeypatch) -> None:
    """The authority on a set of several files with empty rows and nulls: the same texts in the same order."""
    rows = [None if i % 7 == 0 else "" if i % 11 == 0 else f"tëxt {i}" for i in range(300)]
    hub.commit(
        "owner/name", {FIRST: parquet(rows[:170]), FIRST.replace("00000", "00001"): parquet(rows[170:])}
    )
    theirs = [t for t in _with_datasets(hub, "", "train", tmp_path, monkeypatch) if t]
    assert texts(open_source("hf:owner/name"), tmp_path / "work") == theirs


def test_the_listing_is_that_of_huggingface_hub(hub) -> None:
    """Paths, sizes and hashes as the hub's own client reads them, over several pages."""
    library = pytest.importorskip("huggingface_hub")
    content = {f"data/{n:03}.parquet": small(str(n)) for n in range(7)} | files("x.json", readme=FINEWEB)
    commit = hub.commit("owner/name", content)
    hub.page = 3
    theirs = library.HfApi(endpoint=hub.url).list_repo_tree("owner/name", recursive=True, repo_type="dataset")
    known = {(f.path, f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in theirs if hasattr(f, "size")}
    hub.links_to = "https://another.host"  # as of a mirror that passes on the hub's own links
    repository = regpt.data.hub._Hub("owner/name", True, lambda _: None)
    tree = repository.tree(repository.commit("main"))
    assert {(e.path, e.size, e.digest) for e in tree.files} == known and len(known) == 9
    assert tree.commit == commit and tree.readme == FINEWEB


def test_files_by_name_folder_or_glob() -> None:
    """`*` stays in a folder, `**` does not."""
    paths = ["a.txt", "b/a.txt", "b/c/a.txt", "b/c/d.jsonl", "x[1].txt"]
    assert matching(paths, "*.txt") == ["a.txt", "x[1].txt"]
    assert matching(paths, "**/a.txt") == ["a.txt", "b/a.txt", "b/c/a.txt"] and matching(paths, "**") == paths
    assert matching(paths, "b/*") == ["b/a.txt"] and matching(paths, "b/?.txt") == ["b/a.txt"]
    assert matching(paths, "[!b].txt") == ["a.txt"] and matching(paths, "b/[") == []
    assert matching(paths, "b/**") == ["b/a.txt", "b/c/a.txt", "b/c/d.jsonl"]


def test_globs_are_those_of_fsspec() -> None:
    """By which the `datasets` library finds files: every pattern of up to three of these names."""
    utils = pytest.importorskip("fsspec.utils")
    paths = ["/".join(p) for k in (1, 2, 3) for p in itertools.product(("a", "b", "ab", "ba"), repeat=k)]
    pieces = ("a", "ab", "*", "**", "?", "a*", "*b", "[ab]", "[!a]")
    for pattern in ("/".join(p) for k in (1, 2, 3) for p in itertools.product(pieces, repeat=k)):
        theirs = re.compile(utils.glob_translate(pattern))
        assert matching(paths, pattern) == sorted(p for p in paths if theirs.match(p)), pattern


def aliases(levels: int, through: str) -> str:
    """YAML that is ten times as large with each level."""
    lines = [f"  - &a{n + 1} {through.format(', '.join([f'*a{n}'] * 10))}" for n in range(levels)]
    return "\n".join(["a:", f"  - &a0 {through.format('')}", *lines, ""])


@pytest.mark.parametrize(
    "front, said",
    [
        ("configs:\n- data_files:\n  - path: a.parquet\n", "there is no 'split'"),
        ("configs:\n- data_files:\n  - split: train\n", "there is no 'path'"),
        ("configs:\n- data_files:\n  - a.parquet\n  - {split: train}\n", "a dict stands where a name"),
        ("configs:\n- config_name: [a]\n", "a list stands where a name"),
        ("configs:\n- data_dir: {a: b}\n", "a dict stands where a name"),
        ("configs: 3\n", "configs is not a list of configurations"),
        ("configs:\n  a: b\n", "configs is not a list of configurations"),
        ("configs:\n- 3\n", "configs is not a list of configurations"),
        ("configs:\n- &a [*a]\n", "recursive"),
        (f"{aliases(99, '[{}]')}configs:\n- data_files: *a99\n", "a list stands where a name"),
        (f"{aliases(99, '{{? b : [{}]}}')}configs:\n- config_name: *a99\n", "a dict stands where a name"),
        (f"{aliases(99, '{{<<: [{}]}}')}configs:\n- *a99\n", "a configuration is merged from others by <<"),
        (f"configs:\n- {'[' * 20_000}\n", "recursion"),
        (f"configs:\n- data_files: {'*' * 2000}\n", "expected alphabetic or numeric character"),
        (f"configs:\n- data_files: '{'*' * 2000}'\n", "a name or pattern of 2,000 characters, more than 1,000"),
        (f"configs:\n- data_files: [{'x, ' * 20_000}]\n", "data_files has 20,000 patterns, more than 10,000"),
        (f"configs:\n#{'x' * (2 << 20)}\n", "it has 2,097,162 characters, more than 2,097,152"),
    ],
)  # fmt: skip
def test_a_readme_that_cannot_be_read_is_said(front, said) -> None:
    """Also one of a few kilobytes that would take memory and time without end."""
    with pytest.raises(DataError, match=f"o/n: the front matter of README.md cannot be read: .*{said}") as e:
        choose(["a.parquet"], f"---\n{front}---\n", "o/n", None, "train")
    assert len(str(e.value)) < 500


def test_a_readme_costs_no_more_than_reading_it() -> None:
    """Patterns and texts on which a matcher that tries all ways would not come back."""
    deep, far = "a/" * 300 + "x.parquet", "a" * 200 + ".parquet"
    front = f"configs:\n- data_files: ['{'**/' * 200}y', '{'*a' * 90}b', '{far[:9]}*']\n"
    assert choose([deep, far], f"---\n{front}---\n", "o/n", None, "train") == (far,)
    for readme in (
        "---" + "\n" * 300_000,
        "---\n" + ("\n---" + " " * 999 + "x") * 999,
        "---\r\n\r\n--- \r\n",
    ):
        assert choose([far], readme, "o/n", None, "train") == (far,)


def test_what_yaml_takes_for_numbers_and_truth_are_names_here() -> None:
    front = "configs:\n- {config_name: 2020, data_files: a.txt}\n- {config_name: no, data_files: b.txt, default: true}\n"
    readme = f"---\n{front}- {{config_name: en, data_dir: , data_files: null}}\n---\n"
    files = [
        choose(["a.txt", "b.txt"], readme, "o/n", config, "train") for config in ("2020", "no", "en", None)
    ]
    assert files == [("a.txt",), ("b.txt",), ("a.txt", "b.txt"), ("b.txt",)]


def test_a_config_may_be_a_file_a_folder_or_a_glob(hub) -> None:
    hub.commit("o/n", EDU)
    assert labels("hf:o/n:sample/10BT") == ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]
    assert labels("hf:o/n:data/*/train-00000*") == [
        CRAWLS[0],
        "data/CC-MAIN-2024-10/train-00000-of-00001.parquet",
    ]
    assert labels("hf:o/n:sample/100BT/000_00000.parquet") == ["sample/100BT/000_00000.parquet"]


def test_scripts_are_not_run_the_hubs_conversion_is_read(hub) -> None:
    """refs/convert/parquet, where the main branch has a script or only other formats; a conversion of a part is refused."""
    main = hub.commit("o/old", files("old.py", "raw/train.jsonl", "README.md"))
    before = hub.commit("o/old", files("old.py", "raw/train.jsonl"), branch="v1")
    converted = files(
        "plain_text/train/0000.parquet", "plain_text/train/0001.parquet", "plain_text/test/0000.parquet"
    )
    hub.commit("o/old", converted, branch="refs/convert/parquet")
    assert labels("hf:o/old") == ["plain_text/train/0000.parquet", "plain_text/train/0001.parquet"]
    assert labels("hf:o/old:plain_text", "test") == ["plain_text/test/0000.parquet"]
    assert labels(f"hf:o/old@{main}") == labels("hf:o/old@refs/convert/parquet") == labels("hf:o/old")
    for revision in ("v1", before):
        with pytest.raises(
            DataError,
            match=rf"no files at {revision} that are read without a script.* is of main as it is now.\n  try: hf:o/old takes",
        ):
            open_source(f"hf:o/old@{revision}")
    hub.commit("o/csv", {"a.csv": b"text\nx\n"})
    with pytest.raises(
        DataError, match=r"o/csv holds nothing that regpt reads.\n  expected: parquet, JSONL or text"
    ):
        open_source("hf:o/csv")
    for number, layout in enumerate(("partial-train", "partial/train")):
        hub.commit(f"o/part{number}", {"a.csv": b"text\nx\n"})
        hub.commit(f"o/part{number}", files(f"c/{layout}/0000.parquet"), branch="refs/convert/parquet")
        with pytest.raises(DataError, match=r"has only been converted in part(.|\n)*--split partial-train"):
            open_source(f"hf:o/part{number}")
        assert labels(f"hf:o/part{number}", "partial-train") == [f"c/{layout}/0000.parquet"]


def test_what_is_ambiguous_or_not_there_is_said(hub) -> None:
    """Every choice is listed, before anything is downloaded."""
    hub.commit("o/wiki", REPOSITORIES["yaml splits"][0])
    for spec, split, said in [
        (
            "hf:o/wiki",
            "train",
            r"has several configurations.\n  got: .*wikitext-103-raw-v1, wiki.*\n  try: hf:o/wiki:wiki",
        ),
        (
            "hf:o/wiki:wikitext-2-raw",
            "train",
            r"no configuration 'wikitext-2-raw'.* Did you mean wikitext-2-raw-v1\?",
        ),
        (
            "hf:o/wiki:wikitext-2-raw-v1",
            "trian",
            r"no split 'trian'. Did you mean train\?\n  got: the splits test, train",
        ),
        (
            "hf:o/none",
            "train",
            r"there is no data set o/none at http.*HF_TOKEN is not set.\n  got: Repository not found",
        ),
        ("hf:o/wiki@v9", "train", r"o/wiki has no such revision.\n  got: Invalid rev id: v9"),
    ]:
        with pytest.raises(DataError, match=said):
            open_source(spec, split=split)
    assert not hub.asked("/cdn/|resolve/.*parquet")
    hub.commit("o/bad", files("a.parquet", readme="---\nconfigs: [\n---\n"))
    with pytest.raises(DataError, match=r"front matter of README.md cannot be read"):
        open_source("hf:o/bad")
    for wrong in ("hf:", "hf:/x", "hf:a/b/c", "hf:a/b@", "hf:a/..", "hf:a b/c"):
        with pytest.raises(
            ConfigError, match=r"does not name a data set of the hub.\n  expected: hf:owner/name"
        ):
            open_source(wrong)
    assert Spec.parse("hf:a/b:c/d*@refs/pr/1") == Spec("a/b", "c/d*", "refs/pr/1")


def test_a_listing_with_paths_that_lead_elsewhere_is_refused(hub) -> None:
    """Nothing outside the cache folder can be written by what a server says."""
    for name in ("../../x.parquet", "/etc/x.parquet", "x\0.parquet"):
        hub.commit("o/evil", {name: small("x")})
        with pytest.raises(DataError, match="lists a file without path, size or hash"):
            open_source("hf:o/evil")
    for name in ("a\\..\\..\\x.parquet", "C:x.parquet", "x.parquet:stream.parquet"):
        hub.commit("o/evil", {name: small("x"), "fine.jsonl.gz": b""})
        with pytest.raises(DataError, match=f"leads elsewhere on some systems.\n  got: {re.escape(name)}"):
            open_source("hf:o/evil")
    hub.commit("o/fine", files("12:30/a.parquet") | {"b:c.png": b"asked for by nobody"})
    assert labels("hf:o/fine") == ["12:30/a.parquet"]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_every_failure_that_may_pass_is_passed(hub, slept, tmp_path) -> None:
    """429 with its Retry-After, 500, a cut: in the end the same documents, no byte served twice."""
    hub.commit("o/n", SHARDS)
    hub.fail("revision/main", Fault(503))
    hub.fail("/tree/", Fault(429, {"Retry-After": "7"}))
    hub.fail(
        "cdn/.*00000-of",
        Fault(429, {"Retry-After": "3"}),
        Fault(500),
        Fault(cut=1000),
        Fault(cut=500),
        Fault(cut=0),
    )
    hub.fail("cdn/.*00001-of", Fault(500), Fault(502), Fault(504))
    said: list[str] = []
    source = open_source("hf:o/n", note=said.append)
    assert texts(source, tmp_path / "work") == [f"document {n}.{i}" for n in range(3) for i in range(120)]
    assert {1.0, 2.0, 4.0, 3.0, 7.0} <= set(slept)
    assert any(re.search(r"HTTP 429 .*; trying again in 3 s", s) for s in said)
    began = [s.first for s in hub.asked("cdn/.*00000-of") if s.status < 300]
    assert began == [0, 1000, 1500, 1500]  # with Range from where it was cut, never from the beginning
    for name, content in SHARDS.items():
        errors = sum(s.sent for s in hub.asked(f"cdn/.*{name}") if s.status >= 400)
        assert hub.bytes_of(f"cdn/.*{name}") - errors == len(content)
    assert texts(source, tmp_path / "work") and len(hub.asked("/cdn/")) == 11  # from the cache, asked nothing


def test_a_stopped_download_goes_on_in_another_process(hub, slept, tmp_path) -> None:
    """Given up after so many attempts; the part stays, and the next call asks only for the rest."""
    hub.commit("o/n", {FIRST: SHARDS[FIRST]})
    hub.fail("/cdn/", Fault(cut=1500), *[Fault(500)] * download.ATTEMPTS)
    with pytest.raises(
        DataError, match=r"cannot download http.*00000-of-00003.parquet: HTTP 500(.|\n)*a mirror"
    ) as e:
        texts(open_source("hf:o/n"), tmp_path / "work")
    assert "HF_ENDPOINT" in str(e.value) and "regpt prepare FOLDER" in str(e.value)
    assert open_source("hf:o/n").missing_bytes == len(SHARDS[FIRST]) - 1500
    assert len(texts(open_source("hf:o/n"), tmp_path / "work")) == 120
    assert hub.asked("/cdn/")[-1].first == 1500
    assert sum(slept) < 60


def test_a_server_that_ignores_ranges_is_read_from_the_beginning(hub, tmp_path) -> None:
    hub.commit("o/n", {FIRST: SHARDS[FIRST]})
    hub.fail("/cdn/", Fault(cut=1500), Fault(ignore_range=True))
    assert len(texts(open_source("hf:o/n"), tmp_path / "work")) == 120


def test_a_connection_that_is_reset_is_taken_up_again(hub, tmp_path) -> None:
    """What the system threw away with the connection is asked for again, nothing more."""
    content = parquet([f"document {i} " * 40 for i in range(9000)])
    hub.commit("o/n", {FIRST: content})
    hub.fail("/cdn/", Fault(reset=len(content) // 2))
    notes: list[str] = []
    assert len(texts(open_source("hf:o/n", note=notes.append), tmp_path / "work")) == 9000
    assert "trying again in 1 s" in notes[-1] and len(hub.asked("/cdn/")) == 2


@pytest.mark.parametrize(
    "fault, said",
    [
        (Fault(body=lambda b: bytes(20) + b[20:]), r"what came has the sha256 \w{64}, announced was \w{64}"),
        (Fault(body=lambda b: b[:-5]), r"the server sends [\d,]+ bytes \(application/octet-stream\) where [\d,]+ were"),
        (Fault(body=lambda b: b + b"more"), r"the server sends [\d,]+ bytes"),
        (Fault(body=lambda b: b"<html>log in", headers={"Content-Type": "text/html"}), r"12 bytes \(text/html\)"),
        (Fault(headers={"Content-Range": "bytes 5-9/10"}, cut=100), "the connection ended after 100 of"),
    ],
    ids=["content", "shorter", "longer", "html", "cut"],
)  # fmt: skip
def test_a_wrong_answer_is_never_taken(fault, said, hub, slept, tmp_path) -> None:
    """Once, and another attempt gets it right; again and again, and an error says what came. Nothing of it is kept."""
    hub.commit("o/n", {FIRST: SHARDS[FIRST]})
    hub.fail("/cdn/", fault)
    notes: list[str] = []
    assert len(texts(open_source("hf:o/n", note=notes.append), tmp_path / "work")) == 120
    assert re.search(said, "\n".join(notes))
    shutil.rmtree(tmp_path / "cache")
    if fault.cut is None:
        hub.fail("/cdn/", *[fault] * 10)
        with pytest.raises(DataError, match=said):
            texts(open_source("hf:o/n"), tmp_path / "work")
        assert len(hub.asked("/cdn/")) == 2 + download.WRONG_ANSWERS
        assert not [p for p in (tmp_path / "cache").rglob("*.parquet*") if p.suffix != ".lock"]


def test_small_files_are_compared_with_gits_hash(hub, tmp_path) -> None:
    """A file that is not in LFS has no sha256 in the list."""
    hub.commit("o/n", {"train.json": b'{"text": "one"}\n{"text": "two"}\n'})
    hub.fail("resolve/.*json", *[Fault(body=lambda b: b.replace(b"one", b"ONE"))] * 3)
    with pytest.raises(DataError, match=r"what came has the sha1 \w{40}, announced was"):
        texts(open_source("hf:o/n"), tmp_path / "work")
    assert texts(open_source("hf:o/n"), tmp_path / "work") == ["one", "two"]


def test_refusals_are_explained_and_asked_once(hub, slept, tmp_path, monkeypatch) -> None:
    """401, 403, 404: what to do about each; a token goes to the hub and to no other host."""
    hub.commit("o/gated", {FIRST: SHARDS[FIRST]})
    hub.gated.add("o/gated")
    accept = r"only to those who accept its terms; HF_TOKEN {}(.|\n)*accept them at {}/datasets/o/gated"
    with pytest.raises(DataError, match=accept.format("is not set", hub.url)):
        texts(open_source("hf:o/gated"), tmp_path / "work")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(DataError, match=accept.format("was sent", hub.url)) as e:
        texts(open_source("hf:o/gated"), tmp_path / "work")
    assert "wrong" not in str(e.value)
    monkeypatch.setenv("HF_TOKEN", "right")
    assert len(texts(open_source("hf:o/gated"), tmp_path / "work")) == 120
    assert {s.authorization for s in hub.asked("/cdn/")} == {None}
    assert hub.served[-2].authorization == "Bearer right"
    hub.fail("revision", Fault(403), Fault(404), Fault(418))
    for said in (
        "accept its terms",
        "the data set, its revision or the file is not there",
        "refuses o/gated",
    ):
        with pytest.raises(DataError, match=said):
            open_source("hf:o/gated")
    assert slept == []


def test_an_answer_that_is_not_the_api_is_said(hub) -> None:
    hub.commit("o/n", SHARDS)
    hub.commit("o/n/revision/main", {})  # a page where the API was expected
    hub.refs["o/n", "main"] = "main"
    hub.commits["o/n", "main"] = SHARDS
    with pytest.raises(DataError, match=r"names no commit.\n  got: 'main'"):
        open_source("hf:o/n")


def test_an_endless_answer_is_cut(hub, monkeypatch) -> None:
    hub.commit("o/n", SHARDS)
    monkeypatch.setattr(download, "DOCUMENT_BYTES", 100)
    with pytest.raises(DataError, match=r"the answer is longer than 100 bytes"):
        open_source("hf:o/n")
    monkeypatch.setattr(download, "DOCUMENT_BYTES", 1 << 20)
    monkeypatch.setattr(regpt.data.hub, "MOST_PAGES", 2)
    hub.page = 1
    with pytest.raises(DataError, match=r"/tree/\w+ has no end.\n  got: 1 files so far"):
        open_source("hf:o/n")


def test_a_retry_after_beyond_patience_is_given_up(hub, slept) -> None:
    hub.commit("o/n", SHARDS)
    hub.fail("revision", Fault(429, {"Retry-After": "3600"}))
    with pytest.raises(DataError, match="HTTP 429"):
        open_source("hf:o/n")
    assert slept == []
    assert download._retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0 and download._retry_after("soon") == 0
    assert download._retry_after("Wed, 21 Oct 2099 07:28:00 GMT") > 1e9


def test_without_network_what_is_here_is_used(hub, slept, tmp_path, monkeypatch) -> None:
    """HF_HUB_OFFLINE, or a server that is gone; what is missing is said with the way to get it."""
    commit = hub.commit("o/n", SHARDS)
    online = open_source("hf:o/n")
    online.files[0].local()
    for thread in online.files[0].remote[0]._coming.values():
        thread.join()
    asked = len(hub.served)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    offline = open_source("hf:o/n")
    assert (offline.fingerprint, offline.spec) == (online.fingerprint, f"hf:o/n@{commit}#train")
    assert offline.files[1].local().exists()
    with pytest.raises(
        DataError, match=r"00002-of-00003.parquet of hf:o/n.* HF_HUB_OFFLINE is set.\n  got: 2 of 3 files"
    ):
        offline.files[2].local()
    with pytest.raises(DataError, match="the revision main of hf:o/other was never asked for"):
        open_source("hf:o/other")
    with pytest.raises(DataError, match="the files at 12341234 of hf:o/n was never asked for"):
        open_source("hf:o/n@" + "1234" * 10)
    assert len(hub.served) == asked
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    said: list[str] = []
    assert open_source("hf:o/n", note=said.append).fingerprint == online.fingerprint
    assert f"Going on with the commit that main was before, {commit[:8]}" in said[-1]
    with pytest.raises(DataError, match=r"cannot download http://127.0.0.1:9/.*refused"):
        open_source("hf:o/other")


# --- lazily, once, in one place ---------------------------------------------------------------------------------------


def test_files_come_one_by_one_the_next_one_ahead(hub, tmp_path) -> None:
    """Opening downloads nothing; a file brings itself and the one after it; a second look asks nothing."""
    hub.commit("o/n", SHARDS)
    source = open_source("hf:o/n")
    assert source.stored_bytes == source.missing_bytes == sum(map(len, SHARDS.values()))
    assert source.fingerprint and not hub.asked("/cdn/")
    parts = source.parts(tmp_path)
    next(parts)
    for thread in source.files[0].remote[0]._coming.values():
        thread.join()
    assert [s.path[-24:] for s in hub.asked("/cdn/")] == [
        f"train-0000{n}-of-00003.parquet"[-24:] for n in range(2)
    ]
    assert source.missing_bytes == len(SHARDS[FIRST.replace("00000", "00002")])
    list(parts)
    assert source.missing_bytes == 0 and len(hub.asked("/cdn/")) == 3
    cut = source.files[0].path
    cut.write_bytes(cut.read_bytes()[:-1])  # by something else, afterwards
    assert open_source("hf:o/n").missing_bytes == len(SHARDS[FIRST])
    open_source("hf:o/n").files[0].local()
    assert cut.read_bytes() == SHARDS[FIRST]


def test_a_long_download_says_how_far_it_is(hub, monkeypatch) -> None:
    """Now and then: the file, how much of it, which of how many, how fast, how long for all."""
    hub.commit(
        "o/n",
        {
            FIRST: parquet([f"document {i}" for i in range(200_000)]),
            "data/train-00001-of-00003.parquet": b"x",
        },
    )
    monkeypatch.setattr(regpt.data.hub, "SAID_S", 0.0)
    said: list[str] = []
    open_source("hf:o/n", note=said.append).files[0].local()
    pattern = r"downloading data/train-00000-of-00003.parquet: \d of \d MB, file 1 of 2, [\d.,]+ MB/s, \d+ min left for all"
    assert any(re.fullmatch(pattern, s) for s in said)


def test_the_fingerprint_follows_the_files_not_the_commit(hub) -> None:
    """A new README makes a new commit of the same text; a pinned commit stays what it was."""
    first = hub.commit("o/n", SHARDS)
    before = open_source("hf:o/n")
    second = hub.commit("o/n", SHARDS | {"README.md": b"better words"})
    after = open_source("hf:o/n")
    assert after.spec == f"hf:o/n@{second}#train" != before.spec
    assert after.fingerprint == before.fingerprint
    hub.commit("o/n", SHARDS | {FIRST: small("other")})
    assert open_source("hf:o/n").fingerprint != before.fingerprint
    pinned = open_source(f"hf:o/n@{first}")
    assert (pinned.fingerprint, pinned.spec) == (before.fingerprint, before.spec)


def test_one_process_downloads_the_others_wait(hub, slept, tmp_path, monkeypatch) -> None:
    hub.commit("o/n", {FIRST: SHARDS[FIRST]})
    said: list[str] = []
    source = open_source("hf:o/n", note=said.append)
    path = source.files[0].path
    path.parent.mkdir(parents=True)
    locked = iter([False, False, True])

    def lock(file: object) -> bool:
        if got := next(locked):
            path.write_bytes(SHARDS[FIRST])  # the other process has finished
        return got

    monkeypatch.setattr(download, "lock_file", lock)
    assert source.files[0].local() == path and not hub.asked("/cdn/")
    assert slept == [download.OTHER_PROCESS_S] * 2 and "another process is downloading" in said[0]


def test_no_room_is_said_before_the_first_byte(hub, tmp_path, monkeypatch) -> None:
    """For the download alone; and for download and shards where they share a disk."""
    hub.commit("o/n", SHARDS)
    usage = shutil.disk_usage(tmp_path)
    size = sum(map(len, SHARDS.values()))

    def free(n: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n))

    free(size - 1)
    with pytest.raises(
        DataError, match=r"disk full: hf:o/n.* GB more in .*\n  got: 0.0 GB free\n  try: REGPT_CACHE"
    ):
        open_source("hf:o/n").files[0].local()
    free(size + 1)
    with pytest.raises(DataError, match=r"disk full: .* of text and the download 0.01 MB more"):
        prepare(open_source("hf:o/n"), open_tokenizer("bytes"), tmp_path / "out", val_fraction=0.1)
    assert not hub.asked("/cdn/")


def test_a_cache_that_cannot_be_written_is_said(hub, tmp_path, monkeypatch) -> None:
    hub.commit("o/n", SHARDS)
    source = open_source("hf:o/n")
    (tmp_path / "cache/hub/o--n/files").write_text("a file in the way")
    with pytest.raises(
        DataError, match=r"cannot write .*o--n/files.*: File exists.\n  try: REGPT_CACHE=FOLDER"
    ):
        source.files[0].local()
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache/hub/o--n/files"))
    with pytest.raises(DataError, match=r"cannot write .*/refs/main.json: Not a directory"):
        open_source("hf:o/n")


def test_what_reads_parquet_is_missed_before_the_download(hub, tmp_path, monkeypatch) -> None:
    hub.commit("o/n", SHARDS)
    source = open_source("hf:o/n")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DeviceError, match="reading parquet files needs the package pyarrow"):
        list(source.parts(tmp_path))
    assert not hub.asked("/cdn/")


# --- from the hub to shards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_the_same_files_on_disk(workers, hub, tmp_path) -> None:
    """Byte for byte, through failures; the manifest says which commit it was."""
    commit = hub.commit("o/n", SHARDS)
    for name, content in SHARDS.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    hub.fail("00001-of", Fault(500), Fault(cut=700))
    tokenizer = open_tokenizer("bytes")
    made = [
        prepare(source, tokenizer, tmp_path / name, val_fraction=0.1, workers=workers, shard_tokens=1000)
        for name, source in (("a", open_source("hf:o/n")), ("b", open_source(str(tmp_path / "local/data"))))
    ]
    assert made[0].files == made[1].files and made[0].fingerprint == made[1].fingerprint
    for file in made[0].files:
        assert (tmp_path / "a" / file.name).read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    assert made[0].source.spec == f"hf:o/n@{commit}#train" and made[0].source.name == "o-n"


def test_prepare_on_the_command_line(hub, capsys) -> None:
    """What is downloaded, where to and what room there is, first; then the result; the same again does nothing."""
    hub.commit("o/n", {n.replace("train", s): c for n, c in SHARDS.items() for s in ("train", "dev")})
    command = ["prepare", "hf:o/n", "--out", "out", "--tokenizer", "bytes", "--val-split", "dev", "--json"]
    with pytest.raises(DataError, match=r"hf:o/n.* is part of the training text"):
        open_sources(DataConfig(source="hf:o/n", val_split="dev"))
    hub.commit("o/n", SHARDS | {"data/dev-00000-of-00001.parquet": small("held out")})
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert re.search(r"0.01 MB to download into .*cache \([\d,]+ .B free there\)", err)
    result = json.loads(out)
    assert result["documents"] == 363 and Shards.open("out").manifest.splits["val"].documents == 3
    asked = len(hub.asked("cdn"))
    assert main(command) == 0 and len(hub.asked("cdn")) == asked
    assert "to download" not in capsys.readouterr().err
    assert main([*command[:4], "--text-field", "txt", "--tokenizer", "bytes", "--out", "other"]) == 2
    assert re.search(r"has no field 'txt'.\n  got: the fields id, text", capsys.readouterr().err)


def test_every_named_set_is_listed_and_a_wrong_name_corrected(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    said = re.sub(r"\s+", " ", re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out))
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    for name, named in NAMED_SETS.items():
        assert name in said and f"| `{name}` |" in page and named.licence in page
        assert named.spec is None or Spec.parse(named.spec)
    with pytest.raises(DataError, match=r"Did you mean fineweb-edu-10bt\?"):
        open_source("fineweb-edu-10b")
    with pytest.raises(DataError, match=r"Did you mean openwebtext\?"):
        open_source("openwebtxt")


def test_a_named_set_is_validated_on_its_own_split(hub, tmp_path) -> None:
    """Unless a share, a source or a split is named; sets without one, and files of that name, are split as ever."""
    hub.commit(
        "roneneldan/TinyStories", STORIES | {"TinyStoriesV2-GPT4-valid.txt": b"One.\n<|endoftext|>\nTwo.\n"}
    )

    def opened(**settings) -> tuple[list[str], list[str] | None, float | None]:
        a, b, share = open_sources(DataConfig(**settings))
        return [f.label for f in a.files], b and [f.label for f in b.files], share

    train = ["data/train-00000-of-00002-1ab.parquet", "data/train-00001-of-00002-2ab.parquet"]
    val = ["data/validation-00000-of-00001-3ab.parquet"]
    assert opened(source="tinystories") == (train, val, None)
    assert opened(source="tinystories", val_fraction=0.1) == (train, None, 0.1)
    assert opened(source="hf:roneneldan/TinyStories") == (train, None, 0.005)
    assert opened(source="hf:roneneldan/TinyStories", val_split="validation") == (train, val, None)
    v2 = ["TinyStoriesV2-GPT4-train.txt"], ["TinyStoriesV2-GPT4-valid.txt"], None
    assert opened(source="tinystories-v2") == v2
    (tmp_path / "mine.txt").write_text("mine")
    assert opened(source="tinystories", val_source="mine.txt") == (train, ["mine.txt"], None)
    assert opened(source="mine.txt", val_source="tinystories") == (["mine.txt"], val, None)
    assert opened(source="mine.txt", val_source="tinystories-v2") == (["mine.txt"], v2[1], None)
    for wrong in ({"split": "dev"}, {"val_split": "dev"}, {"val_split": "train", "val_source": "mine.txt"}):
        with pytest.raises(
            ConfigError, match=r"split=(dev|train): mine.txt has no splits; data sets of the hub have"
        ):
            opened(source="mine.txt", **wrong)
    (tmp_path / "tinystories").write_text("a file of that name")
    assert opened(source="tinystories") == (["tinystories"], None, 0.005)
    assert texts(open_source("tinystories-v2"), tmp_path / "w")[0].startswith('{"text"')


def test_a_run_prepares_a_named_set_and_finds_it_again(hub, tmp_path, monkeypatch) -> None:
    """`corpus` and what a plan knows: before, nothing is asked; after, the shards are found, still without asking."""
    sample = {"README.md": FINEWEB.encode(), "sample/10BT/000_00000.parquet": SHARDS[FIRST]}
    hub.commit("HuggingFaceFW/fineweb-edu", sample)
    data = dataclasses.replace(load_preset("gpt2-124m-fineweb-edu").config.data, workers=1, val_fraction=0.1)
    config = Config(data=data, tokenizer=TokenizerConfig(name="bytes"))
    assert data.source == "fineweb-edu-10bt"
    assert known_corpus(config)[2] is None
    assert not hub.served and not (tmp_path / "cache").exists()
    said: list[str] = []
    _, shards = corpus(config, lambda event, step, values: said.append(values.get("text", "")))
    assert shards.path.name.startswith("fineweb-edu-10bt-bytes-") and any(
        "preparing fineweb" in s for s in said
    )
    asked = len(hub.served)
    before = sorted(p for p in tmp_path.rglob("*"))
    found = known_corpus(config)[2]
    assert found is not None and found.path == shards.path
    assert len(hub.served) == asked and sorted(p for p in tmp_path.rglob("*")) == before
    identity = text_identity(config)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert corpus(config)[1].path == shards.path and text_identity(config) == identity


def test_a_validation_source_of_its_own_is_found_again(tmp_path, monkeypatch) -> None:
    """A second run on the same two files takes the shards of the first."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    data = DataConfig(source="a.txt", val_source="b.txt", dir="shards", workers=1)
    config = Config(data=data, tokenizer=TokenizerConfig(name="bytes"))
    assert corpus(config)[1].manifest == corpus(config)[1].manifest


@pytest.mark.parametrize(
    "more, share, folder",
    [
        ({}, 0.005, "a-bytes-5802d399"),
        ({"val_source": "b.txt"}, 0.005, "a-bytes-a6a210c6"),
        ({"val_source": "b.txt", "val_fraction": 0.02}, 0.02, "a-bytes-ccd099cd"),
    ],
)
def test_begun_runs_and_their_folders_are_known_as_they_always_were(
    tmp_path, monkeypatch, more, share, folder
) -> None:
    """As earlier versions named them, where the share had a value even beside a validation source."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    config = Config(
        data=DataConfig(source="a.txt", workers=1, **more), tokenizer=TokenizerConfig(name="bytes")
    )
    assert text_identity(config)["val_fraction"] == share
    assert data_folder(config, open_sources(config.data)) == Path("data", folder)


# --- lines that are articles ------------------------------------------------------------------------------------------


def wiki_rows(text: str) -> list[str]:
    """As the hub's parquet files have them: a row a line, blank lines empty."""
    return [line if line.strip() else "" for line in re.findall(r"[^\n]*\n", text)]


def test_wikitext_rows_become_its_published_articles(test_data, hub, tmp_path) -> None:
    """The published test split: 60 articles, their text joined is the published file to the byte; over two files."""
    text = (test_data / "eval/wiki.test.raw").read_bytes().decode()
    rows = wiki_rows(text)
    made = list(articles(rows))
    assert len(made) == 60 and "".join(made) == text
    titles = [a.strip().split(" \n")[0] for a in made]
    assert titles[0] == "= Robert Boulter =" and titles[-1] == "= The Hustler ( film ) ="
    assert not any("1 henry" in t for t in titles)  # a formula, cut at its equals signs
    content = {"wikitext-103-raw-v1/train-00000-of-00002.parquet": parquet(rows[:1500], rows_in_group=400)}
    content["wikitext-103-raw-v1/train-00001-of-00002.parquet"] = parquet(rows[1500:], rows_in_group=400)
    content["wikitext-103-raw-v1/validation-00000-of-00001.parquet"] = parquet(rows[:300])
    hub.commit("Salesforce/wikitext", content | {"README.md": WIKI.encode()})
    source, val_source, _ = open_sources(DataConfig(source="wikitext-103"))
    assert texts(source, tmp_path / "work") == made
    tokenizer = open_tokenizer("bytes")
    manifest = prepare(source, tokenizer, tmp_path / "out", val_fraction=0, val_source=val_source, workers=2)
    assert (manifest.splits["train"].documents, manifest.splits["val"].documents) == (60, 6)
    shards = Shards.open(tmp_path / "out")
    first = shards.split("train").read(0, 40)
    assert (
        load_tokenizer(tmp_path / "out/tokenizer")
        .decode(first.tolist())
        .startswith(" \n = Robert Boulter = \n")
    )


def test_articles_begin_at_titles_alone() -> None:
    rows = [
        "",
        " = A = \n",
        "",
        " text \n",
        "",
        " = = Part = = \n",
        "",
        " = x = \n",
        " more \n",
        None,
        " = B = \n",
        None,
    ]
    assert list(articles(rows)) == [
        " \n = A = \n \n text \n \n = = Part = = \n \n = x = \n more \n \n", " = B = \n \n"
    ]  # fmt: skip
    assert list(articles([])) == [] and list(articles(["no title"])) == ["no title\n"]


def test_articles_are_cut_into_parts_of_whole_articles(hub, tmp_path, monkeypatch) -> None:
    """The parts add up to the files' bytes; other part sizes give the same articles."""
    rows = [line for n in range(200) for line in ("", f" = {n} = \n", "", f" text of {n} \n" * 5)]
    hub.commit("Salesforce/wikitext", {"wikitext-103-raw-v1/train-00000-of-00001.parquet": parquet(rows)})
    made = []
    for size in (100, 5000, 1 << 22):
        monkeypatch.setattr(sources, "PART_BYTES", size)
        source = open_source("wikitext-103")
        parts = list(source.parts(tmp_path))
        assert sum(p.stored_bytes for p in parts) == source.stored_bytes and all(p.temporary for p in parts)
        made.append(["".join(d()) for p in parts for d in documents(p, sources.Counter())])
    assert made[0] == made[1] == made[2] and len(made[0]) == 200


def test_an_endpoint_that_is_no_address_is_named(hub, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    assert main(["prepare", "hf:me/set", "--out", "out"]) == 2
    assert "ConfigError: HF_ENDPOINT is not an address." in capsys.readouterr().err


def test_errors_are_called_by_names_that_people_know(hub, capsys) -> None:
    hub.commit("me/set", SHARDS)
    assert main(["prepare", "hf:me/set@nope", "--out", "out"]) == 2
    assert capsys.readouterr().err.startswith("DataError: ")
