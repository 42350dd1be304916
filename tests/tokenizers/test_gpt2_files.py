"""Where GPT-2's files are looked for. The files here are tiny stand-ins with hashes of their own, so no data is needed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from regpt.errors import DataError
from regpt.tokenizers import gpt2, open_tokenizer

FILES = {"encoder.json": b'{"!": 0}', "vocab.bpe": b"#version: 0.2\nh e\nhe l\n"}
HASHES = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No variable of the person who runs this counts; the cache is empty; the published hashes are the stand-ins'."""
    for name in ("REGPT_GPT2_FILES", "REGPT_GPT2_URL", "TIKTOKEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(gpt2, "SHA256", HASHES)


class Server:
    """Answers on loopback as `answer` says; remembers the paths asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answer: Callable[[str], tuple[int, bytes, int]] = self.good
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                status, content, length = outer.answer(self.path.rsplit("/", 1)[1])
                self.send_response(status)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/gpt 2".replace(" ", "%20")

    @staticmethod
    def good(name: str) -> tuple[int, bytes, int]:
        return 200, FILES[name], len(FILES[name])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    served = Server()
    thread = threading.Thread(target=served.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("REGPT_GPT2_URL", served.url)
    yield served
    served.http.shutdown()
    thread.join()
    served.http.server_close()


def write(folder: Path, files: dict[str, bytes] = FILES) -> Path:
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def ids() -> list[int]:
    return open_tokenizer("gpt2").encode("hell")


@pytest.mark.network
def test_a_download_is_kept_and_used_again(server: Server, tmp_path: Path) -> None:
    assert ids() == [257, 75]  # "hel" and "l"
    assert sorted(server.asked) == ["/gpt%202/encoder.json", "/gpt%202/vocab.bpe"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache" / "gpt2").iterdir()} == FILES
    assert ids() == [257, 75]
    assert len(server.asked) == 2


@pytest.mark.network
def test_a_damaged_cache_is_fetched_anew(server: Server, tmp_path: Path) -> None:
    write(tmp_path / "cache" / "gpt2", {**FILES, "vocab.bpe": b"cut"})
    assert ids() == [257, 75]
    assert server.asked == ["/gpt%202/vocab.bpe"]
    assert (tmp_path / "cache" / "gpt2" / "vocab.bpe").read_bytes() == FILES["vocab.bpe"]


@pytest.mark.network
def test_several_at_once_leave_whole_files(server: Server, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: ids(), range(16)))
    assert found == [[257, 75]] * 16
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache" / "gpt2").iterdir()} == FILES


@pytest.mark.network
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda name: (200, b"<html>", 6), "encoder.json is not the published file.\n  got: sha256 "),
        (lambda name: (404, b"no", 2), "encoder.json: HTTP Error 404: Not Found.\n"),
        (
            lambda name: (200, FILES[name][:3], 99),
            "encoder.json: IncompleteRead(3 bytes read, 96 more expected).\n",
        ),
        (lambda name: (200, b"", 0), "encoder.json is not the published file.\n  got: sha256 e3b0c442"),
    ],
    ids=["another file", "404", "truncated", "empty"],
)
def test_bad_downloads_say_what_and_what_to_do(
    server: Server, tmp_path: Path, answer: Callable[[str], tuple[int, bytes, int]], said: str
) -> None:
    server.answer = answer
    with pytest.raises(DataError) as e:
        ids()
    assert server.url in str(e.value)
    assert said in str(e.value)
    assert_says_how_to_get_them(e.value)
    assert not (tmp_path / "cache").exists()


def assert_says_how_to_get_them(e: DataError) -> None:
    for word in (
        gpt2.URL + "/encoder.json",
        gpt2.URL + "/vocab.bpe",
        "--tokenizer.files",
        "REGPT_GPT2_FILES=",
    ):
        assert word in str(e.hint)


@pytest.mark.network
def test_offline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at port 9 of loopback."""
    monkeypatch.setenv("REGPT_GPT2_URL", "http://127.0.0.1:9/gpt2")
    with pytest.raises(DataError, match=r"^cannot download http://127\.0\.0\.1:9/gpt2/encoder\.json: ") as e:
        ids()
    assert_says_how_to_get_them(e.value)


@pytest.mark.parametrize("url", ["nonsense", "ftp://", "http://127.0.0.1:99999"])
def test_a_mirror_that_is_no_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGPT_GPT2_URL", url)
    with pytest.raises(DataError, match=r"^cannot download "):
        ids()


def test_folders_by_setting_and_by_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting goes before the variable; spaces and umlauts are fine; nothing is downloaded."""
    folder = write(tmp_path / "zwei Dateien äöü")
    assert open_tokenizer("gpt2", files=str(folder)).encode("hell") == [257, 75]
    monkeypatch.setenv("REGPT_GPT2_FILES", str(folder))
    assert ids() == [257, 75]
    with pytest.raises(DataError, match="elsewhere"):
        open_tokenizer("gpt2", files=str(tmp_path / "elsewhere"))


def test_tiktokens_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that tiktoken downloaded, under the names that it gives them (known: that of vocab.bpe)."""
    names = {"vocab.bpe": "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"}
    names["encoder.json"] = hashlib.sha1(f"{gpt2.URL}/encoder.json".encode()).hexdigest()
    write(tmp_path / "tiktoken", {names[name]: content for name, content in FILES.items()})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    assert ids() == [257, 75]
    assert not (tmp_path / "cache").exists()


def test_a_named_folder_without_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error, not a reason to look further."""
    write(tmp_path / "cache" / "gpt2")
    write(tmp_path / "empty", {})
    monkeypatch.setenv("REGPT_GPT2_FILES", str(tmp_path / "empty"))
    with pytest.raises(DataError) as e:
        ids()
    assert str(e.value).startswith(
        f"cannot read {tmp_path / 'empty' / 'encoder.json'}: No such file or directory."
    )
    assert_says_how_to_get_them(e.value)


def test_a_named_folder_with_damaged_files(tmp_path: Path) -> None:
    write(tmp_path / "bad", {**FILES, "vocab.bpe": b"cut"})
    with pytest.raises(DataError) as e:
        open_tokenizer("gpt2", files=str(tmp_path / "bad"))
    cut = hashlib.sha256(b"cut").hexdigest()
    assert str(e.value).startswith(
        f"{tmp_path / 'bad' / 'vocab.bpe'} is not the published file.\n"
        f"  got: sha256 {cut} (3 bytes)\n  expected: sha256 {HASHES['vocab.bpe']}\n"
    )
    assert_says_how_to_get_them(e.value)


def test_a_cache_that_cannot_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the place of the folder")
    with pytest.raises(DataError, match=r"^cannot write .*encoder\.json: "):
        ids()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from regpt.tokenizers.download import cache_folder

    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("REGPT_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "regpt"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "regpt"
