"""`regpt tokenizer train` and `show`, as a user calls them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from regpt.cli import main
from regpt.cli.completion import candidates
from regpt.config import Config, TokenizerConfig
from regpt.data import corpus
from regpt.data.shards import Shards
from regpt.data.sources import open_source
from regpt.tokenizers import load_tokenizer
from regpt.tokenizers.bpe import train_bpe

STORY = "Once upon a time there was a king, and the king's 123 men were 12345 kings. "


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We are in a folder with two texts."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(STORY * 20, encoding="utf-8")
    Path("b.jsonl").write_text("".join(json.dumps({"body": f"{STORY} größer {n}"}) + "\n" for n in range(20)))
    return tmp_path


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["tokenizer", *words]) == 2
    return capsys.readouterr().err


def test_train_then_prepare_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["a.txt", "b.jsonl", "--text-field", "body", "--vocab-size", "300", "--out", "tök/1"]
    words += ["--special-tokens", "<|im_start|>", "<|im_end|>", "--pattern", "gpt4", "--min-frequency", "3"]
    assert main(["tokenizer", "train", *words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {
        "out",
        "kind",
        "vocab_size",
        "pattern",
        "special_tokens",
        "fingerprint",
        "min_frequency",
        "learner",
        "seconds",
    }
    assert (result["vocab_size"], result["pattern"], result["min_frequency"]) == (300, "gpt4", 3)
    assert result["special_tokens"] == {"<|im_start|>": 297, "<|im_end|>": 298, "<|endoftext|>": 299}
    saved = load_tokenizer(Path("tök/1"))
    texts = [STORY * 20, *(f"{STORY} größer {n}" for n in range(20))]
    special = ["<|im_start|>", "<|im_end|>"]
    same = train_bpe(texts, 300, pattern="gpt4", special_tokens=special, min_frequency=3)
    assert saved.fingerprint == result["fingerprint"] == same.fingerprint
    assert main(["prepare", "a.txt", "--tokenizer", "tök/1", "--out", "data", "--val-fraction", "0"]) == 0
    assert Shards.open("data").manifest.tokenizer.vocab_size == 300


def test_train_says_what_is_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "train", "a.txt", "--vocab-size", "280", "--out", "t"]) == 0
    said = capsys.readouterr()
    assert "kind         bpe, gpt2's split\nentries      280\n" in said.out
    assert "next:        regpt tokenizer show t\n" in said.out
    assert "regpt prepare a.txt --tokenizer t --out" in said.out
    assert said.err.startswith("learning 280 entries from 0.00 MB of 0.00 MB, with ")


def test_what_is_left_out_is_said(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        main(["tokenizer", "train", "a.txt", "--vocab-size", "280", "--out", "t", "--max-bytes", "500"]) == 0
    )
    assert "the tokenizer is learnt from the first 500 bytes of the text" in caplog.messages


def test_mistakes_are_said_before_any_work(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["train", "a.txt", "--out", "t", "--vocab-size"]
    assert "tokenizer.vocab_size is too small" in error_of(capsys, *base, "100")
    twice = error_of(capsys, *base, "300", "--special-tokens", "<|a|>", "<|a|>")
    assert "tokenizer.special_tokens has '<|a|>' twice." in twice
    assert "tokenizer.min_frequency is out of range" in error_of(capsys, *base, "300", "--min-frequency", "0")
    assert "the text to learn from is out of range" in error_of(capsys, *base, "300", "--max-bytes", "0")
    assert "there is no text to learn from" in error_of(capsys, "train", "--out", "t", "--vocab-size", "300")
    assert "nothing.txt" in error_of(capsys, "train", "nothing.txt", "--out", "t", "--vocab-size", "300")
    Path("empty.txt").write_text("")
    assert "DataError" in error_of(capsys, "train", "empty.txt", "--out", "t", "--vocab-size", "300")
    assert "cannot take this value" in error_of(capsys, *base, "300", "--pattern", "gpt3")
    assert not Path("t").exists()


def test_a_folder_that_is_there_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    Path("t").mkdir()
    Path("t/mine").write_text("precious")
    said = error_of(capsys, "train", "a.txt", "--vocab-size", "300", "--out", "t")
    assert said.startswith("DataError: t is there already, and is not overwritten.\n  try: another --out")
    assert [p.name for p in Path("t").iterdir()] == ["mine"]
    Path("file").write_text("")
    assert "is there already" in error_of(capsys, "train", "a.txt", "--vocab-size", "300", "--out", "file")
    assert "is not a folder to write in" in error_of(
        capsys, "train", "a.txt", "--vocab-size", "300", "--out", "file/t"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    Path("locked").mkdir(mode=0o500)
    assert "is not a folder to write in" in error_of(
        capsys, "train", "a.txt", "--vocab-size", "300", "--out", "locked/t"
    )


def test_show_one(capsys: pytest.CaptureFixture[str]) -> None:
    train_bpe([STORY * 9], 290, special_tokens=["<|a|>"]).save(Path("t"))
    assert main(["tokenizer", "show", "t", "--text", "a.txt", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    (one,) = values["tokenizers"]
    tokenizer = load_tokenizer(Path("t"))
    assert (values["text"], values["text_bytes"]) == ("a.txt", len(STORY) * 20)
    assert (one["kind"], one["vocab_size"], one["merges"], one["pattern"]) == ("bpe", 290, 32, "gpt2")
    assert one["tokens"] == len(tokenizer.encode(STORY * 20))
    assert one["bytes_per_token"] == pytest.approx(len(STORY) * 20 / one["tokens"])
    assert len(one["first_merges"]) == len(one["last_merges"]) == 8
    assert sum(one["entries"].values()) == 288
    assert "".join(one["sample"]) == (STORY * 20)[:160]
    assert main(["tokenizer", "show", "t", "--text", "a.txt"]) == 0
    out = capsys.readouterr().out
    assert "special      <|a|> 288, <|endoftext|> 289\n" in out
    assert "of these     " in out and "merges       32; the first: " in out and "longest      " in out
    assert "·king│" in out and f"{one['bytes_per_token']:.3f} bytes a token" in out


def test_show_two_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    train_bpe([STORY * 9], 290).save(Path("t"))
    assert main(["tokenizer", "show", "t", "bytes", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert [t["name"] for t in values["tokenizers"]] == ["t", "bytes"]
    assert values["common"] == {"entries": 256, "of_first": pytest.approx(256 / 289), "of_second": 1.0}
    assert values["tokenizers"][1]["bytes_per_token"] == 1.0
    assert main(["tokenizer", "show", "t", "bytes"]) == 0
    assert "in common    256 entries: 88.6% of the first, 100.0% of the second" in capsys.readouterr().out


def test_show_says_where_a_tokenizer_lacks_characters(capsys: pytest.CaptureFixture[str]) -> None:
    from regpt.tokenizers.chars import train_chars

    train_chars(["abc"]).save(Path("c"))
    assert main(["tokenizer", "show", "c", "--text", "a.txt"]) == 0
    assert "the character 'O' (U+004F) at position 0 is not among the 3" in capsys.readouterr().out


def test_show_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no tokenizer 'gtp2'" in error_of(capsys, "show", "gtp2")
    assert "cannot read nothing: No such file" in error_of(capsys, "show", "bytes", "--text", "nothing")
    Path("latin").write_bytes(b"caf\xe9")
    assert "latin is not valid UTF-8 at byte 3." in error_of(capsys, "show", "bytes", "--text", "latin")
    Path("empty").write_bytes(b"")
    assert "empty is empty." in error_of(capsys, "show", "bytes", "--text", "empty")
    assert "there is no tokenizer command 'trian'. Did you mean train?" in error_of(capsys, "trian")


def test_the_list_and_completion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tokenizer", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["actions"]) == {"train", "show"}
    assert candidates(["tokenizer", ""]) == ["train", "show"]
    assert candidates(["tokenizer", "train", "--min"]) == ["--min-frequency"]
    assert candidates(["bench", "tr"]) == ["train"]


def test_settings_of_a_run_reach_the_tokenizer_and_name_another_data_folder() -> None:
    """As they always were, the folder keeps its name; otherwise it has another."""
    from dataclasses import replace

    source = open_source("a.txt")
    config = replace(Config(), tokenizer=TokenizerConfig(name="bpe", vocab_size=280))
    folder = corpus.data_folder(config, (source, None, 0.005))
    others = [
        TokenizerConfig(name="bpe", vocab_size=280, **more)
        for more in ({"pattern": "gpt4"}, {"min_frequency": 3})
    ]
    folders = {corpus.data_folder(replace(config, tokenizer=t), (source, None, 0.005)) for t in others}
    assert len({folder} | folders) == 3
    made = corpus.tokenizer_for(others[0], source, None, 0, lambda *_: None)
    assert made.fingerprint == train_bpe([STORY * 20], 280, pattern="gpt4").fingerprint
