"""torchrun with restarts: ranks that die come back by themselves, and the run ends with the bits of an untouched one."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from runs import debris, entries, outcome, steps

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nproc-per-node",
    "2",
    "--monitor-interval",
    "0.2",
]
CHILD = str(Path(__file__).with_name("elastic_child.py"))
SETTINGS = (
    "--data.source text.txt --tokenizer.name bytes --train.device cpu --train.dtype float32 --train.steps 10 "
    "--model.n-layer 2 --model.n-head 2 --model.n-embd 32 --model.block-size 32 --model.dropout 0.1 "
    "--train.batch-tokens 256 --train.micro-rows 2 --train.threads 1 --save.every 2 --eval.every 4 "
    "--sample.tokens 2 --optim.warmup-steps 2 --track.log-every 1 --data.val-fraction 0.1"
)


def torchrun(deaths: int, out: str, rendezvous: list[str], *more: str) -> subprocess.CompletedProcess[str]:
    words = [*TORCHRUN, *rendezvous, "--max-restarts", str(deaths), CHILD, str(deaths)]
    return subprocess.run(
        [*words, "train", "demo", "--out", out, *SETTINGS.split(), *more],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [2.5, 3.5, 4.5, 9.0])
def test_a_launcher_that_is_killed_leaves_no_orphans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_s: float
) -> None:
    """While its processes start, join, or train."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} little ducks went out one day. " for i in range(600)))
    words = [
        sys.executable,
        "-m",
        "regpt",
        "train",
        "demo",
        "--nproc",
        "2",
        "--out",
        "run",
        *SETTINGS.split(),
    ]
    launcher = subprocess.Popen(
        [*words, "--train.steps", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        launcher.wait(after_s)
    children = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    for process in alive:
        process.kill()
    assert alive == []


@pytest.mark.parametrize(
    ("deaths", "strategy", "rendezvous"),
    [
        (1, "ddp", ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]),
        pytest.param(
            2, "fsdp", ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"], marks=pytest.mark.slow
        ),
        pytest.param(2, "ddp", ["--standalone"], marks=pytest.mark.slow),
    ],
)
def test_ranks_that_die_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deaths: int, strategy: str, rendezvous: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"{i} little ducks went out one day. " for i in range(600)))
    whole = torchrun(0, "whole", rendezvous, "--train.strategy", strategy)
    assert whole.returncode == 0, whole.stderr[-3000:]
    run = torchrun(deaths, "run", rendezvous, "--train.strategy", strategy)
    assert run.returncode == 0, run.stderr[-3000:]
    assert outcome("run") == outcome("whole") and debris("run") == [] and steps("run")[-1] == 10
    assert len(entries("run", "step")) == 10
    assert run.stderr.count("PeerFailed") >= 1, "the rank that lived did not say why it left"
