"""The folder beside the one asked for, where work lies until it is done: held against others, and there after a crash.

.NAME.partial/lock            who works here
.NAME.partial/journal.json    how far it is (`regpt.data.journal`); with it, the same work goes on later
.NAME.partial/shards          what becomes NAME in one instant, when all of it is durable
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from regpt.errors import DataError
from regpt.paths import nearest_existing
from regpt.train.durable import lock_file, make_folder, sync_folder

JOURNAL = "journal.json"
SHARDS = "shards"
MORE_SPACE = "free some space, or write into a folder on another disk (--out; regpt train: --data.dir)"


def work_folder(out: Path) -> Path:
    """Where work for `out` lies until it is done."""
    return out.parent / f".{out.name}.partial"


def megabytes(n: float) -> str:
    """Bytes for a person: 0.35 MB, 12 MB, 1,200 MB, 45 GB."""
    return f"{n / 1e9:,.0f} GB" if n >= 1e10 else f"{n / 1e6:,.0f} MB" if n >= 1e7 else f"{n / 1e6:,.2f} MB"


def require_writable(out: Path) -> Path:
    """The folder that `out` is made in, or the nearest above it that is there. Raises DataError where nobody may write."""
    folder = nearest_existing(out)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(f"{out} cannot be made: {folder} is not a folder to write in.", hint="another --out")
    return folder


def require_room(out: Path, needed: int, what: str) -> None:
    """Refuse, before any work, what cannot be written or cannot fit.

    Args:
        needed: bytes, of which those that were written before a crash are there already.
        what: what takes them, for the message.
    """
    needed -= sum(p.stat().st_size for p in (work_folder(out) / SHARDS).glob("*.*"))
    free = shutil.disk_usage(require_writable(out)).free
    if needed > free:
        raise DataError(
            f"disk full: {out} needs about {megabytes(needed)} for {what}.",
            got=f"{megabytes(free)} free",
            hint=MORE_SPACE,
        )


@contextlib.contextmanager
def unfinished(out: Path, *, goes_on: bool = False) -> Iterator[Path]:
    """The folder for work on `out`, held against other processes, to be left by `finish`.

    What is in it stays if the work is stopped or fails after its journal was written, else it goes.

    Args:
        goes_on: whether a journal that lies there is of use; otherwise it is somebody's who may want to go on.

    Raises:
        DataError: another process works there; or for what the disk says.
    """
    work = work_folder(out)
    made_parent = not out.parent.exists()
    kept = False
    try:
        with _locked(work / "lock", out):
            if not goes_on and (work / JOURNAL).exists():
                raise DataError(
                    f"{work} holds a preparation that was stopped.",
                    hint=f"finish it by its own command, delete that folder, or another --out than {out.name}",
                )
            try:
                yield work
            except BaseException:
                kept = (work / JOURNAL).exists()
                raise
            finally:
                if not kept:
                    shutil.rmtree(work, ignore_errors=True)
                    if made_parent and not out.exists():
                        with contextlib.suppress(OSError):  # somebody else's are in it
                            out.parent.rmdir()
    except OSError as e:
        left = f"what was written is in {work}, and the same command goes on from there" if kept else ""
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            left = left or "what was written is removed"
            raise DataError(f"disk full while writing {out}; {left}.", hint=MORE_SPACE) from None
        if e.errno == errno.EFBIG:
            raise DataError(
                f"{out}: this user may not write files so large.", hint="ulimit -f unlimited"
            ) from None
        raise DataError(f"{e.filename or out}: {e.strerror or e}.", hint=left or None) from e


def finish(folder: Path, out: Path) -> None:
    """Make everything in `folder` durable, then give it the name `out`, which must not be there or be empty."""
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    for path in sorted(p for f in folders for p in f.iterdir() if p.is_file()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    for made in reversed(folders):
        sync_folder(made)
    if out.exists():
        out.rmdir()
    os.rename(folder, out)
    sync_folder(out.parent)


def clear(work: Path) -> None:
    """Away with everything in a folder for unfinished work but the lock on it."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def clear_leftovers(out: Path) -> None:
    """Away with the work folder of what is finished: of a process that was killed between the two."""
    work = work_folder(out)
    if work.exists():
        with contextlib.suppress(DataError), _locked(work / "lock", out):
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    """Hold `path` against other processes; the system lets go of it when this one ends, however that comes."""
    while True:
        make_folder(path.parent)
        file = open(path, "a+b", buffering=0)  # noqa: SIM115 (open while the lock is held)
        if lock_file(file) is False:  # where there are no locks we go on without
            file.seek(0)
            pid = file.read(20).decode(errors="replace") or "unknown"
            file.close()
            raise DataError(
                f"{out} is being written by another process, pid {pid}.", hint="wait for it, or stop it"
            )
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its folder was removed by the process that had it, which has finished
    try:
        file.truncate(0)
        file.write(str(os.getpid()).encode())
        yield
    finally:
        file.close()
