"""Signals: the first asks, the second acts, and the handlers of before come back."""

from __future__ import annotations

import signal
import threading

import pytest

from regpt.train.signals import StopRequest, stop_on_signal

STOPPING = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"]


@pytest.mark.parametrize("name", [n for n in STOPPING if hasattr(signal, n)])
def test_the_first_signal_only_asks(name: str) -> None:
    before = signal.getsignal(getattr(signal, name))
    with stop_on_signal() as stop:
        assert not stop
        signal.raise_signal(getattr(signal, name))
        assert stop and stop.name == name
    assert signal.getsignal(getattr(signal, name)) == before


def test_the_second_signal_acts() -> None:
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_outside_the_main_thread_nothing_is_installed() -> None:
    seen: list[StopRequest] = []

    def work() -> None:
        with stop_on_signal() as stop:
            seen.append(stop)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not seen[0]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="there is no SIGHUP here")
def test_a_lost_terminal_hangs_up_twice_and_is_ignored_under_nohup() -> None:
    """The shell and the kernel each send SIGHUP: the second must not end the saving. Under nohup it is no request."""
    with stop_on_signal() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.name == "SIGHUP"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)
