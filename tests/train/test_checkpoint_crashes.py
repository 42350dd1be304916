"""Saving and pruning cut short at every call that touches the disk: a good checkpoint always loads afterwards.

A killed process is played by letting one call, and every call after it, raise what nothing catches. This keeps what the
dead process had written, as SIGKILL does; it does not play a power loss, for which test_checkpoint.py checks the order.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from regpt.train import checkpoint, durable
from regpt.train.checkpoint import SaveFailed, newest_valid, prune, save_checkpoint

CALLS = ("mkdir", "write", "fsync", "rename", "replace", "unlink", "rmdir")


class Killed(BaseException):
    """The process is dead."""


class Disk:
    """Counts the calls that change the disk and makes them fail from `at` on, in one of several ways.

    kill: that call, half done if it is a write, and everything later. full: ENOSPC for whatever needs space, from there
    on. io: EIO, once.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, at: int = 0, how: str = "kill") -> None:
        self.patch, self.at, self.how, self.count = patch, at, how, 0
        for name in CALLS:
            patch.setattr(os, name, self.wrapped(name, getattr(os, name)))
        patch.setattr(durable, "open", self.wrapped("open", open), raising=False)

    def wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            self.count += 1
            if not self.at or self.count < self.at:
                return real(*args, **more)
            if self.how == "kill":
                if name == "write" and self.count == self.at:
                    real(args[0], args[1][: len(args[1]) // 2])
                raise Killed
            if self.how == "full" and name in ("open", "mkdir", "write", "fsync"):
                raise OSError(errno.ENOSPC, "No space left on device")
            if self.how == "io" and self.count == self.at:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args, **more)

        return call


def save(folder: Path, step: int, value: float) -> None:
    made = {"w": torch.full((3,), value), "b": torch.zeros(2)}
    save_checkpoint(folder, step=step, model=made, optimizer={"w.exp_avg": made["w"]}, state={"value": value})


def two_saved(folder: Path) -> Path:
    """Steps 10 and 20 in it."""
    save(folder, 10, 10.0)
    save(folder, 20, 20.0)
    return folder


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, each holding its own number."""
    return two_saved(tmp_path_factory.mktemp("before") / "checkpoints")


@dataclass(frozen=True)
class Work:
    """What is done to a folder, and which checkpoint may be the newest if that is cut short: the old or the new."""

    name: str
    begin_empty: bool
    step: int
    value: float
    keep: int
    old: tuple[int, float] | None

    def do(self, folder: Path) -> None:
        save(folder, self.step, self.value)
        prune(folder, keep=self.keep)


WORK = [
    Work("a new step", False, 30, 30.0, 2, (20, 20.0)),
    Work("the same step again", False, 20, 20.5, 1, (20, 20.0)),
    Work("the first of all", True, 10, 10.0, 2, None),
]


def never(text: str) -> None:
    raise AssertionError(f"nothing was damaged, yet: {text}")


def check_recovery(folder: Path, work: Work, note: str) -> None:
    """A new process starts: the newest checkpoint is old or new, whole, and saving goes on without debris."""
    checkpoint._known_good.clear()
    found = newest_valid(folder, say=never)
    newest = (found.step, found.state["value"]) if found else None
    assert newest in (work.old, (work.step, work.value)), note
    if found is not None:
        assert torch.equal(found.model_tensors()["w"], torch.full((3,), found.state["value"])), note
    save(folder, 40, 40.0)
    prune(folder, keep=1)
    assert os.listdir(folder) == ["step-000040"], note


@pytest.mark.parametrize("how", ["kill", "full", "io"])
@pytest.mark.parametrize("work", WORK, ids=lambda w: w.name)
def test_every_call_may_be_the_last(
    before: Path, tmp_path: Path, work: Work, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", os.fstat)  # to wait for the disk changes nothing here and takes long

    def start(name: str) -> Path:
        folder = tmp_path / name / "checkpoints"
        if not work.begin_empty:
            shutil.copytree(before, folder)
        return folder

    with monkeypatch.context() as patch:
        disk = Disk(patch)
        work.do(start("count"))
    assert disk.count > 15
    ends = []
    for at in range(1, disk.count + 1):
        folder, note = start(str(at)), f"{how} at call {at} of {disk.count}"
        with monkeypatch.context() as patch:
            Disk(patch, at=at, how=how)
            try:
                work.do(folder)
                ends.append("done")
            except Killed:
                ends.append("killed")
            except SaveFailed as failure:
                ends.append("failed")
                assert failure.no_space == (how == "full")
                assert "older checkpoints are untouched" in str(failure)
        if how != "kill" and folder.exists():
            assert not [name for name in os.listdir(folder) if name.startswith(".tmp")], note
        check_recovery(folder, work, note)
        shutil.rmtree(folder)
    assert ends.count("killed" if how == "kill" else "failed") > 12


def test_after_a_full_disk_the_same_process_goes_on(before: Path, tmp_path: Path) -> None:
    """Training catches `SaveFailed`, and the next save works once there is space."""
    folder = Path(shutil.copytree(before, tmp_path / "checkpoints"))
    with pytest.MonkeyPatch.context() as patch:
        Disk(patch, at=3, how="full")
        with pytest.raises(
            SaveFailed, match="checkpoint of step 30 could not be written: No space left"
        ) as caught:
            save(folder, 30, 30.0)
    assert caught.value.no_space and "free some space" in str(caught.value)
    assert sorted(os.listdir(folder)) == ["step-000010", "step-000020"]
    save(folder, 30, 30.0)
    found = newest_valid(folder, say=never)
    assert found is not None and found.step == 30


def test_an_interrupt_leaves_nothing(before: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(before, tmp_path / "checkpoints"))

    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_manifest_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(folder, 30, 30.0)
    assert sorted(os.listdir(folder)) == ["step-000010", "step-000020"]


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may take less than it is given."""
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data[:7])))
    save(tmp_path, 10, 1.25)
    monkeypatch.undo()
    found = newest_valid(tmp_path, say=never)
    assert found is not None and torch.equal(found.model_tensors()["w"], torch.full((3,), 1.25))


def test_folders_that_cannot_be_synced_do_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems answer EINVAL to the fsync of a folder."""
    real = os.fsync

    def fsync(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    save(tmp_path, 10, 1.0)
    assert newest_valid(tmp_path, say=never) is not None


def test_replacing_a_file_keeps_the_old_one_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json and the log are rewritten so."""
    for how in ("kill", "full", "io"):
        for at in range(1, 9):
            path = tmp_path / "run.json"
            path.write_bytes(b"old")
            with monkeypatch.context() as patch:
                Disk(patch, at=at, how=how)
                with contextlib.suppress(Killed, OSError):
                    durable.replace_file(path, b"new and longer")
            assert path.read_bytes() in (b"old", b"new and longer")
            durable.replace_file(path, b"later")
            assert path.read_bytes() == b"later" and os.listdir(tmp_path) == ["run.json"]
