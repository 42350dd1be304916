"""`regpt reproduce`: a preset's recipe made tiny, its table, resumed, and what it skips or refuses."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regpt.cli import main
from regpt.evals.compare import count
from regpt.train.run import OURS, JsonLines
from tiny import TINY_TEXT

TINY = (
    *(
        "--data.source",
        "text.txt",
        "--train.steps",
        "5",
        "--optim.warmup-steps",
        "0",
        "--train.device",
        "cpu",
    ),
    *(
        "--train.dtype",
        "float32",
        "--sample.tokens",
        "4",
        "--data.workers",
        "1",
        "--model.n-layer",
        "1",
        "--track.log-every",
        "1",
    ),
)
SMALL = (
    *TINY,
    "--train.batch-tokens",
    "256",
    "--model.block-size",
    "128",
    "--model.n-head",
    "2",
    "--model.n-embd",
    "16",
)
Reproduce = Callable[..., tuple[int, str, str]]


@pytest.fixture
def reproduce(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], one_thread: None
) -> Reproduce:
    """Runs `regpt reproduce …` in this process: exit status, standard output, standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(TINY_TEXT, encoding="utf-8")

    def call(*words: str) -> tuple[int, str, str]:
        status = main(["reproduce", *words])
        got = capfd.readouterr()
        return status, got.out, got.err

    return call


def figure(values: dict[str, Any], published: float) -> dict[str, Any]:
    return next(f for f in values["figures"] if f["published"] == published)


def test_the_table_beside_nanogpts_figure(reproduce: Reproduce) -> None:
    status, out, err = reproduce("shakespeare-char-cpu", *TINY, "--out", "r", "--json")
    values = json.loads(out)
    assert status == 0, err
    readme, whole = figure(values, 1.88), figure(values, 1.8983)
    assert readme["ours"] == values["loss"]["nats"] > 2 and readme["model"] == "nanoGPT shakespeare-char, CPU"
    assert readme["difference"] == pytest.approx(readme["ours"] - 1.88)
    for beside in (readme, whole):  # another text: no verdict, however much is known of seeds
        assert (beside["comparable"], beside["within_noise"], beside["interval"]) == (False, None, None)
        assert "this run's is text.txt" in beside["why"][0]
    assert "no spread over seeds is known" in readme["why"]
    fewer = f"fewer tokens: trained on {count(values['tokens'])}, theirs on 1.54 M"
    assert fewer in whole["why"] and values["tokens"] == 5 * 768
    changed = "train.steps 5 instead of 2000"
    assert any(changed in why for why in whole["why"]) and values["changed"]["train.steps"] == {
        "recipe": 2000,
        "run": 5,
    }
    assert not any(key.startswith(("train.device", "sample", "data.workers")) for key in values["changed"])
    assert json.loads(Path("r/reproduction.json").read_text()) == values
    page = Path("r/reproduction.md").read_text(encoding="utf-8")
    assert "| nanoGPT shakespeare-char, CPU: loss nats | 1.8800 |" in page and changed in page
    assert page.count("| not comparable |") == 3 and "worse" not in page
    assert {"reproduction.json", "reproduction.md"} <= OURS


def test_the_same_command_again_goes_on(reproduce: Reproduce) -> None:
    first = json.loads(reproduce("shakespeare-char-cpu", *TINY, "--out", "r", "--json")[1])
    steps = len([e for e in JsonLines(Path("r/log.jsonl")).entries() if e["event"] == "step"])
    status, out, err = reproduce("shakespeare-char-cpu", *TINY, "--out", "r", "--json")
    assert (status, json.loads(out)["figures"]) == (0, first["figures"]), (
        "a finished run is evaluated again, not trained"
    )
    assert "r is finished (step 5)" in err
    assert len([e for e in JsonLines(Path("r/log.jsonl")).entries() if e["event"] == "step"]) == steps
    longer = [*TINY, "--train.steps", "7", "--out", "r"]
    status, out, err = reproduce("shakespeare-char-cpu", *longer)
    assert status == 0 and "continuing r from step 5" in err
    assert "nanoGPT shakespeare-char, CPU: loss nats" in out and "within noise?" in out
    assert "the table lies in r/reproduction.md" in out and "eval r --which last" in out


