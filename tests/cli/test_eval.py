"""`regpt eval` on a run: figures as the library's, JSON, splits of any kind, refusals."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from regpt.cli import main
from regpt.config import Config
from regpt.evals.loss import TextSplit, split_loss
from regpt.evals.tasks import open_task
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train import session
from regpt.train.load import load_model
from regpt.train.run import JsonLines

pytestmark = pytest.mark.usefixtures("one_thread")

ROW = {"ctx": "Ducks went", "activity_label": "Out", "endings": ["far.", "home."], "label": 0}


@pytest.fixture(autouse=True)
def one_thread_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def run(tiny_run: Config, tmp_path: Path) -> Path:
    """Trained for twelve steps, in the current folder."""
    session.train(tiny_run, "run")
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(ROW) + "\n")
    return Path("run")


def answer(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> dict[str, Any]:
    """What `regpt eval … --json` prints."""
    capsys.readouterr()
    assert main(["eval", *words, "--json", "--quiet"]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_loss_is_that_of_training(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To the bit where batches are alike; nearly in others, by strides, on shards and text named by hand."""
    [*_, logged] = [e for e in JsonLines(run / "log.jsonl").entries() if e["event"] == "eval"]
    found = answer(capsys, "run", "--which", "last")
    assert (found["run"], found["step"]) == ("run", 12)
    loss = found["loss"]
    assert loss["nats"] == pytest.approx(logged["val_loss"], rel=1e-6)
    assert loss["bits_per_byte"] == pytest.approx(logged["val_bits_per_byte"], rel=1e-6)
    assert (loss["tokens"], loss["split"], loss["context"], loss["stride"]) == (
        logged["val_tokens"],
        "val",
        32,
        32,
    )
    [shards] = Path("data").iterdir()
    for words in (["--split", str(shards)], ["--split", f"{shards}:val"], ["--batch-tokens", "32"]):
        again = answer(capsys, "run", "--which", "last", *words)["loss"]
        assert again["nats"] == pytest.approx(loss["nats"], rel=1e-6)
    train = answer(capsys, "run", "--split", f"{shards}:train")["loss"]
    assert train["split"] == "train" and train["tokens"] > loss["tokens"]
    model = load_model(run, which="last").model
    for words, context, stride in ((["--stride", "8"], 32, 8), (["--context", "16"], 16, 16)):
        Path("some.txt").write_text("little ducks\n" * 20)
        expected = split_loss(
            model, TextSplit(Path("some.txt"), ByteTokenizer()), rows=3, context=context, stride=stride
        )
        strided = answer(capsys, "run", "--which", "last", "--split", "some.txt", *words)["loss"]
        assert strided["nats"] == pytest.approx(expected.nats, rel=1e-6)
        assert strided["tokens"] == 13 * 20 and strided["split"] == "some.txt"


