"""`regpt train --nproc N`: torchrun on this machine, from within, so that exit statuses and signals come through."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

from regpt.errors import ConfigError, PeerFailed

SAVE_S = 30  # that torchrun grants processes after a signal; a second signal ends them at once


def launch(nproc: int, words: list[str]) -> int:
    """Run `regpt` with `words` in `nproc` processes that find one another; the worst of their exit statuses.

    Raises:
        ConfigError: `nproc` is not a number of processes.
    """
    if nproc < 1:
        raise ConfigError("--nproc must be at least 1.", got=nproc)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # our processes say what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    names = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=0.2,
        signals_to_handle=",".join(n for n in names if hasattr(signal, n)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "regpt", *words)
    except SignalException as e:
        return 128 + int(e.sigval)
    except ChildFailedError as e:
        statuses = {failure.exitcode for failure in e.failures.values()}
        killed = sorted(-s for s in statuses if s < 0)
        if killed and not statuses - {-k for k in killed}:
            raise PeerFailed(
                f"a process was killed by {signal.Signals(killed[0]).name}.",
                exit_status=128 + killed[0],
                hint="the same command continues from the last checkpoint",
            ) from None
        return max(s for s in statuses if s > 0)
    return 0
