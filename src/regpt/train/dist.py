"""Processes that train together: who we are, what all must agree on, and who has gone silent.

Everything is PyTorch's own: torchrun starts the processes and says who they are (RANK, WORLD_SIZE, LOCAL_RANK), Gloo
carries what lies on a CPU, NCCL what lies on a GPU. Every method here is a collective: all ranks call it, or none.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from regpt.errors import PEER_EXIT, ConfigError, PeerFailed, RegptError
from regpt.train.launch import LAUNCHER

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Result = TypeVar("Result")

BEAT_S = 1.0  # every process says so often that it is alive,
SILENT_S = 20.0  # and is given up when it has not for so long: stopped, swapped out, or its host is gone
JOIN_S = 300.0  # processes are started together: the longest that one may take to load its libraries
JOIN_POLL_S = 0.02
COLLECTIVE_S = 6 * 3600.0  # the longest that one rank may work alone while others wait: preparing text, say
OVER = "over"  # what a process leaves that has ended by itself


def is_sharded(x: Tensor) -> TypeGuard[DTensor]:
    """Whether x is one rank's part of a tensor (FSDP2)."""
    # To import DTensor takes a second, and only who has made one needs it.
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def sharded_like(x: Tensor, model: DTensor) -> DTensor:
    """Our part of x, which every rank has whole, divided as `model` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x, model.device_mesh, model.placements, src_data_rank=None)


@dataclass(kw_only=True)
class Ranks:
    """Our place among the processes of a run. The defaults are a process that trains alone."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    store: Any = field(default=None, repr=False)
    """torch.distributed.Store: keys and values that all processes see."""
    doing: str = "starting"
    """What we are at; other ranks name it if we fall silent."""

    @property
    def main(self) -> bool:
        """Whether we are the one that writes."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, in place, of a tensor on the CPU or on our device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gathered(self, values: Tensor) -> list[Tensor]:
        """Every rank's tensor of the same shape and dtype, by rank."""
        if self.world == 1:
            return [values]
        out = [torch.empty_like(values) for _ in range(self.world)]
        dist.all_gather(out, values)
        return out

    def largest(self, value: int) -> int:
        """The largest of all ranks' numbers."""
        if self.world == 1:
            return value
        one = torch.tensor([value], dtype=torch.int64)
        dist.all_reduce(one, op=dist.ReduceOp.MAX)
        return int(one)

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value`, JSON or None, on every rank; what the others give is not looked at."""
        if self.world == 1:
            return value
        text = json.dumps(value).encode() if self.main else b""
        data = torch.zeros(self.largest(len(text)), dtype=torch.uint8)
        if self.main:
            data.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def together(self, work: Callable[[], Result]) -> Result:
        """Do `work` on this rank; where it fails on any rank with an error of ours, every rank raises.

        Raises:
            RegptError: our own error, on the first rank that has one.
            PeerFailed: on the others; it need not be said again.
        """
        if self.world == 1:
            return work()
        error: RegptError | None = None
        try:
            result = work()
        except RegptError as e:
            error = e
        first = self.world - 1 - self.largest(self.world - 1 - self.rank if error else -1)
        worst = self.largest(error.exit_status if error else 0)
        if not worst:
            return result
        if error and self.rank == first:
            error.shared = True
            raise error
        failed = PeerFailed(f"rank {first} failed.", exit_status=worst)
        failed.told = failed.shared = True
        raise failed

    def first_on_each_host(self, work: Callable[[], Result]) -> Result:
        """`work` on local rank 0, however long it takes, then, with its result on the disk, on the others of the host.

        Raises as `together` does.
        """
        first = self.local_rank == 0
        result = self.together(work if first else lambda: None)
        later = self.together(work if not first else lambda: None)
        return cast(Result, result if first else later)


@contextlib.contextmanager
def joined(kind: str) -> Iterator[Ranks]:
    """Our place among the processes that torchrun started; alone where it did not.

    Args:
        kind: of device: cuda, cpu or mps.

    Raises:
        PeerFailed: a peer was lost, on the way or before it joined.
        ConfigError: the environment is not that of torchrun.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or "RANK" not in os.environ:
        yield Ranks()
        return
    orderly = False
    with contextlib.ExitStack() as joining:
        joining.enter_context(_leaving_with_the_parent())
        ranks = _meet(world)
        stop_watching = _watch_one_another(ranks)
        try:
            timeout = datetime.timedelta(seconds=COLLECTIVE_S)
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            dist.init_process_group(
                backend, store=ranks.store, rank=ranks.rank, world_size=ranks.world, timeout=timeout
            )
            never_free(dist.group.WORLD)
            joining.close()
            yield ranks
            dist.barrier()  # whoever has more to close is still heard
            orderly = True
        except RegptError as e:
            orderly = e.shared
            raise
        except RuntimeError as e:
            if not _connection_lost(e):
                raise
            raise _lost(ranks, e) from e
        finally:
            # NCCL waits for a peer that will not come.
            if dist.is_initialized() and (orderly or kind != "cuda"):
                with contextlib.suppress(RuntimeError):
                    dist.destroy_process_group()
            stop_watching(orderly)


@contextlib.contextmanager
def _leaving_with_the_parent() -> Iterator[None]:
    """While open, leave if the process that started us is gone. Whoever is left behind before it has joined would ask a
    rendezvous that nobody answers; afterwards the heartbeat notices."""
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    over = threading.Event()

    def watch() -> None:
        while not over.wait(BEAT_S):
            if os.getppid() != parent:
                sys.stderr.write("PeerFailed: the process that started this one is gone.\n")
                os._exit(PEER_EXIT)

    threading.Thread(target=watch, name="regpt-parent", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _meet(world: int) -> Ranks:
    """Our place, by what torchrun says in the environment, and a store for the processes of this start."""
    try:
        store, rank, world = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_S)))
        return Ranks(
            rank=rank,
            world=world,
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            store=_of_this_life(store, rank, world),
        )
    except ValueError as e:  # what torchrun says in the environment is not what torchrun says
        raise ConfigError(f"rank {os.environ['RANK']} of {world} was not started by torchrun: {e}") from e
    except RuntimeError as e:
        raise _lost(Ranks(rank=int(os.environ["RANK"]), world=world, doing="joining"), e) from e


def _lost(ranks: Ranks, error: RuntimeError) -> PeerFailed:
    return PeerFailed(
        f"rank {ranks.rank} of {ranks.world}, {ranks.doing}: a peer was lost: {str(error).splitlines()[0]}",
        hint="the first rank to fail says why; the same command continues from the last checkpoint",
        exit_status=PEER_EXIT,
    )


def never_free(group: object) -> None:
    """Keep a process group until the process ends.

    Gloo's destructor joins its threads while it holds Python's lock. A thread that is about to free the tensors of a
    collective that just ended waits for that lock, and neither goes on: one end in thirty on a busy machine.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _of_this_life(store: Any, rank: int, world: int) -> Any:
    """The part of `store` that only the processes of this start use.

    torchrun restarts processes on the store that it has, where those before them have left their addresses: whoever reads
    one is refused. So rank 0 names the start, the others answer by name with a word of their own, and know that rank 0 is
    not one of the past when it repeats that word.
    """
    if rank == 0:
        name = uuid.uuid4().hex
        store.set("regpt/start", name)
        words = [store.get(f"regpt/{name}/{other}").decode() for other in range(1, world)]
        store.set(f"regpt/{name}/all", json.dumps(words))
    else:
        word, name, began = uuid.uuid4().hex, "", time.monotonic()
        while True:
            if time.monotonic() - began > JOIN_S:
                raise RuntimeError(f"rank 0 has not answered for {JOIN_S:.0f} s")
            name = store.get("regpt/start").decode()  # waits for the first start of all
            store.set(f"regpt/{name}/{rank}", word)
            everyone = f"regpt/{name}/all"
            if store.check([everyone]) and word in json.loads(store.get(everyone)):
                break
            time.sleep(JOIN_POLL_S)
    store.set_timeout(datetime.timedelta(seconds=COLLECTIVE_S))
    return dist.PrefixStore(f"regpt/{name}", store)  # type: ignore[attr-defined]


def _connection_lost(error: RuntimeError) -> bool:
    said = str(error).lower()
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return any(
        s in said for s in ("connection closed by peer", "connection reset", "timed out waiting", "gloo")
    )


def _watch_one_another(ranks: Ranks) -> Callable[[bool], None]:
    """Until what is returned is called, say that we are alive, and leave when another process has not said so for long.

    Two threads: one that asks the store, and one that asks nobody, for where the store's own process or host is what
    froze the first one waits in it for ever. What is returned is told whether all processes end as we do: then the others
    need not wait for us any more. Of one that ends alone they must hear nothing.
    """
    over, round_s = threading.Event(), [time.monotonic()]
    heartbeat = threading.Thread(
        target=_watch, args=(ranks, over, round_s), name="regpt-heartbeat", daemon=True
    )
    heartbeat.start()
    threading.Thread(
        target=_watch_the_watch, args=(ranks, over, round_s), name="regpt-watch", daemon=True
    ).start()

    def stop(orderly: bool) -> None:
        over.set()
        heartbeat.join(timeout=2 * BEAT_S)
        if orderly and not heartbeat.is_alive():
            with contextlib.suppress(RuntimeError):
                ranks.store.set(f"regpt/beat/{ranks.rank}", OVER)

    return stop


def _watch(ranks: Ranks, over: threading.Event, round_s: list[float]) -> None:
    """Say every BEAT_S that we are alive, and look who else is."""
    store = ranks.store.clone()
    store.set(f"regpt/process/{ranks.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    last = {other: ("", time.monotonic()) for other in range(ranks.world) if other != ranks.rank}
    count = 0
    while not over.wait(BEAT_S):
        count += 1
        try:
            store.set(f"regpt/beat/{ranks.rank}", f"{count} {ranks.doing}")
            for other, (beat, since) in last.items():
                key = f"regpt/beat/{other}"
                now = store.get(key).decode() if store.check([key]) else ""
                if now == OVER or now != beat:
                    last[other] = (now, time.monotonic())
                elif time.monotonic() - since > SILENT_S:
                    _end(store, other)
                    _give_up(ranks, other, beat.partition(" ")[2] or "starting")
        except RuntimeError:  # the store went with the process or the agent that held it
            return
        round_s[0] = time.monotonic()


def _end(store: Any, other: int) -> None:
    """Kill a silent process of this host: frozen, it would not hear torchrun's request to end, and hold up the rest."""
    key = f"regpt/process/{other}"
    if store.check([key]):
        host, pid = json.loads(store.get(key))
        if host == socket.gethostname():
            with contextlib.suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))


def _watch_the_watch(ranks: Ranks, over: threading.Event, round_s: list[float]) -> None:
    """Leave when the store has not answered for long."""
    while not over.wait(BEAT_S):
        # Whoever is named by `_watch` is named first.
        if time.monotonic() - round_s[0] > SILENT_S + 2 * BEAT_S:
            _give_up(ranks, None, "")


def _give_up(ranks: Ranks, other: int | None, doing: str) -> None:
    """A collective that waits for a lost peer cannot be left in any other way than by leaving the process."""
    who = "the rendezvous store" if other is None else f"rank {other} (last known: {doing})"
    sys.stderr.write(
        f"PeerFailed: rank {ranks.rank} of {ranks.world}, {ranks.doing}: {who} has been silent for {SILENT_S:.0f} s.\n"
        "  try: the same command continues from the last checkpoint. Where this rank stood:\n"
    )
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
    os._exit(PEER_EXIT)
