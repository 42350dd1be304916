"""Task files: the forms they are published in, what is wrong with them, and how they are downloaded."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import lzma
import math
import random
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_likelihood import SHAPES, made

from regpt.errors import ConfigError, DataError
from regpt.evals import choices, files
from regpt.evals.choices import MultipleChoice, Question
from regpt.evals.figures import exponential, mean, ratio, scaled
from regpt.evals.files import Files, Remote
from regpt.evals.likelihood import Scored
from regpt.evals.tasks import TASKS, open_task
from regpt.evals.wikitext import WikiText, detokenized, pages, rolling
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars

pytestmark = pytest.mark.usefixtures("one_thread")

HELLASWAG = {
    "ctx_a": "A man sits. [title] Then",
    "ctx_b": "he",
    "ctx": "A man sits. [title] Then he",
    "activity_label": "Roof",
    "endings": ["falls.", "[step] flies  away."],
    "label": "1",
}
ARC = {
    "question": "Why?",
    "choices": {"text": ["so", "no"], "label": ["A", "B"]},
    "answerKey": "B",
}
PIQA = {"goal": "To boil", "sol1": "heat", "sol2": "cool", "label": 0}


def write(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(task: str, path: Path) -> list[Question]:
    found = open_task(task, path)
    assert isinstance(found, MultipleChoice)
    return list(found.questions)


# --- forms ------------------------------------------------------------------------------------------------------------


def test_the_published_forms_of_rows(tmp_path: Path) -> None:
    [asked] = questions("hellaswag", write(tmp_path / "h.jsonl", HELLASWAG))
    assert asked == Question(
        query="Roof: A man sits.. Then He",
        choices=("falls.", " flies away."),
        gold=1,
        plain=("A man sits. [title] Then he", ("falls.", "[step] flies  away.")),
    )
    ai2 = {
        "question": {
            "stem": "Why?",
            "choices": [{"text": "so", "label": "1"}, {"text": "no", "label": "2"}],
        },
        "answerKey": "2",
    }
    hub, own = questions("arc_easy", write(tmp_path / "a.jsonl", ARC, ai2))
    assert hub == own == Question(query="Question: Why?\nAnswer:", choices=("so", "no"), gold=1)
    [asked] = questions("piqa", write(tmp_path / "p.jsonl", PIQA))
    assert asked == Question(query="Question: To boil\nAnswer:", choices=("heat", "cool"), gold=0)
    bare = {name: value for name, value in PIQA.items() if name != "label"}
    write(tmp_path / "piqa" / "valid.jsonl", bare, bare)
    (tmp_path / "piqa" / "valid-labels.lst").write_text("1\n0\n")
    assert [q.gold for q in questions("piqa", tmp_path)] == [1, 0]


def test_packed_files_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    content = (json.dumps(ARC) + "\n").encode()
    (tmp_path / "arc_easy_test.jsonl.xz").write_bytes(lzma.compress(content))
    expected = questions("arc_easy", tmp_path)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    assert questions("arc_easy", tmp_path / "b.jsonl.gz") == expected
    parquet.write_table(arrow.Table.from_pylist([ARC]), tmp_path / "c.parquet")
    assert questions("arc_easy", tmp_path / "c.parquet") == expected


def test_rows_takes_the_first(test_data: Path) -> None:
    whole = open_task("lambada", test_data / "eval")
    assert whole.rows == 5153 and open_task("lambada", test_data / "eval", 7).rows == 7
    assert open_task("hellaswag", test_data / "eval").rows == 10042
    assert open_task("wikitext", test_data / "eval").rows == 62


def test_the_shared_files_are_those_that_are_downloaded(test_data: Path) -> None:
    """Their checksums are the pinned ones, as published elsewhere."""
    lambada = lzma.decompress((test_data / "eval" / "lambada_openai_test.jsonl.xz").read_bytes())
    wikitext = (test_data / "eval" / "wiki.test.raw").read_bytes()
    for name, content in (("lambada", lambada), ("wikitext", wikitext)):
        assert TASKS[name].files.remote[0].sha256 == hashlib.sha256(content).hexdigest()


def test_pages_of_wikitext_are_the_file(test_data: Path) -> None:
    text = (test_data / "eval" / "wiki.test.raw").read_text(encoding="utf-8")
    assert "\n".join(pages(text)) == text.removeprefix(" \n")
    assert sum(len(p.split()) + p.count("\n") + 1 for p in pages(text)) == 245_569  # the paper's table 1


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(1, 4, 4), (5, 4, 4), (6, 4, 4), (100, 8, 3), (9, 8, 8)]
)
def test_rolling_windows_score_every_id_but_the_first_once(length: int, context: int, stride: int) -> None:
    ids = tuple(range(length))
    found = list(rolling(ids, context, stride))
    assert [i for request in found for i in request.continuation] == list(ids[1:])
    for request in found:
        whole = request.context + request.continuation
        assert whole == tuple(range(whole[0], whole[-1] + 1)) and len(whole) <= context + 1
    assert all(len(r.context + r.continuation) == context + 1 for r in found[1:])


# --- figures ----------------------------------------------------------------------------------------------------------


def test_means_ratios_and_their_errors() -> None:
    figure = mean([1.0, 0.0, 0.0, 1.0])
    assert figure.value == 0.5 and figure.stderr == pytest.approx((1 / 3) ** 0.5 / 2)
    assert figure.interval == pytest.approx((0.5 - 1.96 * 3**-0.5 / 2, 0.5 + 1.96 * 3**-0.5 / 2))
    assert mean([3.0]).stderr is None
    # Of equal weights a ratio is a mean.
    same = ratio([2.0, 4.0, 9.0], [1.0, 1.0, 1.0])
    assert same.stderr == pytest.approx(mean([2.0, 4.0, 9.0]).stderr) and same.value == 5.0
    power = exponential(mean([1.0, 2.0]))
    assert power.value == pytest.approx(2.718281828**1.5) and power.stderr == pytest.approx(power.value * 0.5)
    assert power.interval == pytest.approx((math.exp(1.5 - 1.96 * 0.5), math.exp(1.5 + 1.96 * 0.5)))
    third = scaled(mean([1.0, 2.0]), 1 / 3)
    assert (third.value, third.stderr) == pytest.approx((0.5, 0.5 / 3))
    assert third.interval == pytest.approx((0.5 - 1.96 * 0.5 / 3, 0.5 + 1.96 * 0.5 / 3))


def test_the_error_of_a_ratio_is_a_jackknifes() -> None:
    """Each row left out in turn (Cochran 1977, section 6.17): another estimate of the same error."""
    draw = random.Random(0)
    below = [draw.uniform(50, 150) for _ in range(400)]
    above = [b * draw.uniform(0.5, 1.5) for b in below]
    n = len(above)
    left = [(sum(above) - a) / (sum(below) - b) for a, b in zip(above, below, strict=True)]
    middle = sum(left) / n
    jackknife = math.sqrt((n - 1) / n * sum((x - middle) ** 2 for x in left))
    assert ratio(above, below).stderr == pytest.approx(jackknife, rel=0.02)


PAGES = [" \n = A b = \n one two , three \n", " = C = \n " + "four five six seven . \n " * 9]


def test_the_strided_perplexity_is_that_of_a_loop_by_hand() -> None:
    """Target by target: windows that overlap by half, the last reaching back; over words and line ends counted here."""
    model, tokenizer = made(dataclasses.replace(SHAPES["gpt2"], block_size=64), 257), ByteTokenizer()
    task = WikiText(name="wikitext", pages=PAGES)
    ids = [tokenizer.eot_id, *tokenizer.encode("\n".join(map(detokenized, PAGES)))]
    context, stride, nats = 64, 32, 0.0
    for target in range(1, len(ids)):
        end = context + 1
        while target >= end:
            end += stride
        begin = max(min(end, len(ids)) - context - 1, 0)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:target]]))[0, -1, :257].double()
        nats -= float(torch.log_softmax(logits, 0)[ids[target]])
    words = (8 + 3 + 1) + (3 + 45 + 10 + 1)  # words and line ends of each page, and the line end behind it
    assert len(ids) > 3 * context
    found = task.evaluate(model, tokenizer).figures["word_perplexity_strided"].value
    assert found == pytest.approx(math.exp(nats / words), rel=1e-5)


def test_the_strided_perplexity_counts_the_papers_words(test_data: Path) -> None:
    """245,569 of them: a model that gives each half a chance has a perplexity of 2."""
    task = open_task("wikitext", test_data / "eval")
    page, whole = Scored(-1.0, 1, False), Scored(-245_569 * math.log(2), 1, False)
    found = task.figures({"pages": [[page]] * 62, "whole": [[whole]]})
    assert found["word_perplexity_strided"].value == pytest.approx(2.0, rel=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------------


def without(row: dict[str, Any], name: str, **changes: Any) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != name} | changes


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("hellaswag", without(HELLASWAG, "endings"), "FILE, line 2 has no field 'endings'.\n  got: ctx_a, ctx_b,"),
        ("hellaswag", {**HELLASWAG, "label": "7"}, "FILE, line 2: the field 'label' cannot be used.\n  got: '7'\n"
                                                   "  expected: the number of the right choice, 0 to 1"),
        ("hellaswag", {**HELLASWAG, "label": ""}, "FILE, line 2: the field 'label' cannot be used.\n  got: ''"),
        ("hellaswag", {**HELLASWAG, "label": True}, "FILE, line 2: the field 'label' cannot be used.\n  got: True"),
        ("hellaswag", {**HELLASWAG, "endings": ["a", 1]}, "FILE, line 2: the field 'endings' cannot be used.\n"
                                                          "  got: ['a', 1]\n  expected: a list of texts"),
        ("hellaswag", {**HELLASWAG, "endings": []}, "FILE, line 2: the field 'endings' cannot be used."),
        ("hellaswag", {**HELLASWAG, "endings": ["falls.", "[title]"]}, "FILE, line 2: the field 'endings' cannot be used.\n"
                                                                       "  got: ['falls.', '[title]']\n  expected: text in"),
        ("hellaswag", {"query": "a", "choices": ["b", " "], "gold": 0}, "FILE, line 2: the field 'choices' cannot be used."),
        ("arc_easy", {**ARC, "choices": {"text": ["so", " "], "label": ["A", "B"]}}, "FILE, line 2: the field 'text' cannot"),
        ("piqa", {**PIQA, "sol1": " "}, "FILE, line 2: the field 'sol1' cannot be used."),
        ("piqa", {**PIQA, "sol2": ""}, "FILE, line 2: the field 'sol2' cannot be used.\n  got: ''\n  expected: text in every"),
        ("hellaswag", {**HELLASWAG, "ctx_b": None}, "FILE, line 2: the field 'ctx_b' cannot be used.\n"
                                                    "  got: None\n  expected: str"),
        ("hellaswag", ["no object"], "FILE, line 2 is no JSON object."),
        ("arc_easy", {**ARC, "answerKey": "C"}, "FILE, line 2: the field 'answerKey' cannot be used.\n"
                                                "  got: 'C'\n  expected: one of A, B"),
        ("arc_easy", without(ARC, "choices"), "FILE, line 2 has no field 'choices'."),
        ("arc_easy", {**ARC, "question": {}}, "FILE, line 2: the field 'question' cannot be used."),
        ("piqa", without(PIQA, "sol2"), "FILE, line 2 has no field 'sol2'."),
        ("lambada", {"txt": "a b"}, "FILE, line 2 has no field 'text'.\n  got: txt"),
        ("wikitext", {}, "FILE, line 2 has no field 'page'.\n  got: nothing"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(task: str, content: Any, message: str, tmp_path: Path) -> None:
    good = {"hellaswag": HELLASWAG, "arc_easy": ARC, "piqa": PIQA, "lambada": {"text": "a b"}}
    path = write(tmp_path / "x.jsonl", good.get(task, {"page": "a"}), content)
    with pytest.raises(DataError) as caught:
        open_task(task, path)
    assert str(caught.value).startswith(message.replace("FILE", str(path)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "FILE is empty.\n  expected: a row on every line"),
        ("a.jsonl", b"{]\n", "FILE, line 1 is not JSON: "),
        ("a.jsonl", b"[" * 100_000, "FILE, line 1 is not JSON: "),
        ("a.jsonl", b"\xff\xfe", "FILE is not UTF-8 text: "),
        ("a.jsonl.xz", lzma.compress(b"x" * 99)[:-9], "FILE is damaged or not what its name says: "),
        ("a.jsonl.gz", b"no gzip", "FILE is damaged or not what its name says: "),
        ("a.jsonl.zst", b"no zstandard", "FILE is damaged or not what its name says: "),
        ("a.parquet", b"PAR1 no", "FILE is damaged or not parquet: "),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        open_task("hellaswag", path)
    assert str(caught.value).startswith(message.replace("FILE", str(path)))


def test_missing_files_tasks_and_labels(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*nix with the rows of lambada"):
        open_task("lambada", tmp_path / "nix")
    with pytest.raises(
        DataError, match=r"holds no file for the task lambada.\n  expected: lambada_openai_test.jsonl or"
    ):
        open_task("lambada", tmp_path)
    with pytest.raises(ConfigError, match=r"there is no task 'lambda'. Did you mean lambada?"):
        open_task("lambda")
    with pytest.raises(ConfigError, match=r"--rows is out of range.\n  got: 0"):
        open_task("lambada", tmp_path, 0)
    path = write(tmp_path / "v.jsonl", without(PIQA, "label"), without(PIQA, "label"))
    with pytest.raises(DataError, match=r"has no field 'label', and beside it there is no v-labels.lst"):
        open_task("piqa", path)
    for labels, said in (("1\n", "1 labels"), ("1\n0\n1\n", "3 labels")):
        (tmp_path / "v-labels.lst").write_text(labels)
        with pytest.raises(
            DataError, match=rf"v-labels.lst does not belong to .*\n  got: {said}\n  expected: 2, one"
        ):
            open_task("piqa", path)
    assert open_task("piqa", path, 1).rows == 1, (
        "cut short, the rest of the labels is of rows that are left out"
    )


def test_a_tokenizer_that_is_not_the_models_or_lacks_characters(tmp_path: Path) -> None:
    task = open_task("hellaswag", write(tmp_path / "h.jsonl", HELLASWAG))
    with pytest.raises(DataError) as caught:
        task.evaluate(made(SHAPES["gpt2"]), ByteTokenizer())
    assert str(caught.value) == (
        "the tokenizer is not the one that the model was trained with.\n  got: 257 ids (bytes)\n"
        "  expected: the model's 211\n  try: the tokenizer folder of the model's own run"
    )
    chars = train_chars(["abcdefghijklmnopqrstuvwxyz .:[]"])
    with pytest.raises(DataError) as caught:
        task.evaluate(made(SHAPES["gpt2"], chars.vocab_size), chars)
    assert str(caught.value).startswith(
        "hellaswag, row 1: the model's tokenizer cannot write this text: the character 'R'"
    )


def test_rows_that_do_not_fit_are_counted(tmp_path: Path) -> None:
    long = {**HELLASWAG, "ctx_a": "many words " * 9}
    task = open_task("hellaswag", write(tmp_path / "h.jsonl", HELLASWAG, long))
    model = made(dataclasses.replace(SHAPES["gpt2"], block_size=64), 257)
    result = task.evaluate(model, ByteTokenizer())
    assert (result.rows, result.cut) == (2, 1) and result.as_dict()["cut"] == 1
    assert set(result.as_dict()) == {
        *("acc", "acc_norm", "acc_bytes", "acc_norm_tokens", "stderr", "rows", "cut", "seconds"),
        *("acc_stderr", "acc_norm_stderr", "acc_bytes_stderr", "acc_norm_tokens_stderr"),
    }


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Files by path on loopback, and its address."""
    served: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = served.get(self.path)
            self.send_response(200 if content is not None else 404)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", served
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tasks"


