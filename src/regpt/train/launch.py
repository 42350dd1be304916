"""`regpt train --nproc N`: torchrun on this machine, from within, so that exit statuses and signals come through."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import signal
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

from regpt.errors import PEER_EXIT, ConfigError, PeerFailed

MOST_PROCESSES = 1024  # on one machine
LAUNCHER = "REGPT_LAUNCHER"  # in the environment of our processes: who started them,
STATUS_FOLDER = "REGPT_STATUS_FOLDER"  # and where they leave their exit statuses, each in a file of its rank
SAVE_S = 600  # that processes have for saving after a signal, before torchrun ends them


def leave_status(status: int) -> None:
    """Tell the launcher, if one started this process, how it ends."""
    if folder := os.environ.get(STATUS_FOLDER):
        with contextlib.suppress(OSError):
            (Path(folder) / os.environ.get("RANK", "0")).write_text(str(status))


def launch(nproc: int, words: list[str]) -> int:
    """Run `regpt` with `words` in `nproc` processes that find one another; the worst of their exit statuses.

    Raises:
        ConfigError: `nproc` is not a number of processes.
    """
    if not 1 <= nproc <= MOST_PROCESSES:
        raise ConfigError("--nproc is out of range.", got=nproc, expected=f"1 to {MOST_PROCESSES}")
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    names = [n for n in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, n)]
    if "SIGHUP" in names and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup
        names.remove("SIGHUP")
    more: dict[str, Any] = {}
    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        more["shutdown_timeout"] = SAVE_S
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(names),
        **more,
    )
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}
    logging.disable(logging.ERROR)  # our processes say what is wrong
    folder = tempfile.mkdtemp(prefix="regpt-")
    os.environ |= {STATUS_FOLDER: folder, LAUNCHER: str(os.getpid())}
    try:
        elastic_launch(config, sys.executable)("-m", "regpt", *words)
    except SignalException as e:
        # torchrun passes the signal on and waits, and says nothing of how its processes ended.
        ended = {int(file.read_text()) for file in Path(folder).iterdir()}
        return max(ended - {0, 128 + int(e.sigval)}, default=128 + int(e.sigval))
    except ChildFailedError as e:
        statuses = {failure.exitcode for failure in e.failures.values()}
        killed = sorted(-s for s in statuses if s < 0)
        if killed and not statuses - {-k for k in killed}:
            raise PeerFailed(
                f"a process was killed by {signal.Signals(killed[0]).name}.",
                exit_status=128 + killed[0],
                hint="the same command continues from the last checkpoint",
            ) from None
        said = {s for s in statuses if s > 0}
        return max(said - {PEER_EXIT} or said)  # what began it, not what followed from it
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        del os.environ[STATUS_FOLDER], os.environ[LAUNCHER]
        logging.disable(logging.NOTSET)
        for name, handler in before.items():  # torchrun leaves its own
            signal.signal(getattr(signal, name), handler)
    return 0
