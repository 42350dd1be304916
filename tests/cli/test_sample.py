"""`regpt sample` on a run directory: streams, JSON, prompts from anywhere, refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from regpt.cli import main
from regpt.config import ModelConfig
from regpt.infer.engine import SamplingSettings, complete
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.tokenizers.chars import train_chars
from regpt.train.checkpoint import save_checkpoint
from regpt.train.named import model_tensors

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32)


def make_run(folder: Path, tokenizer: Tokenizer, config: ModelConfig = CONFIG) -> GPT2:
    """A run with random weights at two steps, the first the better one; returns the better model."""
    models = []
    for step in (1, 2):
        torch.manual_seed(step)
        model = GPT2(config, tokenizer.vocab_size).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(5)
        state = {
            "model_config": dataclasses.asdict(config),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "best_step": 1,
            "best_val_loss": 1.5,
            "val_loss": 1.5 * step,
        }
        save_checkpoint(
            folder / "checkpoints", step=step, model=model_tensors(model), optimizer=None, state=state
        )
        models.append(model)
    (folder / "tokenizer").mkdir()
    tokenizer.save(folder / "tokenizer")
    return models[0]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models this small are fastest on one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "ein Lauf 漢"
    make_run(folder, ByteTokenizer())
    return folder


@pytest.fixture
def sample(capfd: pytest.CaptureFixture[str], run: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs `regpt sample RUN …` in this process: exit status, standard output, standard error."""

    def call(*words: str, run: Path = run) -> tuple[int, str, str]:
        status = main(["sample", str(run), *words, "--device", "cpu"])
        got = capfd.readouterr()
        return status, got.out, got.err

    return call


Sample = Callable[..., tuple[int, str, str]]


def test_json_is_what_the_engine_says(sample: Sample, tmp_path: Path) -> None:
    model = make_run(tmp_path / "r", ByteTokenizer())
    words = [
        "Hé",
        "-n",
        "3",
        "--seed",
        "5",
        "--max-new-tokens",
        "60",
        "--top-k",
        "20",
        "--stop",
        "a",
        "--stop",
        "b",
    ]
    status, out, err = sample(*words, "--json", run=tmp_path / "r")
    values = json.loads(out)
    settings = SamplingSettings(n=3, seed=5, max_new_tokens=60, top_k=20, stop=("a", "b"))
    expected = complete(model, ByteTokenizer(), "Hé", settings)
    assert values["completions"] == [
        {"text": c.text, "tokens": c.tokens, "finish_reason": c.finish_reason} for c in expected
    ]
    assert status == 0 and values["tokens_per_second"] > 0
    del values["completions"], values["tokens_per_second"]
    run = str(tmp_path / "r")
    assert values == {"prompt": "Hé", "prompt_tokens": 3, "seed": 5, "run": run, "step": 1}
    assert "tokens, " in err and "seed 5, step-000001 of" in err and "cpu float32" in err


def test_text_and_json_agree(sample: Sample) -> None:
    words = ["ab", "--seed", "1", "--max-new-tokens", "20"]
    texts = [c["text"] for c in json.loads(sample(*words, "-n", "2", "--json")[1])["completions"]]
    assert sample(*words, "--n", "2")[1] == f"{texts[0]}\n---\n{texts[1]}\n"
    assert sample(*words)[1] == f"{texts[0]}\n"  # streamed
    assert sample(*words, "--quiet")[1:] == (f"{texts[0]}\n", "")


def test_the_prompt_from_anywhere(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sample("né\r\n", "--seed", "1")[1]
    (tmp_path / "a prompt").write_bytes("né\r\n".encode())
    assert sample("--file", str(tmp_path / "a prompt"), "--seed", "1")[1] == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("né\r\n".encode())))
    assert sample("-", "--seed", "1")[1] == expected


def test_without_a_prompt_a_document_begins(sample: Sample) -> None:
    values = json.loads(sample("--json", "--seed", "1")[1])
    assert (values["prompt"], values["prompt_tokens"]) == ("", 1)


def test_a_fresh_seed_is_told_and_repeats(sample: Sample) -> None:
    first = json.loads(sample("x", "--json")[1])
    again = json.loads(sample("x", "--json", "--seed", str(first["seed"]))[1])
    other = json.loads(sample("x", "--json")[1])
    assert first["completions"] == again["completions"] != other["completions"]


