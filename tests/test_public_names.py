"""`import regpt`: what it offers, and that it costs nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import regpt
import regpt.config


def test_every_public_name_is_there() -> None:
    assert sorted(regpt.__all__) == dir(regpt)
    for name in regpt.__all__:
        assert getattr(regpt, name) is not None
    with pytest.raises(AttributeError, match="module 'regpt' has no attribute 'nope'"):
        _ = regpt.nope


def test_importing_costs_nothing() -> None:
    code = "import sys, regpt; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_the_readmes_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train, load and generate from Python, in a few lines."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be, " * 200)
    config = regpt.Config(
        data=regpt.config.DataConfig(source="text.txt", val_fraction=0.1),
        tokenizer=regpt.config.TokenizerConfig(name="chars"),
        model=regpt.ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=16),
        train=regpt.config.TrainConfig(steps=3, batch_tokens=64, device="cpu"),
        optim=regpt.config.OptimConfig(warmup_steps=1),
    )
    result = regpt.train_model(config, "run")
    loaded = regpt.load(result.run)
    assert loaded.step == 3
    texts = regpt.generate(loaded, "to be", max_new_tokens=4, seed=1, n=2)
    assert len(texts) == 2 and all(len(c.tokens) == 4 or c.finish_reason == "stop" for c in texts)
