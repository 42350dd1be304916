"""The run directory: everything about one training run in one place, locked while somebody trains there.

run.json        settings, plan, versions, commit, hardware
log.jsonl       one line an event: every number, losses also as float.hex()
samples.jsonl   text generated while training
tokenizer/      what `regpt.tokenizers.load_tokenizer` reads
checkpoints/    step-NNNNNN/ (train/checkpoint.py)
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from regpt import __version__
from regpt.errors import CheckpointError
from regpt.train.durable import SEAL, lock_file, make_folder, replace_file, sealed, sync_folder, unsealed

FORMAT = 1
MOST_STEPS = 2**53  # up to here a float holds every whole number
OURS = {  # every name that may stand in a run before run.json does
    *(".lock", "run.json", ".run.json.tmp", "log.jsonl", "samples.jsonl", "tokenizer", "checkpoints"),
    *("tensorboard", "wandb", "wandb-id.txt", "report.html"),
    *("reproduction.json", "reproduction.md"),
}


class RunDirectory:
    """Names, record and log of the run in `path`. From `open` on it is locked, until `close`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record = path / "run.json"
        self.tokenizer = path / "tokenizer"
        self.checkpoints = path / "checkpoints"
        self.lines, self.samples = JsonLines(path / "log.jsonl"), JsonLines(path / "samples.jsonl")
        self._lock: IO[bytes] | None = None

    @classmethod
    def open(cls, path: Path, *, fresh: bool = False) -> RunDirectory:
        """The run in `path`, created if there is none, and locked against a second trainer.

        Args:
            fresh: move what is there aside, to <name>.previous-<n>, and begin with nothing.

        Raises:
            CheckpointError: `path` is something else than a run, cannot be written, or is in use.
        """
        run, other = cls(path), "--out with another name"
        try:
            if path.exists() and not path.is_dir():
                raise CheckpointError(f"{path} is a file, so it cannot hold a run.", hint=other)
            present = set(os.listdir(path)) if path.exists() else set()
            if not run.begun and present - OURS:
                got = ", ".join(sorted(present - OURS)[:3])
                raise CheckpointError(f"{path} is neither a run nor empty.", got=got, hint=other)
            if fresh and present - {".lock"}:
                run._take_lock()  # is anybody training there?
                run.close()  # Windows does not rename a folder while a file in it is open
                run.set_aside()
            make_folder(path)
            run._take_lock()
        except OSError as e:
            raise CheckpointError(f"the run directory {path} cannot be used: {e.strerror or e}.") from e
        return run

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        # What is already on its way says more than that the log's end could not be written either.
        with contextlib.suppress(*([CheckpointError] if kind else [])):
            self.close()

    @property
    def begun(self) -> bool:
        """Whether a run was begun here."""
        return self.record.exists()

    def read(self) -> dict[str, Any]:
        """What `begin` wrote. Raises CheckpointError where that is missing or not ours."""
        try:
            document = json.loads(self.record.read_bytes())
            if isinstance(document, dict):
                document = unsealed(document, required=False)
        except (OSError, ValueError, RecursionError) as e:
            raise CheckpointError(f"{self.record} cannot be read: {e}.") from None
        if document is None:
            raise CheckpointError(
                f"{self.record} has changed since it was written.",
                hint=f"put it back from a backup; where a person changed it on purpose, take its line {SEAL} out",
            )
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{self.record} is not the record of a run, of format {FORMAT}.")
        return document

    @property
    def config(self) -> dict[str, Any]:
        """The settings that the run had last."""
        config = self.read().get("config")
        if not isinstance(config, dict):
            raise CheckpointError(f"{self.record} has no settings.", got=repr(config))
        return config

    def begin(self, **parts: Mapping[str, Any]) -> None:
        """Write run.json: `parts` (config, plan, facts, machine), versions, when each sitting began."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sittings = self.read().get("sittings", []) if self.begun else []
        versions: dict[str, str | None] = {}
        versions |= {name: importlib.metadata.version(name) for name in ("torch", "numpy", "safetensors")}
        versions |= {"python": platform.python_version(), "platform": platform.platform()}
        versions |= {"regpt": __version__, "commit": _commit()}
        document = {"format": FORMAT, "sittings": [*sittings, now], **parts, "versions": versions}
        try:
            replace_file(self.record, (json.dumps(sealed(_finite(document)), indent=1) + "\n").encode())
        except OSError as e:
            raise CheckpointError(f"{self.record} cannot be written: {e.strerror or e}.") from e

    def log(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """One line for one event, in log.jsonl, or in samples.jsonl if it is a sample.

        A loss is also written exactly, as <name>_hex. What is not finite becomes null, but keeps its hex.
        """
        losses = {k: v for k, v in values.items() if k.endswith("loss") and isinstance(v, float)}
        exact = {f"{name}_hex": value.hex() for name, value in losses.items()}
        lines = self.samples if event == "sample" else self.lines
        lines.append({"event": event, "step": step, **values, **exact})

    def rewind(self, step: int, *, again: Container[str] = ()) -> None:
        """Drop every line of a later step: training goes on from `step` and will write them again.

        Args:
            again: events of `step` itself that will be written again too.
        """
        try:
            self.lines.rewind(step, again)
            self.samples.rewind(step, again)
        except OSError as e:
            raise CheckpointError(f"the log of {self.path} cannot be rewritten: {e.strerror or e}.") from e

    def sync(self) -> None:
        """Make the log durable, or OSError: before a checkpoint is saved, so that no step below it misses its line."""
        for lines in (self.lines, self.samples):
            lines.flush(sync=True)

    def last_saved_step(self) -> int | None:
        """The last checkpoint that the log knows of."""
        return max((e["step"] for e in self.lines.entries() if e.get("event") == "save"), default=None)

    def set_aside(self) -> Path:
        """Rename the whole directory to <name>.previous-<n>, the first number that is free."""
        n = 1
        while (aside := self.path.with_name(f"{self.path.name}.previous-{n}")).exists():
            n += 1
        self.path.rename(aside)
        sync_folder(aside.parent)
        return aside

    def close(self) -> None:
        """Write what is left of the log, and unlock."""
        try:
            self.lines.close()
            self.samples.close()
        finally:
            if self._lock is not None:
                with contextlib.suppress(OSError):
                    self._lock.truncate(
                        0
                    )  # no owner. The file stays: removing it would race with the next one
                self._lock.close()  # which unlocks
                self._lock = None

    def _take_lock(self) -> None:
        path = self.path / ".lock"
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (it stays open while the lock is held)
        taken = lock_file(file)
        owner = _owner(file)
        if taken is None:  # there are no locks here: go by what the file says
            taken = not owner or (owner.get("host") == socket.gethostname() and not _alive(owner.get("pid")))
        if not taken:
            file.close()
            raise CheckpointError(
                f"another process trains in {self.path}: pid {owner.get('pid')} on {owner.get('host')}.",
                hint=f"stop it, or choose another --out; if it is gone for certain, delete {path}",
            )
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        self._lock = file


class JsonLines:
    """An append-only file of JSON objects, one a line. A line torn by a crash is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._unwritten = b""

    def append(self, entry: Mapping[str, Any]) -> None:
        """Write one line. What a full disk does not take is kept, and written with a later one."""
        self._unwritten += (json.dumps(_finite(entry)) + "\n").encode()
        with contextlib.suppress(OSError):
            self.flush()

    def entries(self) -> Iterator[dict[str, Any]]:
        """Every whole line, in order; what is not ours is passed over."""
        return (entry for _, entry in self._parsed())

    def rewind(self, step: int, again: Container[str] = ()) -> None:
        """Drop the entries of later steps, those of `step` whose event is in `again`, and torn lines, in one instant."""
        self.close()
        kept = b"".join(
            line
            for line, entry in self._parsed()
            if entry["step"] < step or (entry["step"] == step and entry.get("event") not in again)
        )
        if self.path.exists() and kept != self.path.read_bytes():
            replace_file(self.path, kept)

    def flush(self, *, sync: bool = False) -> None:
        """Write what is unwritten, and with `sync` wait until it is on the disk."""
        if self._unwritten and self._fd is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
            self._fd = os.open(self.path, flags, 0o644)
            # A line torn by a crash must not run into ours.
            os.ftruncate(self._fd, self.path.read_bytes().rfind(b"\n") + 1)
        while self._unwritten and self._fd is not None:
            self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        if sync and self._fd is not None:
            os.fsync(self._fd)

    def close(self) -> None:
        """Write and sync what is left; CheckpointError where the disk does not take it."""
        try:
            self.flush(sync=True)
        except OSError as e:
            raise CheckpointError(f"the end of {self.path} could not be written: {e.strerror or e}.") from e
        finally:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def _parsed(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        for line in lines:
            if line.endswith(b"\n") and (entry := parse_line(line)) is not None:
                yield line, entry


def parse_line(line: bytes) -> dict[str, Any] | None:
    """A whole line of a log: an object with its step. None where it is torn or not ours."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(entry, dict) and type(entry.get("step")) is int and 0 <= entry["step"] < MOST_STEPS
    return entry if ours else None


def _commit() -> str | None:
    """The git commit of the checkout that this code runs from, with -dirty behind it if files changed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.strip() or None


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity, which JSON lacks."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _owner(file: IO[bytes]) -> dict[str, Any]:
    """Who wrote the lock file; empty where nobody did."""
    file.seek(0)
    try:
        owner = json.loads(file.read(1000))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _alive(pid: object) -> bool:
    """Whether another process has this number. Ours was a dead one's: containers count from 1 again."""
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
