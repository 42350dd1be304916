"""A trained model out of a run: the right checkpoint, the same logits, and words for whatever is missing."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

from regpt.config import ModelConfig, to_dict
from regpt.errors import CheckpointError, ConfigError, DataError
from regpt.models.gpt2 import GPT2
from regpt.tokenizers.bytes import ByteTokenizer
from regpt.train import checkpoint
from regpt.train.checkpoint import save_checkpoint
from regpt.train.load import load_model
from regpt.train.named import model_tensors
from regpt.train.run import RunDirectory

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, dropout=0.5)
VOCAB = 257


def built(step: int) -> GPT2:
    torch.manual_seed(step)
    return GPT2(SHAPE, VOCAB)


def save(run: RunDirectory, step: int, best: tuple[int, float] | None, **other: Any) -> Path:
    state = {
        "model_config": to_dict(SHAPE),
        "vocab_size": VOCAB,
        "tokenizer_fingerprint": ByteTokenizer().fingerprint,
        "best_step": best[0] if best else None,
        "best_val_loss": best[1] if best else None,
        "val_loss": best[1] if best and best[0] == step else 3.0 + step / 100,
        "evaluated_step": step,
    }
    model, optimizer = model_tensors(built(step)), {"wte.weight.exp_avg": torch.ones(3)}
    return save_checkpoint(run.checkpoints, step=step, model=model, optimizer=optimizer, state=state | other)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """Steps 10, 20 and 30, of which 20 is the best."""
    with RunDirectory.open(tmp_path / "runs" / "my run") as run:
        run.begin(config={}, plan={}, facts={}, machine={})
        ByteTokenizer().save(run.tokenizer)
        save(run, 10, (10, 3.1))
        save(run, 20, (20, 2.5))
        save(run, 30, (20, 2.5))
    return run


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def silent(text: str) -> None:
    raise AssertionError(text)


def test_the_best_or_the_last_is_loaded_as_it_was(run: RunDirectory) -> None:
    ids = torch.randint(0, VOCAB, (2, 8))
    best = load_model(run.path, say=silent)
    last = load_model(str(run.path), which="last", say=silent)
    one = load_model(run.checkpoints / "step-000010", say=silent)
    assert (best.step, best.val_loss, best.path.name) == (20, 2.5, "step-000020")
    assert (last.step, last.val_loss) == (30, 3.3)
    assert (one.step, one.val_loss) == (10, 3.1)
    for loaded in (best, last, one):
        assert loaded.config == SHAPE and loaded.tokenizer.kind == "bytes" and not loaded.model.training
        assert torch.equal(loaded.model(ids), built(loaded.step).eval()(ids))
        assert torch.equal(loaded.model.wte.weight, built(loaded.step).wte.weight)  # padding rows too


def test_loading_changes_nothing_on_disk(run: RunDirectory) -> None:
    """`regpt sample` may look into a run while it trains."""
    (run.checkpoints / ".tmp-step-000040-1").mkdir()
    damage(run.checkpoints / "step-000030" / "model.safetensors")
    before = sorted(str(p) for p in run.path.rglob("*"))
    with RunDirectory.open(run.path):
        assert load_model(run.path, which="last", say=lambda _: None).step == 20
    assert sorted(str(p) for p in run.path.rglob("*")) == before


def test_without_an_evaluation_the_best_is_the_last(run: RunDirectory) -> None:
    save(run, 40, None)
    assert load_model(run.path, say=silent).step == 40


def test_the_loss_of_another_step_is_not_reported(run: RunDirectory) -> None:
    """Between evaluations val_loss in the state is an older step's; a loss that was not finite is None."""
    save(run, 40, (20, 2.5), evaluated_step=30)
    assert load_model(run.path, which="last", say=silent).val_loss is None
    save(run, 50, (20, 2.5), val_loss=None)
    assert load_model(run.path, which="last", say=silent).val_loss is None
    assert load_model(run.path, say=silent).val_loss == 2.5


def test_a_relative_path_works(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.checkpoints / "step-000010")
    assert load_model(".", say=silent).step == 10
    monkeypatch.chdir(run.checkpoints)
    assert load_model("step-000020", say=silent).step == 20