def published(monkeypatch: pytest.MonkeyPatch, name: str, **remote: Any) -> Callable[[], Any]:
    """hellaswag as if it were published so."""
    of_task = Files(task="hellaswag", names=(name,), remote=(Remote(name=name, **remote),))
    monkeypatch.setattr(choices, "HELLASWAG", of_task)
    return lambda: open_task("hellaswag")


@pytest.mark.network
def test_a_file_is_downloaded_once_and_compared(
    server: tuple[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    content = (json.dumps(HELLASWAG) + "\n").encode()
    served["/h.jsonl"] = content
    digest = hashlib.sha256(content).hexdigest()
    ask = published(monkeypatch, "h.jsonl", url=f"{url}/h.jsonl", sha256=digest)
    assert ask().rows == 1
    served.clear()
    assert ask().rows == 1 and (cache / "hellaswag" / "h.jsonl").read_bytes() == content
    (cache / "hellaswag" / "h.jsonl").write_bytes(b"other")
    with pytest.raises(
        DataError, match=r"h\.jsonl is not the published file\.\n  got: sha256 [0-9a-f]{64} \(5 bytes\)"
    ):
        ask()
    (cache / "hellaswag" / "h.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"/h\.jsonl answers with status 404\.\n  try: put it at .*h\.jsonl, or name"
    ):
        ask()
    served["/h.jsonl"] = b"a page that asks to log in"
    with pytest.raises(DataError, match=f"is not the published file.*\n.*\n  expected: sha256 {digest}"):
        ask()
    assert not (cache / "hellaswag" / "h.jsonl").exists()


@pytest.mark.network
def test_where_no_checksum_is_published_the_first_is_kept(
    server: tuple[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    served["/h.jsonl"] = (json.dumps(HELLASWAG) + "\n").encode()
    ask = published(monkeypatch, "h.jsonl", url=f"{url}/h.jsonl")
    assert ask().rows == 1
    (cache / "hellaswag" / "h.jsonl").unlink()
    served["/h.jsonl"] += b"\n"
    with pytest.raises(DataError, match="is not the published file"):
        ask()


@pytest.mark.network
def test_a_member_of_an_archive(
    server: tuple[str, dict[str, bytes]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, served = server
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("in/h.jsonl", json.dumps(HELLASWAG))
    served["/h.zip"] = packed.getvalue()
    assert published(monkeypatch, "h.jsonl", url=f"{url}/h.zip", member="in/h.jsonl")().rows == 1
    with pytest.raises(DataError, match="is no zip archive with in/other"):
        published(monkeypatch, "o.jsonl", url=f"{url}/h.zip", member="in/other")()
    assert files.SHA256 == ".sha256" and (cache / "hellaswag" / "h.jsonl.sha256").exists()
