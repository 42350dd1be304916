"""Runs on token files of other programs: the same as on our own shards, resumed to the bit, refused before step 1."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import published
import pytest

from regpt.cli import main
from regpt.config import Config, DataConfig, TokenizerConfig
from regpt.data.corpus import corpus, known_corpus, text_identity
from regpt.errors import CheckpointError, ConfigError, DataError
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars
from regpt.train.session import train
from tiny import TINY_TEXT


def on(config: Config, source: str, **more: object) -> Config:
    return dataclasses.replace(config, data=DataConfig(source=source, **more))  # type: ignore[arg-type]


def losses(run: Path) -> list[object]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [
        [e.get(k) for k in ("loss", "val_loss", "val_bits_per_byte")]
        for e in lines
        if "loss" in e or "val_loss" in e
    ]


@pytest.fixture
def prepared(tiny_run) -> Config:
    """The tiny run on its own shards, prepared."""
    words = [
        "prepare",
        "text.txt",
        "--out",
        "ours",
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.1",
        "--quiet",
    ]
    assert main(words) == 0
    return on(tiny_run, "ours")


@pytest.mark.parametrize("format", ["nanogpt", "llmc", "megatron", "datatrove"])
def test_the_same_run_as_on_our_shards(prepared, capsys, format, one_thread) -> None:
    """Losses and bits per byte to the bit: the ids are the same, and so is their order. llm.c has end-of-text first."""
    train(prepared, "on-ours")
    words = ["convert", "ours", "--to", format, "--out", "theirs", "--eot", "append", "--quiet", "--json"]
    assert main(words) == 0
    made = json.loads(capsys.readouterr().out)
    assert sum(made["tokens"].values()) == len(TINY_TEXT) + 2
    config = on(prepared, "theirs")
    heard: list[str] = []
    train(
        config,
        "on-theirs",
        listen=lambda event, step, values: heard.append(values["text"]) if event == "info" else None,
    )
    assert losses(Path("on-theirs")) == losses(Path("on-ours"))
    assert any(f"training on {format} files in theirs as they are" in text for text in heard)


def test_resume_is_exact_and_other_data_is_refused(tiny_run, one_thread) -> None:
    """Stopped at 6 of 12 steps and continued: the same weights. Ids that changed meanwhile are another text."""
    ids = np.array(ByteTokenizer().encode(TINY_TEXT), "<u2")
    ids.tofile("train.bin")
    config = on(tiny_run, "train.bin", val_fraction=0.1)
    train(config, "whole")
    half = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, steps=6),
        optim=dataclasses.replace(config.optim, decay_steps=12),
    )
    train(half, "parted")
    train(dataclasses.replace(config, optim=half.optim), "parted")
    name = "checkpoints/step-000012/model.safetensors"
    assert Path("parted", name).read_bytes() == Path("whole", name).read_bytes()
    ids[5] = 7
    ids.tofile("train.bin")
    with pytest.raises(CheckpointError, match="the text changed since the run in parted was begun: tokens"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=14)), "parted")


def test_where_gpt2s_files_lie_is_no_part_of_the_text(tiny_run, test_data) -> None:
    """A run goes on with `--tokenizer.files`, on a machine without a network."""
    np.arange(1000, dtype="<u2").tofile("train.bin")
    config = on(dataclasses.replace(tiny_run, tokenizer=TokenizerConfig()), "train.bin")
    files = TokenizerConfig(files=str(test_data / "tokenizer"))
    offline = dataclasses.replace(config, tokenizer=files)
    assert text_identity(offline) == text_identity(config)
    assert known_corpus(offline)[0] == corpus(offline)[0].vocab_size


def test_wrong_ids_are_refused_before_step_1(tiny_run) -> None:
    """Naming file and byte; with data.verify=false only the files' ends are looked at."""
    ids = np.ones(200_000, "<u2")
    ids[100_000] = 999
    ids.tofile("train.bin")
    config = on(tiny_run, "train.bin")
    with pytest.raises(
        DataError, match=r"train.bin holds an id outside the vocabulary at byte 200000.\n  got: 999"
    ):
        train(config, "run")
    assert not Path("run").exists()
    corpus(on(tiny_run, "train.bin", verify=False))


def test_nanogpts_characters(tiny_run) -> None:
    """Their vocabulary comes from input.txt, the text beside them, and never from the pickle."""
    chars = train_chars([TINY_TEXT])
    folder = Path("char")
    folder.mkdir()
    ids = np.array(chars.encode(TINY_TEXT), "<u2")
    ids[:20_000].tofile(folder / "train.bin")
    ids[20_000:].tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n")
    config = on(
        dataclasses.replace(tiny_run, tokenizer=dataclasses.replace(tiny_run.tokenizer, name="chars")), "char"
    )
    with pytest.raises(
        ConfigError,
        match=r"which chars tokenizer wrote them \(nanoGPT's meta.pkl is never read(.|\n)*input.txt",
    ):
        corpus(config)
    (folder / "input.txt").write_text(TINY_TEXT)
    tokenizer, tokens = corpus(config)
    assert tokenizer.fingerprint == chars.fingerprint
    assert tokens.split("val").source_bytes == len(ids) - 20_000
    assert tokenizer.decode(tokens.split("train").read(0, 40).tolist()) == TINY_TEXT[:40]
    (folder / "input.txt").write_text(TINY_TEXT[::-1])
    with pytest.raises(DataError, match=r"input.txt is not the text that .*train.bin was made from"):
        corpus(config)
    bpe = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, name="bpe"))
    with pytest.raises(
        ConfigError, match=r"which bpe tokenizer wrote them(.|\n)*--tokenizer.name gpt2, or a folder"
    ):
        corpus(bpe)