def test_stopped_in_the_middle_it_ends_with_the_same_figures(
    reproduce: Reproduce, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regpt.train import session

    expected = json.loads(reproduce("shakespeare-char-cpu", *TINY, "--out", "whole", "--json")[1])
    train = session.train

    def stopping(*args: Any, listen: Any, **more: Any) -> Any:
        def hear(event: str, step: int, values: dict[str, Any]) -> None:
            listen(event, step, values)
            if (event, step) == ("step", 3):
                os.kill(os.getpid(), signal.SIGINT)

        return train(*args, listen=hear, **more)

    with monkeypatch.context() as patch:
        patch.setattr(session, "train", stopping)
        status, out, err = reproduce("shakespeare-char-cpu", *TINY, "--out", "r", "--quiet")
    assert (status, out) == (130, "") and "the same command continues" in err
    assert not Path("r/reproduction.json").exists()
    status, out, err = reproduce("shakespeare-char-cpu", *TINY, "--out", "r", "--json")
    assert status == 0 and "continuing r from step 3" in err
    assert json.loads(out)["figures"] == expected["figures"]


def test_tasks_without_data_are_skipped_aloud(reproduce: Reproduce, test_data: Path, tmp_path: Path) -> None:
    """The rest is printed all the same: a node without a network still gets its losses."""
    (tmp_path / "empty").mkdir()
    files = ("--tokenizer.files", str(test_data / "tokenizer"))
    status, out, err = reproduce("gpt2-124m-fineweb-edu", *SMALL, *files, "--data", "empty", "--json")
    values = json.loads(out)
    assert (
        status == 0
        and set(values["skipped"]) == {"hellaswag"}
        and "warning: hellaswag will be skipped" in err
    )
    hellaswag = figure(values, 0.294463)
    assert hellaswag["ours"] is None and hellaswag["why"][0].startswith("not evaluated: ")
    assert figure(values, 3.2924)["ours"] == values["loss"]["nats"]
    assert figure(values, 2.9478)["why"][0].startswith("unsupported: ")


def test_tasks_are_evaluated_and_judged(reproduce: Reproduce, test_data: Path) -> None:
    files = (
        "--tokenizer.files",
        str(test_data / "tokenizer"),
        "--data",
        str(test_data / "eval"),
        "--rows",
        "8",
    )
    status, out, _ = reproduce("gpt2-124m-fineweb-edu", *SMALL, *files, "--json")
    values = json.loads(out)
    assert status == 0 and values["skipped"] == {} and values["hellaswag"]["rows"] == 8
    gpt2 = figure(values, 0.294463)
    assert gpt2["ours"] == values["hellaswag"]["acc_norm_tokens"]
    low, high = gpt2["interval"]
    assert high - low > 0.4 and low < gpt2["difference"] < high
    assert gpt2["within_noise"] is (low <= 0 <= high)
    assert "other rows: 8 of them, theirs 10,042" in gpt2["why"]


def test_why_there_is_no_loss(reproduce: Reproduce, monkeypatch: pytest.MonkeyPatch) -> None:
    from regpt.cli.reproduce import no_loss
    from regpt.train import checkpoint
    from regpt.train.load import load_model

    words = ("shakespeare-char-cpu", *TINY, "--json")
    values = json.loads(reproduce(*words, "--out", "r", "--data.val-fraction", "0")[1])
    assert values["skipped"] == {"loss": "the run has no validation split"}
    assert reproduce(*words, "--out", "v")[0] == 0
    loaded = load_model("v", which="last")
    for step, said in (
        (5, "the loss at step 5 was not finite"),
        (3, "its last step, 5, was not evaluated (the loss was last taken: at step 3)"),
        (None, "its last step, 5, was not evaluated (the loss was last taken: never)"),
    ):
        state = SimpleNamespace(state={"evaluated_step": step})
        monkeypatch.setattr(checkpoint, "read_checkpoint", lambda path, verify, state=state: state)
        assert no_loss(loaded) == said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["shakespeare-chra"], "there is no preset 'shakespeare-chra'. Did you mean shakespeare-char?"),
        (["--out", "r"], "regpt reproduce asks which preset."),
        (["demo", "--tasks", "loss,hellaswga"], "there is no task 'hellaswga'. Did you mean hellaswag?"),
        (["demo", "--tasks", "lambada", "--data", "nowhere"], "nowhere"),
        (["demo", "--rows", "0", "--tasks", "piqa"], "--rows is out of range"),
        (["demo", "--train.stepz", "5"], "there is no setting --train.stepz. Did you mean --train.steps?"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    reproduce: Reproduce, words: list[str], said: str
) -> None:
    status, out, err = reproduce(*words)
    assert (status, out) == (2, "") and said in err
    assert not Path("runs").exists() and not Path("r").exists()
