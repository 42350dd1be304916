"""Several processes: the same run on any number of them, and what happens when one is stopped, fails or dies."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_child import said, start, statuses, train

from regpt.config import (
    Config,
    SampleConfig,
    SaveConfig,
)
from regpt.data.loader import eval_batches
from regpt.errors import ConfigError
from regpt.models import IGNORE
from regpt.train import session
from regpt.train.loop import MAX_BAD
from regpt.train.machine import probe
from regpt.train.parallel import TreeSum
from regpt.train.plan import make_plan

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")


@pytest.fixture
def config(tiny_run: Config, one_thread: None) -> Config:
    """8 rows in micro-batches of 2."""
    config = with_train(tiny_run, steps=8, micro_rows=2, threads=1)
    return dataclasses.replace(config, save=SaveConfig(keep=3), sample=SampleConfig(tokens=2))


def with_train(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def log(out: str | Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def curve(out: str | Path) -> list[tuple[int, str]]:
    """Every training and validation loss, to the bit."""
    steps = [(e["step"], e["loss_hex"]) for e in log(out, "step")]
    return steps + [(e["step"], e["val_loss_hex"]) for e in log(out, "eval")]


def tensors(out: str | Path, step: int = 8) -> tuple[bytes, bytes]:
    folder = Path(out) / f"checkpoints/step-{step:06d}"
    return tuple((folder / f"{n}.safetensors").read_bytes() for n in ("model", "optimizer"))  # type: ignore[return-value]


def test_exact_reduction_is_the_same_to_the_bit_on_1_2_and_4_ranks(config: Config) -> None:
    """Dropout on. Losses, weights and moments."""
    config = with_train(config, reduction="exact")
    session.train(config, "one")
    for world in (2, 4):
        assert train(world, config, f"w{world}") == [0] * world, said(f"w{world}", 0)
        assert curve(f"w{world}") == curve("one")
        assert tensors(f"w{world}") == tensors("one")


@pytest.mark.parametrize(
    ("strategy", "group", "world"),
    [("ddp", None, 2), ("fsdp", None, 2), pytest.param("fsdp", 2, 4, marks=pytest.mark.slow)],
)
def test_ranks_follow_one_process(config: Config, strategy: str, group: int | None, world: int) -> None:
    """PyTorch's DDP and FSDP2 (hybrid where there are groups): equal losses but for rounding, dropout on."""
    session.train(config, "one")
    assert train(world, with_train(config, strategy=strategy, shard_group=group), "many") == [0] * world, (
        said("many", 0)
    )
    one, many = ([float.fromhex(x) for _, x in curve(out)] for out in ("one", "many"))
    assert many == pytest.approx(one, rel=2e-5)
    assert log("many", "eval")[-1]["val_tokens"] == log("one", "eval")[-1]["val_tokens"]


@pytest.mark.parametrize(
    ("strategy", "where"), [("ddp", "evaluation"), ("fsdp", "evaluation"), ("fsdp", "sample")]
)
def test_a_stop_in_an_evaluation_begins_the_next_sitting_with_it(
    config: Config, strategy: str, where: str
) -> None:
    """Shards are then gathered for the first time without gradients, and trained on afterwards."""
    config = with_train(config, strategy=strategy)
    assert train(2, config, "whole") == [0, 0]
    assert train(2, config, "run", (0, 4, f"SIGTERM in {where}")) == [143, 143], said("run", 0)
    assert train(2, config, "run") == [0, 0], said("run", 0)
    assert (curve("run"), tensors("run")) == (curve("whole"), tensors("whole"))


def test_ranks_with_other_settings_are_refused(config: Config) -> None:
    """Each would wait for the other for ever."""
    processes = start(2, config, "run", others={1: with_train(config, micro_rows=4)})
    assert statuses(processes) == [2, 2]
    assert "rank 1 plans another run than rank 0; different: micro_rows, n_micro" in said("run", 1)


def test_rolling_back_again_and_again_ends(config: Config) -> None:
    """A fault that comes back with every row is no fault of the rows."""
    config = with_train(config, on_bad_step="rollback")
    assert train(1, config, "run", (0, 6, "always nan loss")) == [3], said("run", 0)
    assert "the loss at step 6 is nan" in said("run", 0)
    assert len([e for e in log("run", "note") if "on_bad_step=rollback" in e["text"]]) == MAX_BAD


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_resumes(config: Config, strategy: str) -> None:
    """Bitwise as without the stop; the checkpoint was written by shards put together and read into them again."""
    config = with_train(config, strategy=strategy)
    assert train(2, config, "whole") == [0, 0]
    assert train(2, config, "run", (1, 5, "SIGTERM")) == [143, 143], said("run", 0) + said("run", 1)
    assert "Interrupted: stopped by SIGTERM after step 5" in said("run", 0)
    assert said("run", 1).strip().startswith("stopping once") and len(said("run", 1).splitlines()) == 2
    assert train(2, config, "run") == [0, 0]
    assert (curve("run"), tensors("run")) == (curve("whole"), tensors("whole"))


