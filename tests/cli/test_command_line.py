"""The command line as a user meets it: help, typos, types, exit statuses, streams."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from regpt import __version__
from regpt.cli import COMMANDS, main


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
    with pytest.raises(KeyError):
        main(["presets", "--debug"])


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
    assert plan["cost"] == pytest.approx(plan["time_s"] / 3600 * 2)


def test_plan_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "demo", "--quiet"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["regpt"] == __version__ and facts["matmul_flops"]["float32"] > 1e8


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