def test_which_checkpoint(sample: Sample, run: Path) -> None:
    asked = ["x", "--json", "--temperature", "0"]
    best, last = json.loads(sample(*asked)[1]), json.loads(sample(*asked, "--which", "last")[1])
    assert (best["step"], last["step"]) == (1, 2) and best["completions"] != last["completions"]
    single = json.loads(sample(*asked, run=run / "checkpoints" / "step-000002")[1])
    assert single["completions"] == last["completions"]


def test_a_context_that_slides_is_said_aloud_once(sample: Sample) -> None:
    said = (
        "warning: prompt and text did not fit the model's context of 32 tokens; it sees the last 24 to 32.\n"
    )
    assert sample("x", "--max-new-tokens", "31", "--seed", "1", "--quiet")[2] == ""
    assert sample("x", "--max-new-tokens", "40", "--seed", "1", "--quiet")[2] == said
    _, _, err = sample("x" * 40, "--max-new-tokens", "40", "--seed", "1", "--quiet")
    said = "warning: the prompt's 40 tokens do not fit the model's context of 32 tokens; it sees the last 24 to 32.\n"
    assert err == said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_arithmetic(sample: Sample, dtype: str) -> None:
    status, _, err = sample("x", "--dtype", dtype)
    assert status == 0 and f"cpu {dtype}" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-n", "0"], "ConfigError: n is out of range.\n  got: 0\n  expected: at least 1\n"),
        (
            ["--top-p", "2"],
            "ConfigError: top_p is out of range.\n  got: 2.0\n  expected: above 0 and at most 1\n",
        ),
        (["--tempratur", "1"], "ConfigError: there is no option --tempratur. Did you mean --temperature?\n"),
        (["--temperature", "hot"], "ConfigError: --temperature cannot take this value.\n  got: 'hot'\n"),
        (["--which", "worst"], "ConfigError: --which cannot take this value.\n  got: 'worst'\n"),
        (
            ["--file", "none.txt"],
            "DataError: cannot read the prompt file none.txt: No such file or directory.\n",
        ),
        (["a", "--file", "b"], "ConfigError: --file and a prompt on the command line exclude each other.\n"),
        (["-n", "9000000000"], "DeviceError: -n 9000000000: a cache of 32 positions each takes "),
    ],
)
def test_refusals(sample: Sample, words: list[str], message: str) -> None:
    status, out, err = sample(*words)
    assert (status, out) == (2, "") and err.startswith(message)


def test_a_run_that_is_not_there(sample: Sample, tmp_path: Path) -> None:
    status, _, err = sample("x", run=tmp_path / "none")
    assert status == 2 and err.startswith(
        f"CheckpointError: there is no run or checkpoint {tmp_path / 'none'}."
    )


def test_a_character_that_the_model_never_saw(sample: Sample, tmp_path: Path) -> None:
    make_run(tmp_path / "chars", train_chars(["abc"]))
    status, out, err = sample("abz", run=tmp_path / "chars")
    assert (status, out) == (2, "") and err.startswith("DataError: ") and "'z'" in err


def test_a_file_that_is_not_text(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"ab\xff\xfe")
    status, _, err = sample("--file", str(tmp_path / "image"))
    assert (
        status == 2 and "image is not UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 2" in err
    )


@pytest.fixture
def endless(run: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has begun to write text and would go on for hours."""
    words = ["x", "--temperature", "0", "--max-new-tokens", "100000000", "--device", "cpu"]
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "regpt", "sample", str(run), *words]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None and process.stdout.read(1)
        yield process
        process.kill()


def test_a_reader_that_goes_away_ends_it_quietly(endless: subprocess.Popen[bytes]) -> None:
    assert endless.stdout is not None and endless.stderr is not None
    endless.stdout.close()
    assert endless.stderr.read() == b"" and endless.wait() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_stops_it(endless: subprocess.Popen[bytes]) -> None:
    endless.send_signal(signal.SIGINT)
    assert endless.communicate()[1] == b"\nstopped.\n" and endless.wait() == 130


def test_output_that_cannot_show_a_character(run: Path) -> None:
    """An ASCII-only terminal gets a question mark, not a traceback."""
    command = [sys.executable, "-m", "regpt", "sample", str(run), "x", "--seed", "1", "--device", "cpu"]
    got = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert got.returncode == 0 and b"?" in got.stdout and got.stdout.isascii()