def test_tasks_are_those_of_the_library(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    loaded = load_model(run)
    expected = open_task("hellaswag", tmp_path / "hellaswag.jsonl").evaluate(loaded.model, loaded.tokenizer)
    found = answer(capsys, "run", "--tasks", "loss,hellaswag", "--data", ".", "--out", "figures.json")
    assert {k: v for k, v in found["hellaswag"].items() if k != "seconds"} == {
        k: v for k, v in expected.as_dict().items() if k != "seconds"
    }
    assert found["hellaswag"]["rows"] == 1 and set(found) == {
        "run",
        "checkpoint",
        "step",
        "loss",
        "hellaswag",
        "published",
    }
    assert json.loads(Path("figures.json").read_text()) == found


def test_the_table_shows_every_figure(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "hellaswag.jsonl").write_text(3 * (json.dumps(ROW) + "\n"))
    capsys.readouterr()
    words = ["--tasks", "hellaswag", "--data", "hellaswag.jsonl", "--published", "none"]
    assert main(["eval", "run", *words]) == 0
    shown = capsys.readouterr()
    lines = shown.out.splitlines()
    assert lines[0].split() == ["this", "run", "95", "%"]
    figures = ["acc", "acc_norm", "acc_bytes", "acc_norm_tokens"]
    assert [line.split()[:2] for line in lines[1:5]] == [["hellaswag", name] for name in figures]
    assert all(" ± 0.0000  [" in line for line in lines[1:5])
    assert lines[5].startswith("hellaswag: 3 rows, in ") and len(lines) == 6, "each figure stands there once"
    assert main(["eval", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["loss", name] for name in ("nats", "perplexity", "bits_per_byte")
    ]
    assert lines[4].startswith("loss: ") and " tokens, windows of " in lines[4] and len(lines) == 5
    assert "of run, cpu float32" in shown.err


def test_two_processes_give_the_figures_of_one(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [
        "eval",
        "run",
        "--tasks",
        "loss,hellaswag",
        "--data",
        ".",
        "--batch-tokens",
        "64",
        "--json",
        "--quiet",
    ]
    found = []
    for more in ([], ["--nproc", "2"]):
        capfd.readouterr()
        assert main([*words, *more]) == 0
        values = json.loads(capfd.readouterr().out)
        found.append(
            {
                k: {n: x for n, x in v.items() if n != "seconds"}
                for k, v in values.items()
                if isinstance(v, dict)
            }
        )
    assert found[0] == found[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "hellaswg"], "ConfigError: there is no task 'hellaswg'. Did you mean hellaswag?\n"
                                  "  expected: loss, wikitext, lambada, hellaswag, arc_easy, piqa"),
        (["--tasks", ","], "ConfigError: --tasks names none."),
        (["--rows", "0"], "ConfigError: --rows is out of range.\n  got: 0\n  expected: 1 or more"),
        (["--batch-tokens", "-1"], "ConfigError: --batch-tokens is out of range."),
        (["--out", "nix/x.json"], "ConfigError: --out nix/x.json: there is no folder "),
        (["--out", "."], "ConfigError: --out . is a folder."),
        (["--context", "33"], "ConfigError: --context 33 does not fit the model: its positions are learned"),
        (["--stride", "33"], "ConfigError: --stride 33 is out of range.\n  expected: 1 to the context, 32"),
        (["--split", "nix"], "DataError: --split nix is nothing that can be evaluated.\n  expected: a shard directory"),
        (["--split", "empty.txt"], "DataError: empty.txt is empty.\n  got: skipped: 1 empty\n  expected: text"),
        (["--split", "text.txt:nonsense"], "DataError: --split text.txt:nonsense: a text file has no splits.\n"
                                           "  got: nonsense\n  try: --split text.txt: all of it"),
        (["--tasks", "lambada", "--data", "nix"], "DataError: there is no file or folder nix with the rows of lambada."),
        (["--tasks", "lambada", "--data", "hellaswag.jsonl"], "DataError: hellaswag.jsonl, line 1 has no field 'text'."),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said_first(
    words: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text("")
    capsys.readouterr()
    assert main(["eval", "run", *words]) == 2
    assert capsys.readouterr().err.startswith(message)


def test_a_run_without_checkpoints_text_or_validation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(*words: str) -> str:
        capsys.readouterr()
        assert main(["eval", *words]) == 2
        return capsys.readouterr().err

    assert complaint("nix").startswith("CheckpointError: there is no run or checkpoint nix.")
    shutil.move("data", "elsewhere")
    assert complaint("run").startswith(
        "DataError: the tokens that run was trained on are not here.\n  expected: shards of text.txt, made as"
    )
    [shards] = Path("elsewhere").iterdir()
    other = Path("other")
    assert main(["prepare", "text.txt", "--out", "other", "--tokenizer", "chars", "--quiet"]) == 0
    assert complaint("run", "--split", str(other)).startswith(
        "DataError: other was written with another tokenizer than the model's.\n  got: chars ("
    )
    assert (
        main(
            [
                "prepare",
                "text.txt",
                "--out",
                "whole",
                "--tokenizer",
                "bytes",
                "--val-fraction",
                "0",
                "--quiet",
            ]
        )
        == 0
    )
    assert "whole has no split 'val'" in complaint("run", "--split", "whole")
    assert shards.exists()
    shutil.rmtree("run/checkpoints")
    assert "its checkpoints were deleted" in complaint("run")


def test_characters_that_the_model_has_never_seen(
    tiny_run: Config, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Before anything is computed, the loss included."""
    config = dataclasses.replace(tiny_run, tokenizer=dataclasses.replace(tiny_run.tokenizer, name="chars"))
    session.train(config, "run")
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps({**ROW, "ctx": "Zürich"}) + "\n")
    capsys.readouterr()
    assert main(["eval", "run", "--tasks", "loss,hellaswag", "--data", "."]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(
        "DataError: hellaswag, row 1: the model's tokenizer cannot write this text: the character 'O' (U+004F)"
    )
    assert "try: a model whose tokenizer knows every byte: gpt2, bpe or bytes" in shown.err and not shown.out


def test_a_choice_that_does_not_fit_is_told_before_the_loss_is_computed(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regpt.evals import loss

    long = json.dumps({**ROW, "endings": ["far.", "over the hills and far away, one by one"]})
    Path("hellaswag.jsonl").write_text(json.dumps(ROW) + "\n" + long + "\n")
    monkeypatch.setattr(loss, "split_loss", lambda *a, **k: pytest.fail("computed in vain"))
    capsys.readouterr()
    assert main(["eval", "run", "--tasks", "loss,hellaswag", "--data", "."]) == 2
    assert capsys.readouterr().err.startswith(
        "DataError: hellaswag, row 2: continuation 2 is longer than the model's context.\n"
        "  got: 40 tokens\n  expected: at most 32"
    )


def test_figures_are_shown_even_where_they_cannot_be_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regpt.tokenizers import files

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        assert main(["eval", "run", "--json", "--out", "figures.json"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["loss"]["nats"] > 0
    assert "warning: cannot write figures.json: No space left on device" in shown.err
    assert not list(Path().glob("*figures.json*"))


def test_float32_is_float32_on_a_gpu_too(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not TF32, which training takes. Only what is asked of PyTorch is seen here: there need be no GPU."""
    import torch

    from regpt.train import machine

    gpu = dataclasses.replace(machine.probe("cpu"), device="cuda:0")
    for exact, expected in ((False, "high"), (True, "highest")):
        with machine.using(gpu, exact=exact):
            assert torch.get_float32_matmul_precision() == expected
    asked = []
    using = machine.using

    def spied(of: machine.Machine, *, exact: bool = False) -> Any:
        asked.append(exact)
        return using(of, exact=exact)

    monkeypatch.setattr(machine, "using", spied)
    answer(capsys, "run")
    assert asked == [True]


def test_bfloat16_is_near(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exact = answer(capsys, "run")["loss"]["nats"]
    near = answer(capsys, "run", "--dtype", "bfloat16")["loss"]["nats"]
    assert near != exact and near == pytest.approx(exact, rel=1e-2)