def test_the_number_of_ranks_may_change_between_stops(config: Config) -> None:
    config = with_train(config, reduction="exact")
    session.train(config, "one")
    for world, stop in ((2, 2), (1, 3), (4, 6)):
        assert train(world, config, "run", (world - 1, stop, "SIGUSR1")) == [128 + signal.SIGUSR1] * world
    assert train(2, config, "run") == [0, 0]
    assert (curve("run"), tensors("run")) == (curve("one"), tensors("one"))


def test_a_run_of_shards_goes_on_in_one_process(config: Config) -> None:
    """Checkpoints hold whole tensors: any strategy continues any other's."""
    assert train(2, with_train(config, strategy="fsdp"), "run", (0, 4, "SIGTERM")) == [143, 143]
    session.train(config, "run")
    session.train(config, "one")
    assert [float.fromhex(x) for _, x in curve("run")] == pytest.approx(
        [float.fromhex(x) for _, x in curve("one")], rel=2e-5
    )


def test_a_killed_rank_ends_the_others_and_the_run_goes_on(config: Config) -> None:
    config = with_train(config, reduction="exact")
    session.train(config, "one")
    ended = train(2, config, "run", (1, 6, "SIGKILL"))
    assert ended == [4, -signal.SIGKILL], said("run", 0)
    assert "PeerFailed: rank 0 of 2, step 6: a peer was lost" in said("run", 0)
    assert train(2, config, "run") == [0, 0]
    assert (curve("run"), tensors("run")) == (curve("one"), tensors("one"))


@pytest.mark.slow
def test_frozen_with_the_store_rank_0_is_missed_too(config: Config) -> None:
    """Without torchrun the store lives in rank 0's process: whoever asks it waits, so another thread looks at the clock."""
    processes = start(2, config, "run", (0, 5, "SIGSTOP"))
    processes[1].join(60)
    os.kill(processes[0].pid, signal.SIGCONT)
    assert statuses(processes)[1] == 4
    assert "the rendezvous store has been silent for 20 s" in said("run", 1) and "train_step" in said(
        "run", 1
    )


@pytest.mark.slow
def test_a_frozen_rank_is_named_within_half_a_minute(config: Config) -> None:
    """SIGSTOP: the process is there and answers nothing, torchrun's request to end neither. So it is killed."""
    assert train(2, config, "run", (1, 5, "SIGSTOP")) == [4, -signal.SIGKILL]
    # What it last said it was at: up to a second old, in which a model this small makes several steps.
    assert re.search(r"rank 1 \(last known: (starting|step \d)\) has been silent for 20 s", said("run", 0))
    assert "train_step" in said("run", 0)  # the stack


