"""Processes that train together, forked from one warm process: a world costs a second instead of ten."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regpt.config import Config
from regpt.errors import RegptError

SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["regpt.train.session", "rank_child"])
Fault = tuple[int, int, str]  # rank, step, what


def start(
    world: int,
    config: Config,
    out: str | Path,
    fault: Fault | None = None,
    others: Mapping[int, Config] | None = None,
) -> list[Any]:
    """`session.train` on `world` ranks, in the current folder; `others`: ranks that have other settings."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        SPAWN.Process(
            target=_rank,
            args=(rank, world, port, (others or {}).get(rank, config), str(out), os.getcwd(), fault),
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return processes


def statuses(processes: Sequence[Any], timeout_s: float = 90.0) -> list[int | None]:
    """Exit statuses once all have ended; None for one that had to be killed."""
    for process in processes:
        process.join(timeout_s)
    ended = [p.exitcode for p in processes]
    for process in processes:
        process.kill()
        process.join()
    return ended


def train(world: int, config: Config, out: str | Path, fault: Fault | None = None) -> list[int | None]:
    """`start`, and wait."""
    return statuses(start(world, config, out, fault))


def said(out: str | Path, rank: int) -> str:
    """What a rank wrote to standard error."""
    return Path(f"{out}.stderr-{rank}").read_text()


def _rank(
    rank: int, world: int, port: int, config: Config, out: str, folder: str, fault: Fault | None
) -> None:
    os.chdir(folder)
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_PORT": port,
        "MASTER_ADDR": "127.0.0.1",
    }.items():
        os.environ[name] = str(value)
    if world == 1:
        del os.environ["RANK"]
    log = os.open(f"{out}.stderr-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 2)
    import torch

    torch.set_num_threads(1)
    from regpt.train import session

    if fault and fault[0] == rank:
        _plant(fault)
    status = 0
    try:
        session.train(config, out)
    except RegptError as e:
        status = e.exit_status
        if not e.told:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        status = 1
    sys.stdout.flush()
    os._exit(status)


def _plant(fault: Fault) -> None:
    """Have this rank meet `fault`'s what at its step."""
    import torch

    from regpt.train.loop import Trainer

    _, at, what = fault
    bad = float("inf") if what.startswith("inf") else float("nan")

    def at_step(name: str, act: Callable[[Any, tuple[Any, ...]], None]) -> None:
        original = getattr(Trainer, name)

        def wrapped(self: Any, *args: Any, **kw: Any) -> Any:
            if self.state.step == at:
                act(self, args)
            return original(self, *args, **kw)

        setattr(Trainer, name, wrapped)

    if what == "SIGTERM in evaluation":
        at_step("evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    elif what in signal.Signals.__members__:
        at_step("train_step", lambda *_: os.kill(os.getpid(), signal.Signals[what]))
    elif what.endswith("weight"):
        at_step(
            "train_step", lambda self, _: next(self.state.model.parameters()).data.view(-1)[:1].fill_(bad)
        )
    elif what.endswith("loss"):
        original = Trainer.seed_dropout

        def spoiled(self: Trainer, step: int, micro: int) -> None:
            original(self, step, micro)
            good = self.compute_loss

            def once(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                self.compute_loss = good
                return good(x, y) * (bad if self.state.step == at else 1.0)

            if self.state.step == at and (step == at or what.startswith("always")):
                self.compute_loss = once

        Trainer.seed_dropout = spoiled  # type: ignore[method-assign]
    elif what.endswith("gradient"):
        from regpt.train.parallel import Gradients

        after, begin = Gradients.after, Trainer.train_step

        def poisoned(self: Gradients, loss: torch.Tensor) -> None:
            if self.at_step == at:  # type: ignore[attr-defined]
                grad = self.parameters[0].grad
                assert grad is not None
                grad.view(-1)[:1].fill_(bad)
            after(self, loss)

        def counted(self: Trainer) -> None:
            self.gradients.at_step = self.state.step  # type: ignore[attr-defined]
            begin(self)

        Trainer.train_step = counted  # type: ignore[method-assign]
        Gradients.after = poisoned  # type: ignore[method-assign]
