"""SIGKILL, ENOSPC and EIO at every system call of one save and prune (strace), as the kernel would give them.

test_checkpoint_crashes.py plays the same in one process, at the calls that we know to touch the disk; here nobody
has to know them. A process that is warm is forked for every case, and strace, attached to it before it begins, makes
one call fail, or be the last. A kill keeps what the kernel has: this says nothing of power loss.
"""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from rank_child import SPAWN
from test_checkpoint_crashes import WORK, Work, check_recovery, save, two_saved

from regpt.train.checkpoint import SaveFailed, checkpoint_name, read_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="strace is Linux's")
MARKER = "getppid"  # called before the work and after it, never by it
DISK_CALLS = "%file,%desc"  # whatever takes a path or a descriptor, as strace counts it
# How a case may end. What is none of these is a fault of ours.
DONE, FAILED, FULL, KILLED = "done", "failed", "failed for want of space", "killed"
STATUS = {0: DONE, 2: FAILED, 3: FULL, -signal.SIGKILL: KILLED}
ALLOWED = {"SIGKILL": {KILLED}, "ENOSPC": {DONE, FULL}, "EIO": {DONE, FAILED}}


# --- the process that the faults meet ------------------------------------------------------------------


def _warm(commands: Connection) -> None:
    """Fork a child for every (work, folder) that comes: all that is imported, it has imported."""
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), 10, 10.0)
        WORK[1].do(Path(folder))
    while True:
        try:
            number, folder = commands.recv()
        except EOFError:
            return
        (ready, say_ready), (go, say_go) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            _one_case(WORK[number], Path(folder), say_ready, go)
        os.read(ready, 1)
        commands.send(child)
        commands.recv()
        os.write(say_go, b"!")
        _, status = os.waitpid(child, 0)
        commands.send(os.waitstatus_to_exitcode(status))
        for fd in (ready, say_ready, go, say_go):
            os.close(fd)


def _one_case(work: Work, folder: Path, ready: int, go: int) -> None:
    status = 0
    try:
        os.write(ready, b"!")
        select.select([go], [], [])  # until strace is there; the work has no such call, so none is miscounted
        os.getppid()
        try:
            work.do(folder)
        finally:
            os.getppid()
    except SaveFailed as failure:
        status = 3 if failure.no_space else 2
    except BaseException:
        Path(f"{folder}.said").write_text(traceback.format_exc())
        status = 1
    finally:
        os._exit(status)


# --- strace --------------------------------------------------------------------------------------------


class CannotTrace(Exception):
    """strace is not allowed to."""


@dataclass
class Warm:
    """The warm process, and strace for its children."""

    commands: Connection
    log: Path

    def case(self, work: Work, folder: Path, *options: str) -> tuple[int, list[str]]:
        """Do `work` under strace with these options; its exit status, and what strace wrote."""
        self.commands.send((WORK.index(work), str(folder)))
        child = self.commands.recv()
        command = ["strace", "-f", "-p", str(child), "-o", str(self.log), *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline()  # once it says so, no call escapes it
            self.commands.send("go")
            status = self.commands.recv()
            said += strace.stderr.read()
        if "attached" not in said:
            raise CannotTrace(said)
        return status, self.log.read_text().splitlines()

    def calls(self, work: Work, folder: Path, *options: str) -> list[tuple[str, int]]:
        """Every system call of `work`: its name, and which one of that name it is, from the attaching on."""
        status, lines = self.case(work, folder, *options)
        assert status == 0
        seen, found, within = Counter[str](), [], False
        for line in lines:
            match = re.match(r"\d+ +(\w+)\(", line)
            name = match[1] if match else ""
            seen[name] += 1
            if name == MARKER:
                within = not within
            # Memory is no file, though mmap may take one.
            elif within and name and not ("%desc" in "".join(options) and "MAP_ANONYMOUS" in line):
                found.append((name, seen[name]))
        return found


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_warm, args=(theirs,))
    process.start()
    theirs.close()
    folder = tmp_path_factory.mktemp("strace")
    try:
        warm = Warm(ours, folder / "log")
        try:
            warm.case(WORK[2], folder / "checkpoints")
        except CannotTrace as e:
            pytest.skip(f"strace may not trace here: {e}")
        yield warm
    finally:
        ours.close()  # which ends it
        process.join()


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10 and 20, each holding its own number."""
    return two_saved(tmp_path_factory.mktemp("before") / "checkpoints")


def wrong(how: str, work: Work, folder: Path, end: str) -> str | None:
    """What is not as it was promised after a case that ended so."""
    if end not in ALLOWED[how]:
        said = Path(f"{folder}.said")
        return said.read_text() if said.exists() else f"it ended so: {end}"
    if how != "SIGKILL" and folder.exists() and [n for n in os.listdir(folder) if n.startswith(".tmp")]:
        return "the attempt was not removed"
    try:
        if end == DONE:
            found = read_checkpoint(folder / checkpoint_name(work.step))
            assert found.state["value"] == work.value, "it was said to be saved"
        check_recovery(folder, work, "recovery")
    except Exception:
        return traceback.format_exc()
    return None


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("how", ["SIGKILL", "ENOSPC", "EIO"])
def test_every_system_call_may_fail(
    warm: Warm, before: Path, tmp_path: Path, how: str, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Here, not in the child: to wait for the disk changes nothing in what is looked at, and takes long.
    monkeypatch.setattr(os, "fsync", os.fstat)
    fault = f"signal={how}" if how == "SIGKILL" else f"error={how}"
    trace = ["-e", f"trace={DISK_CALLS},{MARKER}"] if how != "SIGKILL" else []
    ends, failures, total = Counter[str](), [], 0

    def start(name: str, work: Work) -> Path:
        folder = tmp_path / name / "checkpoints"
        folder.parent.mkdir()
        if not work.begin_empty:
            shutil.copytree(before, folder)
        return folder

    for number, work in enumerate(WORK):
        calls = warm.calls(work, start(work.name, work), *trace)
        assert len(calls) > 30
        total += len(calls)
        for at in range(number * every // len(WORK), len(calls), every):
            name, which = calls[at]
            folder = start(f"{number}-{at}", work)
            options = ["-e", f"trace={name},{MARKER}", "-e", f"inject={name}:{fault}:when={which}"]
            status, lines = warm.case(work, folder, *options)
            end = STATUS.get(status, f"status {status}")
            ends[end] += 1
            marks = [i for i, line in enumerate(lines) if f" {MARKER}(" in line]
            met = [i for i, line in enumerate(lines) if "(INJECTED)" in line]
            if how != "SIGKILL" and not (len(marks) == 2 and len(met) == 1 and marks[0] < met[0] < marks[1]):
                failures.append(f"{how} at {name}, call {at} of {work.name}: not met ({end})\n{lines}")
            elif what := wrong(how, work, folder, end):
                failures.append(
                    f"{how} at {name}, call {at} of {work.name}: {what}\n{lines[met[0]] if met else ''}"
                )
            shutil.rmtree(folder.parent)
    cases = sum(ends.values())
    told = ", ".join(f"{n} {end}" for end, n in sorted(ends.items()))
    print(f"{how}: {cases - len(failures)} of {cases} cases recover ({total} system calls): {told}")
    assert not failures, "\n".join(failures)
    assert all(ends[end] > cases // 10 for end in ALLOWED[how]), told
