"""`regpt prepare` and `regpt inspect` of shards, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from regpt.cli import main
from regpt.cli.inspect import count_lengths
from regpt.config import Config, to_dict
from regpt.data import workers
from regpt.data.shards import Shards
from regpt.tokenizers import load_tokenizer
from regpt.train.checkpoint import save_checkpoint
from regpt.train.run import RunDirectory


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of texts, its name with a space and an umlaut; and we are in the folder above."""
    texts = tmp_path / "my téxts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i:02}.txt").write_text(
            f"Story {i}.\n" + "once upon a time, " * (1 + i % 7), encoding="utf-8"
        )
    (texts / "30.txt").write_bytes(b"\xff")
    monkeypatch.chdir(tmp_path)
    return texts


@pytest.mark.parametrize("tokenizer, vocab_size", [("bytes", 257), ("chars", None), ("bpe", 270)])
def test_prepare_then_inspect(folder, capsys, tokenizer, vocab_size) -> None:
    """The keys that scripts rely on, with --json; trained tokenizers are saved with the shards."""
    arguments = ["prepare", "my téxts", "--out", "öut put", "--tokenizer", tokenizer, "--vocab-size", "270"]
    assert main([*arguments, "--val-fraction", "0.2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    shards = Shards.open("öut put")
    splits = shards.manifest.splits
    assert set(result) == {
        "out",
        "tokenizer",
        "train_tokens",
        "val_tokens",
        "documents",
        "bytes",
        "bytes_per_token",
        "longest_tokens",
        "duplicates",
        "seconds",
        "skipped",
    }
    assert (result["train_tokens"], result["val_tokens"]) == (splits["train"].tokens, splits["val"].tokens)
    assert (
        result["out"] == "öut put" and result["documents"] == 30 and result["skipped"] == {"invalid UTF-8": 1}
    )
    saved = load_tokenizer(Path("öut put/tokenizer"))
    assert result["tokenizer"]["fingerprint"] == saved.fingerprint and saved.kind == tokenizer
    assert vocab_size is None or saved.vocab_size == vocab_size
    assert main(["inspect", "öut put", "--json", "--split", "val", "--documents", "1"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["kind"] == "shards" and seen["verified"] and seen["manifest"]["splits"]["val"]["tokens"] > 0
    assert len(seen["samples"]) == 1 and seen["samples"][0]["text"].startswith("Story")
    assert sum(seen["lengths"].values()) == splits["val"].documents


def test_what_a_person_sees(folder, capsys) -> None:
    """Results on standard output, the rest on standard error; nothing there with --quiet."""
    assert (
        main(
            [
                "prepare",
                "my téxts",
                "--out",
                "out",
                "--tokenizer",
                "bytes",
                "--val-fraction",
                "0.1",
                "--quiet",
            ]
        )
        == 0
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    for words in (
        "tokenizer  bytes, 257 ids",
        "train      ",
        "val        ",
        "skipped    1 invalid UTF-8",
        "regpt inspect out",
    ):
        assert words in captured.out
    assert main(["inspect", "out"]) == 0
    shown = capsys.readouterr().out
    assert "every byte is as it was written" in shown and "Story" in shown and "train document 1" in shown
    ids = folder.parent / "out/train-00000.bin"
    ids.write_bytes(b"X" + ids.read_bytes()[1:])
    assert main(["inspect", "out"]) == 2
    assert "train-00000.bin has changed since it was written" in capsys.readouterr().err
    assert main(["inspect", "out", "--no-verify"]) == 0
    assert main(["inspect", "nowhere"]) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nosuch.txt", "--out", "o"], "there is no file, folder or named set 'nosuch.txt'"),
        (
            ["my téxts", "--out", "my téxts", "--tokenizer", "bytes"],
            "is not empty and not a folder of token shards",
        ),
        (["my téxts", "--out", "o", "--tokenizer", "gtp2"], "gtp2"),
        (
            ["my téxts", "--out", "o", "--tokenizer", "bytes", "--val-fraction", "1.5"],
            "data.val_fraction must lie in [0, 1)",
        ),
        (
            ["my téxts", "--out", "o", "--tokenizer", "bytes", "--workers", "0"],
            "data.workers is out of range",
        ),
        (["a.jsonl", "--out", "o", "--tokenizer", "bytes"], "a.jsonl:1 has no field 'text'"),
        (["a.jsonl", "--out", "o", "--tokenizer", "bytes", "--text-field", "no"], "has no field 'no'"),
        (["my téxts"], "out"),
    ],
)
def test_mistakes_give_one_message_and_exit_2(folder, capsys, arguments, message) -> None:
    (folder.parent / "a.jsonl").write_text('{"body": "x"}\n')
    assert main(["prepare", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and "Traceback" not in captured.err
    assert not (folder.parent / "o").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_stopped_preparation_is_finished_by_the_same_command(tmp_path, signum, status) -> None:
    """`python -m regpt prepare` with processes of its own: stopped, it leaves no folder; called again, it ends."""
    (tmp_path / "a.txt").write_bytes(b"some words, and others. " * 1_500_000)
    command = [
        sys.executable,
        "-m",
        "regpt",
        "prepare",
        "a.txt",
        "--out",
        "out",
        "--tokenizer",
        "bytes",
        "--workers",
        "2",
    ]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not list(tmp_path.glob(".out.partial/shards/train-*")):
            pass
        process.send_signal(signum)
        _, err = process.communicate()
    assert process.returncode == status and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    assert Shards.open(tmp_path / "out").split("train").n_documents == 1
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "out"]


def test_worker_processes_start_without_torch() -> None:
    """They must start fast: many of them do, for every preparation."""
    code = f"import sys, {workers.__name__}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_lengths_are_counted_by_powers_of_ten() -> None:
    lengths = [1, 9, 10, 99, 100, 12_345, 7]
    assert count_lengths(np.cumsum(lengths)) == {10: 3, 100: 2, 1000: 1, 100_000: 1}
    assert count_lengths(np.empty(0, dtype=np.int64)) == {}


def test_inspect_of_a_run_shows_each_loss_at_its_own_step(tmp_path, capsys) -> None:
    """A loss that was not finite is null in the log; a checkpoint between evaluations has none."""
    plan = {"parameters": 1, "vocab_size": 257, "steps": 20, "dtype": "float32"}
    with RunDirectory.open(tmp_path / "run") as run:
        run.begin(config=to_dict(Config()), plan=plan, machine={"name": "here"})
        run.log("eval", 5, {"val_loss": 2.5, "val_bits_per_byte": 1.25})
        run.log("eval", 10, {"val_loss": float("nan"), "val_bits_per_byte": float("nan")})
        for step, evaluated in ((5, 5), (7, 5)):
            state = {"val_loss": 2.5, "evaluated_step": evaluated}
            save_checkpoint(run.checkpoints, step=step, model={"a": torch.ones(1)}, optimizer={}, state=state)
    assert main(["inspect", str(run.path)]) == 0
    shown = capsys.readouterr().out
    assert "step      5: 2.5000 (1.2500 bits per byte)" in shown and "step     10: not finite" in shown
    assert main(["inspect", str(run.path), "--json"]) == 0
    assert [c["val_loss"] for c in json.loads(capsys.readouterr().out)["checkpoints"]] == [2.5, None]
    with RunDirectory.open(tmp_path / "run") as run:
        run.log("save", 9, {"path": "step-000009"})
    assert main(["inspect", str(run.path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["missing_step"] == 9
    assert main(["inspect", str(run.path)]) == 2
    assert "checkpoint of step 9, the last one saved, is GONE" in capsys.readouterr().out


def test_slices_are_prepared_and_merged(folder, capsys) -> None:
    """As on several machines; what comes out is what one machine makes."""
    wishes = [
        "--tokenizer",
        "bytes",
        "--val-fraction",
        "0.2",
        "--dedup",
        "--min-chars",
        "20",
        "--shuffle-seed",
        "1",
    ]
    for i in (1, 2):
        assert main(["prepare", "my téxts", "--out", f"part{i}", "--slice", f"{i}/2", *wishes]) == 0
    assert main(["merge", "part2", "part1", "--out", "merged", "--json"]) == 0
    merged = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["prepare", "my téxts", "--out", "whole", *wishes, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in merged.items() if k not in ("out", "seconds")} == {
        k: v for k, v in whole.items() if k not in ("out", "seconds")
    }
    assert Shards.open("merged").manifest == Shards.open("whole").manifest
    assert main(["inspect", "merged"]) == 0
    assert main(["merge", "part1", "--out", "other"]) == 2
    assert "of 2 slices these are missing: 2." in capsys.readouterr().err
    assert main(["merge", "--out", "other"]) == 2
    assert "no slices are given" in capsys.readouterr().err
