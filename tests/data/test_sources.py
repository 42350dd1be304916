"""What a name stands for: files, folders, globs and named sets, always in the same order."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import sysconfig
import threading
from collections import Counter
from pathlib import Path

import pytest

from regpt.data import documents, sources
from regpt.data.sources import open_source
from regpt.errors import DataError
from regpt.tokenizers import END_OF_TEXT


def names(spec: Path | str) -> list[str]:
    return [f.label for f in open_source(str(spec)).files]


@pytest.fixture
def tree(tmp_path) -> Path:
    """A folder of many kinds of files."""
    root = tmp_path / "my büch er"
    for name in (
        "b.txt",
        "a.md",
        "sub/ü c.txt",
        "sub/d.jsonl",
        ".hidden",
        ".git/config",
        "sub/__pycache__/x.pyc",
        "Z.txt.gz",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"some text")
    return root


def test_a_folder_is_all_that_is_visible_in_it_sorted(tree) -> None:
    """Hidden files and folders are left out and counted."""
    source = open_source(str(tree))
    assert [f.label for f in source.files] == ["Z.txt.gz", "a.md", "b.txt", "sub/d.jsonl", "sub/ü c.txt"]
    assert [(f.form, f.packing) for f in source.files] == [
        ("text", ".gz"), ("text", ""), ("text", ""), ("jsonl", ""), ("text", "")
    ]  # fmt: skip
    assert source.skipped["hidden"] == 2
    assert source.name == "my-büch-er"


def test_globs_and_single_files(tree, monkeypatch) -> None:
    """A glob takes files only; a file with brackets in its name is a file."""
    assert [Path(n).name for n in names(tree / "**" / "*.txt")] == ["b.txt", "ü c.txt"]
    (tree / "[x] {y}.txt").write_text("t")
    assert names(tree / "[x] {y}.txt") == ["[x] {y}.txt"]
    assert open_source(str(tree / "[x] {y}.txt")).name == "x-y"
    monkeypatch.chdir(tree)
    assert open_source("sub/*.jsonl").name == "sub"
    assert open_source("b.txt").name == "b"


def test_what_is_not_there_is_said(tree, tmp_path) -> None:
    with pytest.raises(
        DataError, match=r"no file, folder or named set 'shakespere'. Did you mean shakespeare\?"
    ):
        open_source("shakespere")
    with pytest.raises(DataError, match=r"\*.csv: no text file found"):
        open_source(str(tree / "*.csv"))
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"no text file found.\n  got: nothing but what is left out: 1 hidden"
    ):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="parquet is packed inside already"):
        open_source(str(tmp_path / "a.parquet.gz"))


@pytest.mark.parametrize("content_bytes", [1 << 20, 0])
def test_the_fingerprint_changes_with_the_files(tree, monkeypatch, content_bytes) -> None:
    """By content, or for large sources by size and time; never by where the folder lies."""
    monkeypatch.setattr(sources, "CONTENT_BYTES", content_bytes)
    before = open_source(str(tree)).fingerprint
    assert open_source(str(tree)).fingerprint == before
    assert open_source(str(tree), text_field="other").fingerprint != before
    moved = tree.rename(tree.with_name("elsewhere"))
    assert open_source(str(moved)).fingerprint == before
    (moved / "b.txt").write_bytes(b"same size"[:9])
    os.utime(moved / "b.txt", (1, 1))
    changed = open_source(str(moved)).fingerprint
    assert changed != before
    (moved / "new.txt").write_bytes(b"")
    assert open_source(str(moved)).fingerprint not in (before, changed)


def test_python_stdlib_is_the_library_without_its_tests() -> None:
    """Source files of this very Python, in order."""
    source = open_source("python-stdlib")
    library = Path(sysconfig.get_path("stdlib"))
    labels = [f.label for f in source.files]
    assert labels == sorted(labels) and len(labels) > 300
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(labels)
    assert all(f.path.is_relative_to(library) and f.path.suffix == ".py" for f in source.files)
    assert not any(
        {"site-packages", "test", "tests", "idle_test"} & set(label.split("/")) for label in labels
    )
    assert source.fingerprint == open_source("python-stdlib").fingerprint
    assert source.name.startswith("python-stdlib-3.")


def test_single_text_is_one_file_without_separators(tmp_path) -> None:
    """Only such a text is split by position."""

    def single(name: str, data: bytes) -> bool:
        (tmp_path / name).write_bytes(data)
        return open_source(str(tmp_path / name)).single_text

    assert single("a.txt", b"one text") and single("b", "ü".encode() * 600_000)
    assert not single("c.txt", b"x" * ((1 << 20) - 5) + b"<|endoftext|> two")  # across a block
    assert not single("d.jsonl", b'{"text": "x"}')
    assert not single("e.txt", b"\0binary")
    assert not open_source(str(tmp_path)).single_text
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "only.txt").write_bytes(b"one")
    assert open_source(str(tmp_path / "folder")).single_text


def test_parts_of_a_single_text_join_to_it(tmp_path, monkeypatch) -> None:
    """Two documents at a given character, in parts that are cut where no token is."""
    monkeypatch.setattr(sources, "PART_BYTES", 1000)
    text = "Ärger, 漢字 und so fort. " * 3000 + "x" * 5000 + "ü" * 900_000
    for name in ("a.txt", "b.txt.xz"):
        path = tmp_path / name
        data = text.encode()
        path.write_bytes(data if name == "a.txt" else __import__("lzma").compress(data))
        source = open_source(str(path))
        for chars in (0, 1, 31_415, 80_001, 500_000, len(text)):
            found = ["", ""]
            ends = [[], []]
            for document, part in source.text_parts(tmp_path, chars):
                found[document] += Path(part.path).read_bytes()[part.start : part.end].decode()
                ends[document].append(part.fragment)
            assert found == [text[:chars], text[chars:]]
            assert all(e == ["middle"] * (len(e) - 1) + ["last"] for e in ends if e)
        assert len(ends[0]) > 50


@pytest.mark.network
def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch, test_data) -> None:
    """From a server; then from the cache; another text or no server is said, with what to do instead."""
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    web = tmp_path / "web"
    web.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: object) -> None:
            super().__init__(*args, directory=str(web))

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/input.txt"
        monkeypatch.setenv("REGPT_SHAKESPEARE_URL", url)
        try:
            with pytest.raises(DataError, match=r"404(.|\n)*regpt prepare input.txt"):
                open_source("shakespeare")
            (web / "input.txt").write_bytes(b"Hamlet")
            with pytest.raises(DataError, match=f"expected: sha256 {sources.SHAKESPEARE_SHA256}"):
                open_source("shakespeare")
            (web / "input.txt").write_bytes((test_data / "small/tinyshakespeare.txt").read_bytes())
            source = open_source("shakespeare")
        finally:
            server.shutdown()
            thread.join()
    assert source.name == "shakespeare" and source.single_text
    assert hashlib.sha256(source.files[0].path.read_bytes()).hexdigest() == sources.SHAKESPEARE_SHA256
    assert open_source("shakespeare").fingerprint == source.fingerprint  # the server is gone
    source.files[0].path.unlink()
    with pytest.raises(DataError, match=r"cannot(.|\n)*regpt prepare input.txt"):
        open_source("shakespeare")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_file_is_binary_by_its_head_alone(tmp_path, monkeypatch, suffix) -> None:
    """A NUL further on is text like any other, also where a piece of a packed file begins with it."""
    monkeypatch.setattr(sources, "PART_BYTES", 500)
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    monkeypatch.setattr(documents, "HEAD_BYTES", 50)
    monkeypatch.setattr(sources, "HEAD_BYTES", 50)
    separator = END_OF_TEXT
    late = separator.join(["x" * 60, *(f"\0 {i} " + "y" * 40 for i in range(50))])
    early = separator.join(["\0", *("z" * 50 for i in range(50))])
    write = gzip.open if suffix else open
    for name, text in (("a", late), ("b", early)):
        with write(tmp_path / f"{name}.txt{suffix}", "wb") as file:
            file.write(text.encode())
    (tmp_path / "work").mkdir()
    source = open_source(str(tmp_path / f"*.txt{suffix}"))
    found, skipped, stored = [], Counter(), 0
    for part in source.parts(tmp_path / "work"):
        found += ["".join(d()) for d in documents.documents(part, skipped)]
        stored += part.stored_bytes
        part.delete_if_temporary()
    assert found == late.split(separator) and skipped == {"binary": 1}
    assert stored == source.stored_bytes and not list((tmp_path / "work").iterdir())