def test_a_damaged_best_is_said_and_the_newest_is_loaded(run: RunDirectory) -> None:
    damage(run.checkpoints / "step-000020" / "model.safetensors")
    said: list[str] = []
    assert load_model(run.path, say=said.append).step == 30
    assert "step-000020/model.safetensors has changed" in said[0] and "newest one is loaded" in said[0]
    with pytest.warns(UserWarning, match="newest one is loaded"):
        load_model(run.path)


def test_a_damaged_newest_is_said_and_the_one_before_is_loaded(run: RunDirectory) -> None:
    (run.checkpoints / "step-000030" / "state.json").unlink()
    said: list[str] = []
    assert load_model(run.path, which="last", say=said.append).step == 20
    assert len(said) == 1 and "state.json is missing" in said[0]


def test_damage_to_the_optimizer_does_not_matter_here(run: RunDirectory) -> None:
    damage(run.checkpoints / "step-000020" / "optimizer.safetensors")
    assert load_model(run.path, say=silent).step == 20


def test_all_damaged_is_an_error(run: RunDirectory) -> None:
    for path in run.checkpoints.iterdir():
        damage(path / "model.safetensors")
    with pytest.raises(CheckpointError, match="none is valid"):
        load_model(run.path, say=lambda _: None)
    with pytest.raises(CheckpointError, match=r"model.safetensors has changed"):
        load_model(run.checkpoints / "step-000010")


def test_a_misspelt_run_names_the_nearest(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="there is no run or checkpoint") as caught:
        load_model(run.path.with_name("my rum"))
    assert f"try: {run.path}" in str(caught.value)
    monkeypatch.chdir(run.path.parent.parent)
    with pytest.raises(CheckpointError) as caught:
        load_model("my-run")
    assert f"try: {Path('runs', 'my run')}" in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        load_model("something else entirely")
    assert "try:" not in str(caught.value)


def test_what_is_no_run_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(
            CheckpointError, match=r"neither a run nor a checkpoint.\n  expected: run.json or"
        ):
            load_model(path)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "young") as run:
        run.begin(config={})
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        load_model(run.path)


def test_a_run_without_its_tokenizer(run: RunDirectory) -> None:
    for file in run.tokenizer.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="tokenizer"):
        load_model(run.path)


@pytest.mark.parametrize(
    ("other", "kind", "says"),
    [
        ({"tokenizer_fingerprint": "0" * 64}, CheckpointError, "trained with another tokenizer"),
        ({"tokenizer_fingerprint": None}, CheckpointError, "has no usable tokenizer_fingerprint"),
        ({"vocab_size": "257"}, CheckpointError, "has no usable vocab_size"),
        ({"vocab_size": 50257}, CheckpointError, "does not hold the model that it describes"),
        ({"model_config": []}, CheckpointError, "has no usable model_config"),
        ({"model_config": {"n_layr": 2}}, ConfigError, "there is no setting model.n_layr"),
        (
            {"model_config": to_dict(dataclasses.replace(SHAPE, n_layer=10**9))},
            CheckpointError,
            "got: .* weights",
        ),
        (
            {"model_config": to_dict(dataclasses.replace(SHAPE, n_embd=10**9))},
            CheckpointError,
            "got: .* weights",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused(
    run: RunDirectory, other: dict[str, Any], kind: type[Exception], says: str
) -> None:
    save(run, 40, (40, 1.0), **other)
    with pytest.raises(kind, match=says):
        load_model(run.path, say=silent)


def test_tensors_of_other_names_are_refused(run: RunDirectory) -> None:
    path = run.checkpoints / "step-000020"
    tensors = checkpoint.read_checkpoint(path).model_tensors()
    tensors["transformer.wte.weight"] = tensors.pop("wte.weight")
    data = b"".join(bytes(piece) for piece in checkpoint._safetensors(tensors))
    (path / "model.safetensors").write_bytes(data)
    _, files = checkpoint._read_manifest(path)
    files["model.safetensors"] = (len(data), xxhash.xxh3_128_hexdigest(data))
    (path / "manifest.json").write_bytes(checkpoint._manifest_bytes(20, files))
    with pytest.raises(CheckpointError, match=r"missing wte.weight; unknown transformer.wte.weight"):
        load_model(run.path, say=silent)


def test_a_half_deleted_run_still_loads(run: RunDirectory) -> None:
    os.unlink(run.record)
    assert json.loads((run.checkpoints / "step-000020" / "state.json").read_text())["step"] == 20
    assert load_model(run.path, say=silent).step == 20
