"""Processes that train together, forked from one warm process: a world costs a second instead of ten."""

from __future__ import annotations

import faulthandler
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

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as the command line does, before torch is loaded
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["regpt.train.session", "rank_child", "torch._dynamo"])
Fault = tuple[int | None, int, str]  # rank (None: all of them), step, what


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
    faulthandler.dump_traceback_later(60, file=2)  # where it hangs, if it does
    import torch

    torch.set_num_threads(1)
    from regpt.train import dist, session

    dist.JOIN_S = 15.0  # a rank that died before it joined
    if fault and fault[0] in (rank, None):
        plant(fault, f"{out}.rows-{rank}")
    status = 0
    try:
        session.train(config, out)
    except RegptError as e:
        status = e.exit_status
        if not e.told:
            os.write(2, f"{type(e).__name__}: {e}\n".encode())
    except KeyboardInterrupt:
        status = 130  # as the command line says
    except BaseException:
        os.write(2, traceback.format_exc().encode())
        status = 1
    sys.stdout.flush()
    os._exit(status)


def plant(fault: Fault, rows_to: str) -> None:
    """Have this rank meet `fault`'s what, once its run has come to that step.

    what: a signal, by its name: at the beginning of the step; "SIGTERM in evaluation": in one of `_places`; "SIGTERM
    twice …": a second one on its heels. "nan loss", "inf gradient", "-inf weight", "nan input"; "always nan loss": in
    every step from this one on. "no space": one save finds the disk full. "record rows": the ids of every
    batch go to a file; "record rows, then SIGKILL in save".
    "own clock": each reading is later than the one before, on other ranks by another time.
    """
    _, at, what = fault
    if what == "own clock":
        return _own_clock()
    if what.startswith("record rows"):
        _record_rows(rows_to)
        what = what.removeprefix("record rows").removeprefix(", then ")
        if not what:
            return
    if what == "no space":
        return _fill(at)
    if what == "no space for the end of the log":
        return _fill_at_the_end()
    name, _, place = what.partition(" in ")
    name, _, again = name.partition(" ")
    if name not in signal.Signals.__members__:
        return _spoil(at, what)

    def send() -> None:
        for _ in range(2 if again == "twice" else 1):
            os.kill(os.getpid(), signal.Signals[name])

    owner, method, first = _places(place or "step")
    _once(owner, method, at, lambda *_: send(), first)


def _places(place: str) -> tuple[Any, str, bool]:
    """Where a fault may strike: whose method, its name, and whether before it or after it."""
    from regpt.data import prepare
    from regpt.train import checkpoint, session
    from regpt.train.dist import Ranks
    from regpt.train.loop import Trainer
    from regpt.train.parallel import Gradients

    return {
        "preparation": (prepare, "_finish", True),
        "waiting": (Ranks, "first_on_each_host", True),
        "start": (session, "_trainer", True),
        "step": (Trainer, "train_step", True),
        "backward": (Gradients, "after", True),
        "update": (Trainer, "update", True),
        "logging": (Trainer, "_numbers", True),
        "evaluation": (Trainer, "evaluate", True),
        "tasks": (Trainer, "evaluate_tasks", True),
        "sample": (Trainer, "sample", True),
        "save": (Trainer, "save", True),
        "writing": (checkpoint, "_manifest_bytes", True),
        "pruning": (checkpoint, "prune", True),
        "saved": (Trainer, "save", False),
    }[place]


def _once(owner: Any, name: str, at: int, act: Callable[..., None], first: bool = True) -> None:
    """Call `act` with the method's arguments, the first time that it is called in the run's step `at` or later."""
    original, spent = getattr(owner, name), []

    def wrapped(*args: Any, **more: Any) -> Any:
        due = not spent and _step[0] >= at
        if due:
            spent.append(True)
        if due and first:
            act(*args)
        result = original(*args, **more)
        if due and not first:
            act(*args)
        return result

    setattr(owner, name, wrapped)
    _count_steps()  # around it: the step is known when it asks


