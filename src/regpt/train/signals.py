"""A first Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP asks the work to stop once it is safe; a second one stops it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


class StopRequest:
    """Whether a signal has asked for a stop, and which."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM, …"""
        return signal.Signals(self.signum).name if self.signum is not None else ""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """While open, the first stopping signal only sets the request; the second acts as if we were not here."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals there only
        yield request
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # Windows lacks the last two
    watched = [getattr(signal, n) for n in names if hasattr(signal, n)]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN:  # nohup: a lost terminal is no stop
        watched.remove(hangup)
    then: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if hangup is not None:
        then[hangup] = signal.SIG_IGN  # the shell and the kernel both send it: only the first is a request

    def on_signal(signum: int, frame: FrameType | None) -> None:
        request.signum = signum
        with contextlib.suppress(OSError):  # in a handler only the bare system call is safe
            os.write(2, b"\nstopping once this piece of work is done, then saving; again: at once, unsaved\n")
        for other in watched:
            signal.signal(other, then.get(other, signal.SIG_DFL))

    before = {signum: signal.signal(signum, on_signal) for signum in watched}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