def test_the_tokenizer_beside_the_files(prepared) -> None:
    """`regpt convert` leaves it there; a run that asks for another one is refused."""
    assert main(["convert", "ours", "--to", "llmc", "--out", "theirs", "--quiet"]) == 0
    config = on(prepared, "theirs")
    assert corpus(config)[0].kind == "bytes" and known_corpus(config)[0] == 257
    other = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, name="gpt2"))
    with pytest.raises(
        DataError, match=r"theirs/tokenizer is the bytes tokenizer of these tokens, this run asks for gpt2"
    ):
        corpus(other)


def test_validation_of_another_source(tiny_run) -> None:
    """Tokens for both, or text for both; the identity of the data knows either."""
    for name in ("a", "b"):
        Path(name).mkdir()
        published.write("datatrove", Path(name), "train", [[1, 2, 3]] * 50, 257, files=2)
    config = on(tiny_run, "a", val_source="b/00000_train_shuffled.ds")
    tokens = corpus(config)[1]
    assert (tokens.split("train").n_tokens, tokens.split("val").n_tokens) == (200, 100)
    assert text_identity(config) == {"tokens": tokens.fingerprint} != text_identity(on(tiny_run, "a"))
    with pytest.raises(ConfigError, match=r"data.source holds tokens, data.val_source=text.txt does not"):
        corpus(on(tiny_run, "a", val_source="text.txt"))
    published.write("nanogpt", Path("a"), "val", [[]], 257)
    with pytest.raises(DataError, match="one token is too little to validate on"):
        corpus(on(tiny_run, "a/*.ds", val_source="a/val.bin"))


def test_what_a_person_sees(tiny_run, capsys) -> None:
    """inspect and plan of token files, convert's words, and a path that holds none."""
    Path("theirs").mkdir()
    documents = [list(f"Story {i}".encode()) for i in range(30)]
    published.write("llmc", Path("theirs"), "train", documents, 257, files=2)
    published.write("llmc", Path("theirs"), "val", documents[:3], 257)
    assert main(["inspect", "theirs", "--tokenizer", "bytes", "--documents", "1"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "theirs: llmc files", "tokens in 30 documents, 2 files of uint16", "end where <|endoftext|> says so (prepend)",
        "every id lies in the vocabulary", "--- train document 0, 8 tokens\nStory 0",
    ):  # fmt: skip
        assert expected in text
    published.write("llmc", Path("theirs"), "test", documents[:3], 257)
    assert main(["inspect", "theirs", "--tokenizer", "bytes"]) == 0
    assert "left out   fineweb_test_000000.bin: test" in capsys.readouterr().out
    assert main(["inspect", "theirs", "--tokenizer", "bytes", "--split", "val", "--documents", "0"]) == 0
    assert "lengths    val: 3 under 10" in capsys.readouterr().out
    one = "theirs/fineweb_val_000000.bin"
    assert main(["inspect", "theirs/*_val_*.bin", "--tokenizer", "bytes", "--json"]) == 0
    capsys.readouterr()
    assert main(["inspect", one, "--tokenizer", "bytes", "--json", "--no-verify"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["kind"] == "tokens" and seen["splits"] == {
        "train": {"tokens": 24, "documents": 3, "files": 1}
    }
    words = [
        "--tokenizer.name",
        "bytes",
        "--train.device",
        "cpu",
        "--model.n-layer",
        "1",
        "--train.steps",
        "2000",
    ]
    assert main(["plan", "demo", "--data.source", "theirs", *words]) == 0
    assert "data      theirs: 260 training + 24 validation tokens, bytes of 257" in capsys.readouterr().out
    words = ["convert", "theirs", "--to", "nanogpt", "--out", "new", "--eot", "none", "--tokenizer", "bytes"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "prepend in theirs, none in new" in said.out and "nothing in nanogpt files says where" in said.err
    assert "left out, as their names say test: fineweb_test_000000.bin" in said.err
    assert main(["convert", "text.txt", "--to", "llmc", "--out", "x"]) == 2
    assert "text.txt holds no token files" in capsys.readouterr().err
    assert main(["convert", one, "--to", "llmc", "--out", "x", "--eot-id", "5"]) == 2
    assert "--eot-id and --vocab-size go together" in capsys.readouterr().err
    words = [
        "convert",
        one,
        "--to",
        "datatrove",
        "--out",
        "x",
        "--eot-id",
        "256",
        "--vocab-size",
        "60000",
        "--quiet",
    ]
    assert main(words) == 0 and not Path("x/tokenizer").exists()
    assert Path("x/train_00000.ds.metadata").read_text().startswith("Unknown Tokenizer|2\n24\n")


@pytest.mark.parametrize("name", ["train", "val"])
def test_an_emptied_file_is_not_left_out_in_silence(tmp_path, capsys, monkeypatch, name) -> None:
    """Validation would be cut off the training text, whose loss is another."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        np.arange(200, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    (tmp_path / f"{name}.bin").write_bytes(b"")
    assert main(["train", "demo", "--data.source", ".", "--tokenizer.name", "bytes", "--out", "run"]) == 2
    assert f"{name}.bin holds no tokens" in capsys.readouterr().err and not Path("run").exists()


def test_a_megatron_file_without_its_index_is_not_left_out(prepared, capsys) -> None:
    assert main(["convert", "ours", "--to", "megatron", "--out", "source", "--quiet"]) == 0
    Path("source/b_document.bin").write_bytes(b"\0\0" * 50)
    words = ["train", "demo", "--data.source", "source", "--tokenizer.name", "bytes", "--out", "run"]
    assert main(words) == 2
    assert "b_document" in capsys.readouterr().err and not Path("run").exists()