_step = [0]  # where the run is; threads of a save ask too


def _count_steps() -> None:
    """Keep `_step` at the step of the trainer of this process."""
    from regpt.train.loop import Trainer

    for name in ("train_step", "evaluate", "save"):
        original = getattr(Trainer, name)

        def wrapped(self: Any, *args: Any, _original: Any = original, **more: Any) -> Any:
            _step[0] = self.state.step
            return _original(self, *args, **more)

        setattr(Trainer, name, wrapped)


def _spoil(at: int, what: str) -> None:
    """A number that is not finite: in the loss of a micro-batch, the gradient, a weight, or what enters the blocks."""
    import torch

    from regpt.train.loop import Trainer
    from regpt.train.parallel import Gradients

    what, _, later = what.partition(" after ")
    *always, number, place = what.split()
    bad = float(number)

    def spoil_loss(trainer: Trainer, *_: object) -> None:
        good = trainer.compute_loss

        def once(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            trainer.compute_loss = good
            return good(x, y) * bad

        trainer.compute_loss = once

    def spoil_input(trainer: Trainer, *_: object) -> None:
        def spoiled(_: object, __: object, out: torch.Tensor) -> torch.Tensor:
            hook.remove()
            return out * bad

        hook = trainer.state.model.drop.register_forward_hook(spoiled)  # type: ignore[union-attr]

    def spoil_weight(trainer: Trainer, *_: object) -> None:
        _local(next(trainer.state.model.parameters()).data).view(-1)[:1].fill_(bad)

    def spoil_gradient(gradients: Gradients, *_: object) -> None:
        grad = gradients.parameters[0].grad
        assert grad is not None
        _local(grad).view(-1)[:1].fill_(bad)

    if always:
        original = Trainer.seed_dropout

        def every(self: Trainer, step: int, micro: int) -> None:
            original(self, step, micro)
            if self.state.step >= at and micro == 0:
                spoil_loss(self)

        Trainer.seed_dropout = every  # type: ignore[method-assign]
        return
    if later:  # the update
        return _once(Trainer, "update", at, spoil_weight, first=False)
    act: Any = {"loss": spoil_loss, "input": spoil_input, "weight": spoil_weight, "gradient": spoil_gradient}
    _once(*((Gradients, "after") if place == "gradient" else (Trainer, "train_step")), at, act[place])


def _local(tensor: Any) -> Any:
    """A shard's own part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _fill(at: int) -> None:
    """The disk is full for one file of a checkpoint."""
    import errno

    from regpt.train import checkpoint

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _once(checkpoint, "write_synced", at, full)


def _fill_at_the_end() -> None:
    """The disk is full when the log is closed."""
    from regpt.errors import CheckpointError
    from regpt.train.run import RunDirectory

    def close(self: RunDirectory) -> None:
        raise CheckpointError(f"the end of {self.lines.path} could not be written: No space left on device.")

    RunDirectory.close = close  # type: ignore[method-assign]


def _own_clock() -> None:
    """A tenth of a second a reading on rank 0, twice that on rank 1, and so on."""
    import itertools

    from regpt.train.loop import Trainer

    readings = itertools.count()
    tick_s = 0.1 * (1 + int(os.environ["RANK"]))
    Trainer.clock = staticmethod(lambda: tick_s * next(readings))


def _record_rows(path: str) -> None:
    """Every batch that is asked for, with its step, as a line of JSON; a killed process keeps the lines it wrote."""
    import json

    from regpt.data.loader import Loader

    original = Loader.batch

    def write(value: object) -> None:
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(value) + "\n").encode())

    def recorded(self: Loader, step: int, *args: int) -> Any:
        x, y = original(self, step, *args)
        write({"step": step, "rows": x.tolist()})
        return x, y

    write("begin")
    Loader.batch = recorded  # type: ignore[method-assign]
