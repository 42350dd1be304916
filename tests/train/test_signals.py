"""Signals: the first asks, the second acts, and the handlers of before come back."""

from __future__ import annotations

import signal
import threading

import pytest

from regpt.train.signals import StopRequest, stop_on_signal


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
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
