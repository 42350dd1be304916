"""The command line as a user meets it: help, typos, types, exit statuses, streams."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regpt import __version__
from regpt.cli import COMMANDS, main
from regpt.cli.parse import CommonArgs, Output, parse
from regpt.cli.train import Args as TrainArgs
from regpt.errors import Interrupted


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "regpt", *words], capture_output=True, text=True)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, what in COMMANDS.items():
        assert name in out and what in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"regpt {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_the_common_flags(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--json", "--quiet", "--debug"):
        assert flag in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "UsageError: there is no command 'trian'. Did you mean train?\n  try: regpt --help\n"),
        (
            ["train", "--model.n-lyer", "3"],
            "ConfigError: there is no setting --model.n-lyer. Did you mean --model.n-layer?\n  try: regpt train --help\n",
        ),
        (
            ["train", "--model.n_lyer=3"],
            "ConfigError: there is no setting --model.n-lyer. Did you mean --model.n-layer?\n  try: regpt train --help\n",
        ),
        (
            ["train", "--frsh"],
            "ConfigError: there is no option --frsh. Did you mean --fresh?\n  try: regpt train --help\n",
        ),
        (
            ["train", "--model.n-layer", "x"],
            "ConfigError: --model.n-layer cannot take this value.\n  got: 'x'\n  expected: a whole number\n",
        ),
        (
            ["train", "--optim.clip-norm", "x"],
            "ConfigError: --optim.clip-norm cannot take this value.\n  got: 'x'\n  expected: a number or none\n",
        ),
        (
            ["train", "--train.dtype", "fp8"],
            "ConfigError: --train.dtype cannot take this value.\n  got: 'fp8'\n"
            "  expected: 'auto', 'float32', 'bfloat16' or 'float16'\n",
        ),
        (
            ["train", "--out"],
            "UsageError: Missing value for argument '--out'. Expected 1 values.\n  try: regpt train --help\n",
        ),
        (
            ["train", "shakspeare-char"],
            "ConfigError: there is no preset 'shakspeare-char'. Did you mean shakespeare-char?\n  try: regpt presets\n",
        ),
        (
            ["train", "--quiet", "demo", "--train.steps", "3"],
            "UsageError: unexpected argument 'demo'; a preset stands before every option.\n"
            "  try: regpt train demo --quiet --train.steps 3\n",
        ),
        (
            ["doctor", "now"],
            "UsageError: unexpected argument 'now'.\n  try: regpt doctor --help\n",
        ),
    ],
)
def test_mistakes_give_one_message_and_exit_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", message)


def test_json_errors_are_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--json", "--model.n-lyer", "3"]) == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "ConfigError" and "n-layer" in error["message"]


def test_a_fault_of_ours_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(words: list[str]) -> int:
        raise KeyError("oops")

    monkeypatch.setattr("regpt.cli._dispatch", broken)
    assert main(["presets"]) == 1
    assert "internal error: KeyError: 'oops'" in capsys.readouterr().err
    assert main(["presets", "--debug", "--json"]) == 1
    captured = capsys.readouterr()
    assert "Traceback" in captured.err
    assert json.loads(captured.out)["error"]["message"] == "internal error: KeyError: 'oops'"


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt(), 130), (Interrupted("saved.", signum=15), 143)]
)
def test_a_stop_keeps_its_status_and_is_told_in_json(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(words: list[str]) -> int:
        raise error

    monkeypatch.setattr("regpt.cli._dispatch", stopped)
    for flags in ([], ["--debug"]):
        assert main(["train", "--json", *flags]) == status
        captured = capsys.readouterr()
        assert json.loads(captured.out)["error"]["kind"] == type(error).__name__
        assert ("Traceback" in captured.err) == bool(flags)


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--lr", "--optim.lr"),
        ("--optim.learning-rate", "--optim.lr"),
        ("--max_iters", "--train.steps"),
        ("--hepl", "--help"),
        ("--data.sourc", "--data.source"),
    ],
)
def test_the_nearest_setting_is_the_one_that_is_meant(
    option: str, meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another tool's name for it or its last word too, not by spelling alone."""
    assert main(["train", option, "1"]) == 2
    assert f"Did you mean {meant}?" in capsys.readouterr().err


