"""A real, small file system, full at 50 places of a checkpoint: the run goes on, or ends as it should.

In mid-run, after a save has asked for its space and was told that there is enough, a ballast takes all but
`offset` bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import rank_child
from rank_child import SPAWN, said, statuses
from runs import entries, outcome

from regpt.config import Config, EvalConfig, SampleConfig, SaveConfig
from regpt.train.checkpoint import SaveFailed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
DISK_BYTES = 4 << 20  # three checkpoints, the margin that a save asks for, the log, and some more
PAGE = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 4096  # what a tmpfs gives out
OFFSETS = 50
SAVES = [6, 12, 18, 24]
FILLED, FREED = 12, 15  # the save that meets the full disk; the step at which there is space again


# --- the run that meets it -----------------------------------------------------------------------------


def _rank(config: Config, out: str, folder: str, offset: int | None, stays: bool) -> None:
    """The only process of a run whose disk is full for a while, but for `offset` bytes."""
    if offset is not None:
        _fill(Path(folder) / out / "ballast", offset, stays)
    rank_child._rank(0, 1, 0, config, out, folder, None)


def _fill(ballast: Path, offset: int, stays: bool) -> None:
    from regpt.train import checkpoint
    from regpt.train.loop import Trainer

    preflight, train_step, saves = checkpoint.require_space, Trainer.train_step, []

    def require_space(*args: Any) -> None:
        preflight(*args)
        saves.append(args)
        if len(saves) == SAVES.index(FILLED) + 1:
            with open(ballast, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, free(ballast.parent) - offset)
            assert free(ballast.parent) == offset

    def step(self: Trainer) -> None:
        if self.state.step == FREED and not stays:
            saving = self._saving  # a thread that is slow must not find the space again
            if saving is not None and saving._thread is not None:
                saving._thread.join()
            ballast.unlink()
        train_step(self)

    checkpoint.require_space = require_space
    Trainer.train_step = step  # type: ignore[method-assign]


def live(config: Config, out: str, offset: int | None = None, *, stays: bool = False) -> int | None:
    """One process of the run, to its end; its exit status."""
    process = SPAWN.Process(target=_rank, args=(config, out, os.getcwd(), offset, stays))
    process.start()
    return statuses([process])[0]


# --- the disk ------------------------------------------------------------------------------------------


def free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own at `folder`, gone afterwards whatever happens."""
    folder.mkdir(exist_ok=True)
    options = f"size={DISK_BYTES},huge=never"  # pages of one size, so that an offset means what it says
    mount = ["mount", "-t", "tmpfs", "-o", options, "regpt-test", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if made.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {made.stderr.strip()}")
    try:
        yield
    finally:
        if subprocess.run(["umount", str(folder)], capture_output=True).returncode != 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


Disk = Callable[[str], contextlib.AbstractContextManager[None]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """Makes a small disk at a name in the current folder, for a block; needs root."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a file system")
    yield lambda name: small_disk(tmp_path / name)


# --- what it comes to ----------------------------------------------------------------------------------


@dataclass
class Outcome:
    """All that two runs must have in common, and what a full disk may change."""

    same: list[Any]
    saves: list[int]
    notes: list[str]
    names: list[str]


def found_in(out: str) -> Outcome:
    """Every loss to the bit, the samples, the last weights and moments; and what was said and saved on the way."""
    samples = [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]
    return Outcome(
        same=[*outcome(out), [(e["step"], e["text"]) for e in samples]],
        saves=[e["step"] for e in entries(out, "save")],
        notes=[e["text"] for e in entries(out, "note")],
        names=sorted(os.listdir(Path(out) / "checkpoints")),
    )


def checkpoint_bytes(folder: Path) -> int:
    """What a checkpoint takes of a tmpfs: whole pages."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in folder.iterdir())


def spread(last: int) -> list[int]:
    """OFFSETS of them, from 0 to `last`, in whole pages."""
    return [i * last // (OFFSETS - 1) // PAGE * PAGE for i in range(OFFSETS)]


@pytest.fixture
def config(tiny_run: Config) -> Config:
    """Four saves, the text outside of the small disk; evaluations and samples at the saves."""
    train = dataclasses.replace(tiny_run.train, steps=SAVES[-1], batch_tokens=128, threads=1)
    return dataclasses.replace(
        tiny_run,
        train=train,
        eval=EvalConfig(every=SAVES[1]),
        save=SaveConfig(keep=2, every=SAVES[0]),
        sample=SampleConfig(tokens=2),
    )


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, tuple[Outcome, int]]:
    """What a run came to on an empty disk, and the size of its checkpoints: the same for all tests here."""
    return {}


ALL = range(OFFSETS)


@pytest.mark.parametrize(
    ("in_background", "stays", "picked"),
    [
        (True, False, [30]),  # in the optimizer's tensors
        (True, True, [0]),  # no page at all, for the log neither
        (False, False, [49]),  # room for all
        (False, True, [12]),  # in the model's tensors
        pytest.param(True, False, ALL, marks=pytest.mark.slow, id="True-False-all"),
        pytest.param(True, True, ALL, marks=pytest.mark.slow, id="True-True-all"),
        pytest.param(False, False, ALL, marks=pytest.mark.slow, id="False-False-all"),
        pytest.param(False, True, ALL, marks=pytest.mark.slow, id="False-True-all"),
    ],
)
def test_a_disk_that_is_full_in_the_middle_of_a_save(
    config: Config,
    disk: Disk,
    undisturbed: dict[str, tuple[Outcome, int]],
    in_background: bool,
    stays: bool,
    picked: Sequence[int],
) -> None:
    """There is space again three steps later, and the run goes on; or only after its end, and it is continued."""
    config = dataclasses.replace(config, save=dataclasses.replace(config.save, in_background=in_background))
    if not undisturbed:
        with disk("whole"):
            assert live(config, "whole") == 0, said("whole", 0)
            last = Path("whole") / "checkpoints" / f"step-{SAVES[-1]:06d}"
            undisturbed["whole"] = found_in("whole"), checkpoint_bytes(last)
    whole, needed = undisturbed["whole"]
    assert whole.saves == SAVES and whole.notes == []
    offsets = spread(needed + 4 * PAGE)  # the last ones have room for a page of the log, too
    failed = Counter[bool]()
    for offset in (offsets[i] for i in picked):
        with disk(out := f"run-{offset}"):
            checkpoints = Path(out) / "checkpoints"
            if stays:
                assert live(config, out, offset, stays=True) == SaveFailed.exit_status, said(out, 0)
                assert "space" in said(out, 0), said(out, 0)
                fails = not (checkpoints / f"step-{FILLED:06d}").exists()
                kept = [step for step in SAVES if step < FILLED or (step == FILLED and not fails)]
                assert sorted(os.listdir(checkpoints)) == [f"step-{step:06d}" for step in kept], out
                (Path(out) / "ballast").unlink()
                assert live(config, out) == 0, said(out, 0)
                found, saves = found_in(out), SAVES
                assert found.notes == [], out
            else:
                assert live(config, out, offset) == 0, said(out, 0)
                found = found_in(out)
                fails = FILLED not in found.saves
                saves = [step for step in SAVES if not (fails and step == FILLED)]
                assert len(found.notes) == fails, found.notes
                for note in found.notes:
                    assert note.startswith(
                        f"the checkpoint of step {FILLED} could not be written: No space left"
                    )
                    assert "free some space" in note and "training goes on" in note
            assert found.same == whole.same, out
            assert (found.saves, found.names) == (saves, whole.names), out  # so no debris either
        failed[fails] += 1
    n = len(picked)
    print(
        f"{n} of {n} offsets, of up to {offsets[-1]} bytes where a checkpoint needs {needed}: "
        f"{failed[True]} saves failed, {failed[False]} fitted"
    )
    # Within a page or two of its size it is open whether it fits: the log may take one meanwhile.
    assert abs(failed[True] - sum(offsets[i] < needed for i in picked)) <= 1
