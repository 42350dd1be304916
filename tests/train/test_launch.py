"""`--nproc`: which exit status comes through from several processes, and which signals are passed on."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher import api

from regpt.cli import main
from regpt.errors import ConfigError, PeerFailed
from regpt.train.launch import launch


def ended(monkeypatch: pytest.MonkeyPatch, outcome: list[int] | Exception) -> list[Any]:
    """Have torchrun end with these statuses of its processes, or so; the settings that it was given."""
    given: list[Any] = []

    def elastic_launch(config: Any, *_: str) -> Any:
        given.append(config)

        def run(*_: str) -> None:
            if isinstance(outcome, Exception):
                raise outcome
            failures = {
                rank: ProcessFailure(local_rank=rank, pid=rank, exitcode=status, error_file="none")
                for rank, status in enumerate(outcome)
                if status
            }
            if failures:
                raise ChildFailedError("regpt", failures)

        return run

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    return given


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([0, 0], 0),
        ([4, 3], 3),  # what began it, not what followed from it
        ([2, 4], 2),
        ([4, 4], 4),
        ([143, 143], 143),
        ([-9, 4], 4),
        ([1, -15], 1),
    ],
)
def test_the_status_is_that_of_the_cause(
    monkeypatch: pytest.MonkeyPatch, statuses: list[int], expected: int
) -> None:
    ended(monkeypatch, statuses)
    assert launch(2, ["train"]) == expected


def test_a_killed_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, [-9, -9])
    with pytest.raises(PeerFailed, match="a process was killed by SIGKILL") as e:
        launch(2, ["train"])
    assert e.value.exit_status == 137


def test_a_signal_to_the_launcher_is_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    ended(monkeypatch, SignalException("stopped", signal.SIGTERM))
    assert launch(2, ["train"]) == 143


def test_a_save_that_fails_after_the_signal_is_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun says nothing of how its processes ended, so each leaves a word."""

    def elastic_launch(*_: Any) -> Any:
        def run(*_: str) -> None:
            for rank in "01":
                monkeypatch.setenv("RANK", rank)
                assert main(["no such command"]) == 2
            raise SignalException("stopped", signal.SIGTERM)

        return run

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    assert launch(2, ["train"]) == 2
    assert "REGPT_STATUS_FOLDER" not in os.environ


def test_under_nohup_a_lost_terminal_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ended(monkeypatch, [0])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launch(1, ["train"])
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    launch(1, ["train"])
    assert [config.signals_to_handle for config in given] == [
        "SIGTERM,SIGINT,SIGUSR1",
        "SIGTERM,SIGINT,SIGHUP,SIGUSR1",
    ]


def test_no_processes_are_no_run() -> None:
    with pytest.raises(ConfigError, match="--nproc is out of range"):
        launch(0, ["train"])