@pytest.mark.parametrize("what", ["nan loss", "inf gradient", "nan weight"])
@pytest.mark.parametrize("reduction", ["fast", "exact"])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_before_the_update(
    config: Config, what: str, reduction: str
) -> None:
    config = with_train(config, reduction=reduction)
    assert train(2, config, "run", (1, 5, what)) == [3, 3], said("run", 0) + said("run", 1)
    assert "TrainingDiverged" in said("run", 0) and "at step 5" in said("run", 0) and said("run", 1) == ""
    assert [e["step"] for e in log("run", "step")] == [1, 2, 3, 4, 5]
    assert not (Path("run") / "checkpoints/step-000006").exists()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_policies_are_the_same_on_all_ranks(config: Config, policy: str) -> None:
    """One rank's bad loss: two ranks end where one process with the same bad batch ends."""
    config = with_train(config, reduction="exact", on_bad_step=policy)
    assert train(2, config, "two", (1, 5, "nan loss")) == [0, 0], said("two", 0)
    assert train(1, config, "one", (0, 5, "nan loss")) == [0]
    assert (curve("two"), tensors("two")) == (curve("one"), tensors("one"))
    notes = [e["text"] for e in log("two", "note")]
    assert any(f"train.on_bad_step={policy}" in text for text in notes)
    steps = [e["step"] for e in log("two", "step")]
    assert steps == ([1, 2, 3, 4, 5, 7, 8] if policy == "skip" else [1, 2, 3, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("policy", ["stop", "rollback"])
def test_weights_that_are_not_finite_are_not_saved(config: Config, policy: str) -> None:
    """An update may spoil what a finite gradient does not show; the last checkpoint stays good, and the run goes on."""
    config = with_train(config, reduction="exact", on_bad_step=policy)
    config = dataclasses.replace(config, save=SaveConfig(every=2))
    ended = train(2, config, "run", (1, 5, "nan weight after the update"))
    note = said("run", 0)
    if policy == "stop":
        assert ended == [3, 3] and "weights are not finite at step 6; they were not saved" in note
        assert "the last checkpoint is of step 4" in note and not Path("run/checkpoints/step-000006").exists()
        assert train(2, config, "run") == [0, 0]
        session.train(config, "one")
        assert (curve("run"), tensors("run")) == (curve("one"), tensors("one"))
    else:
        assert ended == [0, 0], note
        assert any("Back to step 4" in e["text"] for e in log("run", "note"))


def test_a_peer_that_ends_alone_is_missed(config: Config) -> None:
    """What only one rank meets, at its very end, and others wait for it: no raw error, no fault of ours."""
    assert train(2, config, "run", (0, 0, "no space for the end of the log")) == [2, 4], said("run", 1)
    assert "the end of" in said("run", 0) and "PeerFailed" in said("run", 1)


def test_a_full_disk_is_said_once(config: Config) -> None:
    """Of the save that must not fail."""
    assert train(2, config, "run", (0, 8, "no space")) == [2, 2]
    assert "No space left" in said("run", 0) and said("run", 1) == ""


def test_a_mistake_is_said_once(config: Config) -> None:
    """By the first rank that meets it; all end with its status."""
    assert train(2, with_train(config, batch_tokens=96), "run") == [2, 2]
    assert said("run", 0).count("ConfigError") == 1 and "2 ranks x 2 rows x 32 tokens" in said("run", 0)
    assert said("run", 1) == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp", "reduction": "exact"}, "train.reduction=exact needs train.strategy=ddp"),
        ({"reduction": "exact", "micro_rows": None}, "needs train.micro_rows"),
        ({"shard_group": 2}, "train.shard_group=2 shards nothing with train.strategy=ddp"),
        ({"strategy": "fsdp", "shard_group": 3}, "train.shard_group=3 does not divide 4 ranks"),
        (
            {"reduction": "exact", "batch_tokens": 4 * 3 * 64},
            "a power of two of micro-batches a rank; here are 3",
        ),
    ],
)
def test_what_ranks_cannot_do_is_refused(config: Config, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(with_train(config, **changes), probe("cpu"), vocab_size=257, world=4)


@pytest.mark.parametrize("leaves", [1, 2, 3, 4, 6, 7, 8, 12, 16])
def test_a_tree_of_blocks_is_the_tree_of_the_whole(leaves: int) -> None:
    """For every division of the leaves into blocks of a power of two, to the bit; a plain sum in order differs."""
    torch.manual_seed(leaves)
    values = [torch.randn(1000) * 10 ** torch.randn(1000) for _ in range(leaves)]

    def summed(parts: list[torch.Tensor]) -> torch.Tensor:
        tree = TreeSum()
        for part in parts:
            tree.add([part.clone()])
        return tree.result()[0]

    whole = summed(values)
    assert torch.allclose(whole.double(), torch.stack(values).double().sum(0), rtol=1e-3, atol=1e-3)
    for block in (2, 4, 8):
        if leaves % block == 0:
            blocks = [summed(values[i : i + block]) for i in range(0, leaves, block)]
            assert torch.equal(summed(blocks), whole)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_ranks_share_an_evaluation_without_doubling_or_missing(config: Config, world: int) -> None:
    from regpt.data.corpus import corpus

    split = corpus(config)[1].split("val")
    alone = [y for _, y in eval_batches(split, 32, 3)]
    shares = [[y for _, y in eval_batches(split, 32, 3, rank, world)] for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    joined = [shares[i % world][i // world] for i in range(world * len(shares[0]))]
    assert all(torch.equal(a, b) for a, b in zip(joined, alone, strict=False))
    assert all(bool((y == IGNORE).all()) for y in joined[len(alone) :])


def test_recomputed_activations_change_no_bit(config: Config) -> None:
    """Dropout's random numbers are replayed in the backward pass."""
    session.train(config, "kept")
    session.train(with_train(config, checkpoint_activations=True), "again")
    assert (curve("again"), tensors("again")) == (curve("kept"), tensors("kept"))


def test_launching_by_one_command(config: Config, capfd: pytest.CaptureFixture[str]) -> None:
    """`regpt train --nproc 2`: torchrun inside; one line of JSON, and a mistake's status and message come through."""
    from regpt.cli import main

    words = ["train", "demo", "--nproc", "2", "--out", "run", "--json", "--data.source", "text.txt"]
    words += [
        "--tokenizer.name",
        "bytes",
        "--model.n-layer",
        "1",
        "--model.n-embd",
        "32",
        "--model.block-size",
        "32",
    ]
    words += [
        "--train.steps",
        "3",
        "--train.device",
        "cpu",
        "--sample.tokens",
        "0",
        "--optim.warmup-steps",
        "1",
    ]
    assert main([*words, "--train.batch-tokens", "128"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["step"] == 3 and "Traceback" not in err
    assert main([*words, "--train.batch-tokens", "96"]) == 2
    out, err = capfd.readouterr()
    assert err.count("ConfigError") == 1 and "--train.batch-tokens 64 or 128" in err
    assert json.loads(out)["error"]["kind"] == "ConfigError"
    assert main(["train", "--nproc", "0"]) == 2
    assert math.isfinite(json.loads(Path("run/run.json").read_text())["plan"]["world"])
