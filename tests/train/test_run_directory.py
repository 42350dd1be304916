"""The run directory: one trainer at a time, a log that survives what happens to it, a record that explains itself."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import regpt
from regpt.errors import CheckpointError, Interrupted
from regpt.train import run as run_module
from regpt.train.run import JsonLines, RunDirectory

PARTS: dict[str, Any] = {
    "config": {"seed": 1},
    "plan": {"steps": 2},
    "facts": {},
    "machine": {"device": "cpu"},
}
HOLD = """
import sys
from pathlib import Path
from regpt.train.run import RunDirectory
run = RunDirectory.open(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "läufe hier" / "first run"


def start_holder(out: Path) -> subprocess.Popen[str]:
    """Another process that has the run open until its standard input is closed or it is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
    return holder


def end(holder: subprocess.Popen[str]) -> None:
    with holder:
        holder.kill()


# --- opening and locking -----------------------------------------------------------------------------------------


def test_a_run_is_created_and_found_again(out: Path) -> None:
    with RunDirectory.open(out) as run:
        assert not run.begun
        run.begin(**PARTS)
        assert run.begun
    with RunDirectory.open(out) as run:
        assert run.begun and run.config == {"seed": 1}
        run.begin(**PARTS)
        assert len(run.read()["sittings"]) == 2


def test_a_second_trainer_is_refused_by_name(out: Path) -> None:
    holder = start_holder(out)
    try:
        with pytest.raises(CheckpointError) as caught:
            RunDirectory.open(out)
        with pytest.raises(CheckpointError, match="another process trains"):
            RunDirectory.open(out, fresh=True)
    finally:
        end(holder)
    message = str(caught.value)
    assert f"pid {holder.pid} on {socket.gethostname()}" in message and str(out) in message
    assert "another --out" in message
    RunDirectory.open(out).close()  # the dead one holds nothing


def test_the_same_process_cannot_open_a_run_twice(out: Path) -> None:
    with RunDirectory.open(out), pytest.raises(CheckpointError, match=f"pid {os.getpid()} on"):
        RunDirectory.open(out)
    RunDirectory.open(out).close()


def test_a_run_can_be_read_while_it_is_locked(out: Path) -> None:
    with RunDirectory.open(out) as run:
        run.begin(**PARTS)
        assert RunDirectory(out).config == {"seed": 1}


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({}, True),
        ({"pid": 2**22 + 1, "host": socket.gethostname()}, True),
        ({"pid": os.getpid(), "host": socket.gethostname()}, True),  # a container's dead predecessor
        ({"pid": os.getppid(), "host": socket.gethostname()}, False),
        ({"pid": 1, "host": "elsewhere"}, False),
        ("not an owner", True),
    ],
)
def test_without_locks_the_file_says_who(
    out: Path, owner: object, free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no locks; then a process that is known to be dead frees the run."""
    monkeypatch.setattr(run_module, "lock_file", lambda _: None)
    out.mkdir(parents=True)
    (out / ".lock").write_text(json.dumps(owner) if owner else "")
    if free:
        with RunDirectory.open(out):
            assert json.loads((out / ".lock").read_text())["pid"] == os.getpid()
        assert (out / ".lock").read_text() == ""
    else:
        assert isinstance(owner, dict)
        with pytest.raises(CheckpointError, match=f"pid {owner['pid']} on {owner['host']}") as caught:
            RunDirectory.open(out)
        assert f"delete {out / '.lock'}" in str(caught.value)


def test_a_file_system_without_locks_is_recognised(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with RunDirectory.open(out) as run:
        assert run.path == out


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(CheckpointError, match=r"is neither a run nor empty.\n  got: thesis.tex"):
            RunDirectory.open(tmp_path, fresh=fresh)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(CheckpointError, match="is a file"):
        RunDirectory.open(tmp_path / "thesis.tex")


def test_a_folder_that_cannot_be_written_is_said(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(folder: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(run_module, "make_folder", read_only)
    with pytest.raises(CheckpointError, match="cannot be used: Read-only file system"):
        RunDirectory.open(out)


def test_a_link_to_a_run_is_that_run(out: Path, tmp_path: Path) -> None:
    with RunDirectory.open(out) as run:
        run.begin(**PARTS)
    (tmp_path / "link").symlink_to(out)
    with RunDirectory.open(tmp_path / "link") as run, pytest.raises(CheckpointError, match="another process"):
        assert run.begun
        RunDirectory.open(out)


def test_fresh_moves_the_old_run_aside(out: Path) -> None:
    for n in range(3):
        with RunDirectory.open(out, fresh=True) as run:
            assert not run.begun
            run.begin(**PARTS | {"config": {"seed": n}})
    names = sorted(p.name for p in out.parent.iterdir())
    assert names == ["first run", "first run.previous-1", "first run.previous-2"]
    assert [RunDirectory(out.parent / name).config["seed"] for name in names] == [2, 0, 1]


# --- run.json ----------------------------------------------------------------------------------------------------


def test_the_record_says_what_ran_where(out: Path) -> None:
    with RunDirectory.open(out) as run:
        run.begin(**PARTS | {"plan": {"epochs": math.inf}})
        record = json.loads((out / "run.json").read_text())
    assert record["machine"] == {"device": "cpu"} and record["plan"] == {"epochs": None}
    assert record["versions"]["regpt"] == regpt.__version__
    assert record["versions"]["python"] == sys.version.split()[0]
    assert record["versions"]["torch"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 2}', "\0" * 100])
def test_a_damaged_record_is_said(out: Path, text: str) -> None:
    out.mkdir(parents=True)
    (out / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run.json"):
        RunDirectory(out).read()


def test_the_commit_is_that_of_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if subprocess.run(["git", "--version"], capture_output=True, check=False).returncode:
        pytest.skip("git is not installed")
    code = tmp_path / "src" / "regpt" / "train" / "run.py"
    code.parent.mkdir(parents=True)
    code.write_text("x")
    monkeypatch.setattr(run_module, "__file__", str(code))
    assert run_module._commit() is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x", "--no-gpg-sign"]):
        subprocess.run([*git, *words], check=True)
    clean = run_module._commit()
    assert clean is not None and len(clean) == 40
    code.write_text("y")
    assert run_module._commit() == f"{clean}-dirty"


# --- the log -----------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_losses_are_logged_exactly_and_samples_apart(out: Path) -> None:
    with RunDirectory.open(out) as run:
        run.log("step", 1, {"loss": 0.1 + 0.2, "lr": 0.001})
        run.log("eval", 1, {"val_loss": math.nan, "best": False})
        run.log("sample", 1, {"prompt": "\n", "text": "to be\u2028é"})
    step, evaluation = lines(out / "log.jsonl")
    assert step == {"event": "step", "step": 1, "loss": 0.1 + 0.2, "lr": 0.001, "loss_hex": (0.1 + 0.2).hex()}
    assert float.fromhex(step["loss_hex"]) == 0.1 + 0.2
    assert evaluation["val_loss"] is None and evaluation["val_loss_hex"] == "nan"
    assert lines(out / "samples.jsonl") == [
        {"event": "sample", "step": 1, "prompt": "\n", "text": "to be\u2028é"}
    ]


def test_a_line_torn_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [e["step"] for e in JsonLines(path).entries()] == [1]
    log = JsonLines(path)
    log.append({"step": 2})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_rewinding_drops_later_steps_and_rubbish(out: Path) -> None:
    with RunDirectory.open(out) as run:
        for step in (1, 2, 3, 4):
            run.log("step", step, {"loss": float(step)})
            run.log("sample", step, {"prompt": "", "text": str(step)})
        run.log("save", 2, {})
        run.sync()
        with open(out / "log.jsonl", "ab") as file:
            file.write(b'\0\0\0\n[1]\n{"step": "x"}\n{"step": 1')
        run.rewind(2)
        run.log("step", 3, {"loss": 3.5})
        assert run.last_saved_step() == 2
    assert [(e["event"], e["step"]) for e in lines(out / "log.jsonl")] == [
        ("step", 1),
        ("step", 2),
        ("save", 2),
        ("step", 3),
    ]
    assert [e["step"] for e in lines(out / "samples.jsonl")] == [1, 2]


def test_rewinding_also_drops_what_will_be_done_again(out: Path) -> None:
    """A checkpoint of the very step may be of before the evaluation that the log already has."""
    with RunDirectory.open(out) as run:
        for event in ("step", "eval", "save", "sample"):
            run.log(event, 4, {})
        run.rewind(4, again=["eval", "sample"])
        assert [e["event"] for e in run.lines.entries()] == ["step", "save"]
        assert list(run.samples.entries()) == []
        run.rewind(4)
        assert [e["event"] for e in run.lines.entries()] == ["step", "save"]


def test_rewinding_a_whole_log_does_not_rewrite_it(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    inode = path.stat().st_ino
    JsonLines(path).rewind(2)
    assert path.stat().st_ino == inode
    JsonLines(tmp_path / "none").rewind(2)
    assert os.listdir(tmp_path) == ["log.jsonl"]


def test_no_save_was_logged(out: Path) -> None:
    with RunDirectory.open(out) as run:
        assert run.last_saved_step() is None
        run.log("step", 1, {})
        assert run.last_saved_step() is None


def test_a_full_disk_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the disk does not take, or takes half of, is written when there is space again."""
    room, real = [20], os.write

    def write(fd: int, data: bytes) -> int:
        taken = min(len(data), room[0])
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
        room[0] -= taken
        return real(fd, data[:taken])

    monkeypatch.setattr(os, "write", write)
    log = JsonLines(tmp_path / "log.jsonl")
    for step in range(5):
        log.append({"step": step})
    assert (tmp_path / "log.jsonl").stat().st_size == 20
    room[0] = 10_000
    log.append({"step": 5})
    log.close()
    assert [e["step"] for e in lines(tmp_path / "log.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_a_disk_that_stays_full_is_said_at_the_end(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = RunDirectory.open(out)
    monkeypatch.setattr(os, "write", full)
    run.log("step", 1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        run.sync()
    with pytest.raises(CheckpointError, match=r"the end of .*log.jsonl could not be written: No space left"):
        run.close()
    monkeypatch.undo()
    RunDirectory.open(out).close()  # and the lock is free all the same


def test_a_log_that_cannot_be_ended_hides_no_other_error(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Interrupted, match="stopped"), RunDirectory.open(out) as run:
        monkeypatch.setattr(os, "write", full)
        run.log("step", 1, {"loss": 1.0})
        raise Interrupted("stopped")


def test_the_run_directory_needs_no_torch() -> None:
    code = "import sys, regpt.train.run, regpt.train.track; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_record_that_changed_is_refused(out: Path) -> None:
    """One bit; and a person who changes it on purpose is told how."""
    with RunDirectory.open(out) as run:
        run.begin(config={"seed": 1}, plan={"steps": 5})
    text = run.record.read_text()
    run.record.write_text(text.replace('"steps": 5', '"steps": 7'))
    with pytest.raises(
        CheckpointError, match=r"run.json has changed since it was written(.|\n)*take its line xxh3_128 out"
    ):
        run.read()
    lines = [line for line in text.replace('"steps": 5', '"steps": 7').splitlines() if "xxh3_128" not in line]
    run.record.write_text("\n".join(lines).replace("},\n}", "}\n}"))
    assert run.read()["plan"] == {"steps": 7}
