"""A first day with regpt, by its command line alone, in an empty folder with a space and an accent in its name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TEXT = "".join(
    f"Chapter {i}. It was the {i}th night; the sea was calm, and so were we.\n" for i in range(300)
)
TINY = [
    "--tokenizer.name",
    "bytes",
    "--model.n-layer",
    "1",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "32",
    "--model.block-size",
    "32",
    "--train.batch-tokens",
    "256",
    "--train.steps",
    "20",
    "--eval.every",
    "10",
    "--optim.warmup-steps",
    "2",
    "--data.val-fraction",
    "0.1",
    "--sample.tokens",
    "8",
    "--data.workers",
    "1",
    "--train.device",
    "cpu",
]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "an empty fôlder"
    folder.mkdir()
    (folder / "my text.txt").write_text(TEXT, encoding="utf-8")
    return folder


def regpt(home: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "regpt", *words], cwd=home, capture_output=True, text=True, input=stdin
    )


def result(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert isinstance(values, dict)
    return values


def test_from_text_to_text(home: Path) -> None:
    """Train on a file, look at the run and its data, sample from it."""
    trained = result(regpt(home, "train", "--data.source", "my text.txt", *TINY, "--out", "my run", "--json"))
    assert {"step", "tokens", "val_loss", "val_bits_per_byte", "tokens_per_second", "seconds", "run"} <= set(
        trained
    )
    assert (trained["step"], trained["tokens"], trained["run"]) == (20, 20 * 256, "my run")
    assert 0 < trained["val_loss"] < 5.55

    sampled = result(
        regpt(
            home, "sample", "my run", "It was", "--max-new-tokens", "12", "-n", "2", "--seed", "1", "--json"
        )
    )
    assert [set(c) >= {"text", "tokens", "finish_reason"} for c in sampled["completions"]] == [True, True]
    assert sampled["tokens_per_second"] > 0
    again = result(
        regpt(
            home, "sample", "my run", "It was", "--max-new-tokens", "12", "-n", "2", "--seed", "1", "--json"
        )
    )
    assert again["completions"] == sampled["completions"]

    folder = next((home / "data").iterdir())
    looked = result(regpt(home, "inspect", str(folder), "--json"))
    assert looked["manifest"]["splits"]["train"]["tokens"] > 0
    assert "my run" in regpt(home, "inspect", "my run").stdout
    assert regpt(home, "inspect", "my run/checkpoints/step-000020").returncode == 0

    assert {p.name for p in home.iterdir()} == {"my text.txt", "my run", "data"}


def test_prepare_then_train_on_the_shards(home: Path) -> None:
    made = result(
        regpt(
            home,
            "prepare",
            "my text.txt",
            "--out",
            "shards",
            "--tokenizer",
            "bytes",
            "--val-fraction",
            "0.1",
            "--json",
        )
    )
    assert made["train_tokens"] + made["val_tokens"] == len(TEXT) + 2
    trained = result(regpt(home, "train", "--data.source", "shards", *TINY, "--out", "run", "--json"))
    assert trained["step"] == 20
    refused = regpt(
        home, "train", "--data.source", "shards", *TINY, "--tokenizer.name", "chars", "--out", "b"
    )
    assert refused.returncode == 2
    assert (
        "was written with tokenizer bytes" in refused.stderr and "this run asks for chars" in refused.stderr
    )


def test_prompts_from_a_file_and_from_standard_input(home: Path) -> None:
    assert (
        regpt(home, "train", "--data.source", "my text.txt", *TINY, "--out", "run", "--quiet").returncode == 0
    )
    (home / "prompt é.txt").write_text("the sea", encoding="utf-8")
    from_file = regpt(
        home, "sample", "run", "--file", "prompt é.txt", "--max-new-tokens", "5", "--seed", "1", "--quiet"
    )
    from_stdin = regpt(
        home, "sample", "run", "-", "--max-new-tokens", "5", "--seed", "1", "--quiet", stdin="the sea"
    )
    assert from_file.returncode == 0, from_file.stderr
    assert from_file.stdout == from_stdin.stdout
    assert from_file.stderr == ""


@pytest.mark.parametrize("sig", ["SIGINT", "SIGTERM"])
def test_a_real_signal_saves_and_the_same_command_continues(home: Path, sig: str) -> None:
    command = [
        *(sys.executable, "-m", "regpt", "train", "--data.source", "my text.txt", *TINY, "--out", "run"),
        *("--train.steps", "100000", "--track.log-every", "1"),
    ]
    process = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:  # the first validation says that training is well under way
        if "validation loss" in line:
            break
    process.send_signal(getattr(signal, sig))
    _, err = process.communicate()
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[sig]
    assert f"Interrupted: stopped by {sig} after step" in err and "the same command continues" in err
    step = max(int(p.name[5:]) for p in (home / "run/checkpoints").glob("step-*"))
    on = regpt(home, *command[3:-4], "--train.steps", str(step + 3), "--json")
    assert f"continuing run from step {step}" in on.stderr
    assert result(on)["step"] == step + 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.source", "nothing here.txt"], "nothing here.txt"),
        (["--data.source", "my text.txt", "--model.n-hed", "2"], "Did you mean --model.n-head?"),
        (["--data.source", "my text.txt", "--train.steps", "many"], "--train.steps cannot take this value."),
        (["--data.source", "my text.txt", "--train.batch-tokens", "100"], "is not a multiple of 32 tokens"),
        (
            ["--data.source", "my text.txt", "--model.block-size", "65536", "--train.batch-tokens", "65536"],
            "block_size",
        ),
        (["--data.source", "my text.txt", "--model.n-head", "5"], "is not a multiple of model.n_head=5"),
        (["--data.source", "my text.txt", "--optim.warmup-steps", "500"], "warmup_steps"),
        (["--data.source", "my text.txt", "--tokenizer.name", "nope"], "nope"),
        (["--data.source", "my text.txt", "--train.device", "cuda:7"], "--train.device auto"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_mistake_gives_one_message_and_leaves_nothing_behind(
    home: Path, words: list[str], message: str
) -> None:
    done = regpt(home, "train", *TINY, *words, "--out", "run", "--quiet")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert done.stderr.count("Error: ") == 1 and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (home / "run").exists()


def test_a_half_deleted_run_gives_one_message(home: Path) -> None:
    assert (
        regpt(home, "train", "--data.source", "my text.txt", *TINY, "--out", "run", "--quiet").returncode == 0
    )
    newest = home / "run/checkpoints/step-000020"
    (newest / "model.safetensors").unlink()
    sampled = regpt(home, "sample", "run", "x", "--max-new-tokens", "3")
    assert "model.safetensors" in sampled.stderr, "the damaged file is named"
    assert sampled.returncode == 0, "and the checkpoint before it is used"
    shutil.rmtree(home / "run/tokenizer")
    assert regpt(home, "sample", "run", "x").returncode == 2


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_json_alone_on_standard_output_under_a_pipe(home: Path) -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m regpt train --data.source 'my text.txt' {' '.join(TINY)} --out r --json 2>/dev/null"
        f" | '{sys.executable}' -c 'import json,sys; print(json.load(sys.stdin)[\"step\"])'",
        shell=True,
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "20"
