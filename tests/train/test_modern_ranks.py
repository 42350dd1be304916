"""What the loop promises holds for the modern model and Muon: stopped and continued, on several ranks, in shards."""

from __future__ import annotations

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pytest
from rank_child import said, train
from test_ranks import curve, tensors, with_train

from regpt.config import Config, ModernConfig, OptimConfig, SampleConfig, SaveConfig
from regpt.errors import CheckpointError
from regpt.models.loss import CHUNKED_FROM
from regpt.train import session
from regpt.train.load import load_model

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")


@pytest.fixture
def config(tiny_run: Config, one_thread: None) -> Config:
    """Every technique on, 8 rows in micro-batches of 2, dropout; three layers, so that shares and shards are uneven."""
    config = with_train(tiny_run, steps=8, micro_rows=2, threads=1)
    model = dataclasses.replace(
        config.model,
        arch="modern",
        n_layer=3,
        modern=ModernConfig(bigram=True, trigram=64, window=8),
    )
    optim = OptimConfig(
        name="muon",
        lr=1e-2,
        min_lr=1e-3,
        muon_momentum_steps=5,
        cautious_decay=True,
        warmup_steps=0,
        schedule="linear",
        clip_norm=None,
    )
    return dataclasses.replace(
        config, model=model, optim=optim, save=SaveConfig(keep=3), sample=SampleConfig(tokens=2)
    )


def test_it_learns_and_loads(config: Config) -> None:
    done = session.train(config, "run")
    first, *_, last = (float.fromhex(loss) for _, loss in curve("run"))
    assert first == pytest.approx(5.549, abs=0.01)  # ln 257
    assert last == done.val_loss and last < 4.0
    assert type(load_model("run").model).__name__ == "Modern"


@pytest.mark.parametrize("orthogonalize", ["newton_schulz", "polar_express"])
def test_stopped_and_continued_it_ends_with_the_same_bits(config: Config, orthogonalize: str) -> None:
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, orthogonalize=orthogonalize))
    session.train(config, "whole")
    assert train(1, config, "run", (0, 5, "SIGTERM")) == [143], said("run", 0)
    session.train(config, "run")
    assert (curve("run"), tensors("run")) == (curve("whole"), tensors("whole"))


def test_exact_reduction_is_the_same_to_the_bit_on_1_and_2_ranks(config: Config) -> None:
    """Losses, weights, moments and momentum, though each rank orthogonalises its share of the matrices only."""
    config = with_train(config, reduction="exact")
    session.train(config, "one")
    assert train(2, config, "two") == [0, 0], said("two", 0)
    assert (curve("two"), tensors("two")) == (curve("one"), tensors("one"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_follow_one_and_continue_to_the_same_bits(config: Config, strategy: str) -> None:
    """Equal losses but for rounding; a stop on the way changes nothing."""
    session.train(config, "one")
    config = with_train(config, strategy=strategy)
    assert train(2, config, "many") == [0, 0], said("many", 0)
    one, many = ([float.fromhex(x) for _, x in curve(out)] for out in ("one", "many"))
    assert many == pytest.approx(one, rel=2e-4)
    assert train(2, config, "run", (1, 5, "SIGTERM")) == [143, 143], said("run", 0) + said("run", 1)
    assert train(2, config, "run") == [0, 0], said("run", 0)
    assert (curve("run"), tensors("run")) == (curve("many"), tensors("many"))


@pytest.mark.parametrize("arch", ["modern", "gpt2"])
def test_the_loss_by_chunks_works_in_shards(config: Config, arch: Any) -> None:
    """A vocabulary that is large enough for it: the head's matrix is gathered for the loss too."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(3000)]
    Path("words.txt").write_text(" ".join(rng.choices(words, k=12_000)))
    config = dataclasses.replace(
        with_train(config, steps=3),
        data=dataclasses.replace(config.data, source="words.txt"),
        tokenizer=dataclasses.replace(config.tokenizer, name="bpe", vocab_size=CHUNKED_FROM),
        model=dataclasses.replace(config.model, arch=arch, modern=ModernConfig()),
        optim=OptimConfig(name="muon" if arch == "modern" else "adamw", warmup_steps=0),
    )
    session.train(config, "one")
    assert train(2, with_train(config, strategy="fsdp"), "many") == [0, 0], said("many", 0)
    one, many = ([float.fromhex(x) for _, x in curve(out)] for out in ("one", "many"))
    assert many == pytest.approx(one, rel=2e-4)


def test_a_run_does_not_change_its_optimizer(config: Config) -> None:
    session.train(config, "run")
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, name="adamw"))
    with pytest.raises(CheckpointError, match=r"optim\.name was 'muon', now 'adamw'"):
        session.train(other, "run")