@pytest.mark.parametrize("redirection", [">&-", "<&-"])
def test_closed_streams_are_no_fault_of_ours(redirection: str) -> None:
    command = f"{sys.executable} -m regpt presets --json {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_output_that_the_system_refuses_is_one_message() -> None:
    command = f"{sys.executable} -m regpt presets > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "OSError: the system refuses: output: No space left on device."


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    Output(CommonArgs(json=True)).result({"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5}, "")
    assert capsys.readouterr().out == '{"a": null, "b": [null, {"c": null}], "d": 1.5}\n'


def test_words_are_converted_only_where_the_type_has_them() -> None:
    """A prompt may be the word none or true; --model.bias and --optim.clip-norm mean the values."""
    words = (
        "--sample.prompt none --data.source=true --model.bias false --optim.clip_norm None --data.dir true"
    )
    config = parse(TrainArgs, [*words.split(), "--data.val-source=none"], prog="regpt train").config
    assert (config.sample.prompt, config.data.source, config.data.dir) == ("none", "true", "true")
    assert config.model.bias is False and config.optim.clip_norm is None and config.data.val_source is None


def test_presets_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    assert "shakespeare-char-cpu" in capsys.readouterr().out
    assert main(["presets", "shakespeare-char", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["train"]["steps"] == 5000 and "1.4697" in shown["expected"]


def test_plan_of_gpt2(capsys: pytest.CaptureFixture[str]) -> None:
    """124,439,808 parameters with biases (published), and 855 MFLOP a token at 1,024 (nanoGPT's and llm.c's count)."""
    assert main(["plan", "gpt2-124m-fineweb-edu", "--json", "--price", "2"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 124_439_808
    assert abs(plan["flops_per_token"] / 855e6 - 1) < 0.005
    assert plan["total_tokens"] == 19_073 * 524_288
    assert plan["tasks_s"] > 0  # HellaSwag every 250 steps
    assert plan["cost"] == pytest.approx((plan["time_s"] + plan["tasks_s"]) / 3600 * 2)


@pytest.mark.parametrize("context", [100_000, 1_000_000])
def test_plan_of_an_enormous_context_answers_at_once(
    context: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is timed is bounded, and longer contexts are scaled by their arithmetic: more than proportionally."""
    tokens = ["--model.block-size", str(context), "--train.batch-tokens", str(context)]
    assert main(["plan", "shakespeare-char-cpu", "--json", *tokens]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (
        plan["time_s"] > 2000 * context / 1e6
    )  # no machine that runs this has a million tokens a second here


def test_plan_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "demo", "--quiet"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["regpt"] == __version__ and facts["matmul_flops"]["float32"] > 1e8


def test_doctor_only_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is downloaded (tests/conftest.py would fail it); a folder ./wandb is no package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REGPT_GPT2_FILES", raising=False)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["gpt2_vocabulary"].startswith("not here") and "wandb" in facts["packages"]
    assert sorted(os.listdir(tmp_path)) == ["wandb"]


def test_doctor_finds_the_vocabulary_in_its_folder(
    test_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("REGPT_GPT2_FILES", str(test_data / "tokenizer"))
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpt2_vocabulary"] == "ready"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    assert "regpt completion words" in capsys.readouterr().out


def test_completion_words(capsys: pytest.CaptureFixture[str]) -> None:
    def words(*typed: str) -> list[str]:
        assert main(["completion", "words", "--", *typed]) == 0
        return capsys.readouterr().out.split()

    assert words("tr") == ["train"]
    assert words("train", "shakespeare-char-") == ["shakespeare-char-cpu"]
    assert words("train", "--model.n-l") == ["--model.n-layer"]
    assert words("bench", "tr") == ["train"]
    assert words("bench", "train", "shakespeare-char-") == ["shakespeare-char-cpu"]
    assert words("bench", "train", "--prof") == ["--profile"]
    assert words("nonsense", "x") == []


def test_completion_in_a_real_bash() -> None:
    """bash itself offers `train` for `regpt tr`."""
    code = """
eval "$(regpt completion bash)"
COMP_WORDS=(regpt tr); COMP_CWORD=1; _regpt; echo "${COMPREPLY[@]}"
"""
    bin_dir = str(Path(sys.executable).parent)
    done = subprocess.run(
        ["bash", "-c", f'PATH="{bin_dir}:$PATH"\n{code}'], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "train"


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"'{sys.executable}' -m regpt presets --json | head -c 5", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


WORK = """
import sys
from regpt import cli
from regpt.cli.parse import CommonArgs, Output

def work(words):
    out = Output(CommonArgs())
    sys.stdin.readline()  # by then the reader of our notes is gone
    for i in range(3):
        out.info("a note")
        out.warn("another")
    with out.progress("working", 3) as bar:
        bar.begun -= 10
        bar.update(3)
    out.result({}, "done")
    return 0

cli._dispatch = work
sys.exit(cli.main(["train"]))
"""


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell is needed")
@pytest.mark.parametrize("redirection", ["", "2>&-"])
def test_a_closed_standard_error_does_not_stop_the_work(redirection: str, tmp_path: Path) -> None:
    """Notes go unheard, the result is whole and the exit status 0."""
    (tmp_path / "work.py").write_text(WORK)
    with subprocess.Popen(
        ["sh", "-c", f"exec '{sys.executable}' '{tmp_path / 'work.py'}' {redirection}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stderr.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b"done\n"
    assert process.returncode == 0


class Broken(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_notes_that_nobody_reads_are_dropped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", Broken())
    assert main(["plan", "demo"]) == 0 and "parameters" in capsys.readouterr().out
    assert main(["trian"]) == 2


def test_a_broken_pipe_that_is_not_our_output_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only `| head` means that all went well."""

    def broken(words: list[str]) -> int:
        raise BrokenPipeError("a worker's pipe")

    monkeypatch.setattr("regpt.cli._dispatch", broken)
    assert main(["train", "--json"]) == 1
    captured = capsys.readouterr()
    assert "BrokenPipeError: a worker's pipe" in captured.err
    assert json.loads(captured.out)["error"]["kind"] == "BrokenPipeError"


def test_the_bar_knows_the_time_left_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps a hundred seconds apart: rich, left alone, forgets the first."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = 0.0
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Output(CommonArgs()).progress("training", 100) as bar:
        (task,) = bar.bar.tasks  # type: ignore[attr-defined]
        bar.bar.get_time = task._get_time = lambda: now  # type: ignore[attr-defined]
        task.start_time = 0.0
        for step in range(1, 5):
            now = 100.0 * step
            bar.update(step)
        assert task.time_remaining == pytest.approx(9600)
