"""Hours of everything at once: runs that are killed, stopped, frozen, damaged and refused the disk, on changing worlds.

    python tests/faults/soak.py --hours 6

Every run must end, by the same command given again and again and nothing else, with the bits of one that nobody touched.
The last line says how long it was, and how much of what it met; the exit status is 1 if a run differed or got stuck.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "faults"), str(TESTS / "train")]
from rank_child import said, start, statuses, train  # noqa: E402 (the path is set above)
from runs import debris, exact, outcome  # noqa: E402

from regpt.config import Config, EvalConfig, SampleConfig  # noqa: E402
from tiny import tiny_config  # noqa: E402

LIVES = 60  # more than any run of these needs
FAULTS = ("kill", "kill", "signal", "planted", "frozen", "bit", "torn log", "full", "stale temporary")
DAMAGE = ("bit", "torn log", "stale temporary")
PLACES = (
    "step",
    "backward",
    "update",
    "evaluation",
    "sample",
    "save",
    "writing",
    "pruning",
    "saved",
    "start",
)


def main() -> int:
    """Runs until the time is up."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    arguments.add_argument("--hours", type=float, default=6.0)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    chance, met, runs = random.Random(options.seed), Counter[str](), 0
    began = told = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="regpt-soak-") as folder:
        os.chdir(folder)
        Path("text.txt").write_text("".join(f"{i} little ducks went out one day. " for i in range(900)))
        config = _config()
        assert train(1, config, "whole") == [0], said("whole", 0)
        expected = outcome("whole")
        while (hours := (time.monotonic() - began) / 3600) < options.hours:
            out = f"run-{runs}"
            _one(config, out, chance, met)
            runs += 1
            if outcome(out) != expected or [n for n in debris(out) if not n.startswith("corrupt-")]:
                kept = Path(
                    shutil.copytree(out, Path(tempfile.gettempdir()) / f"soak-{out}", dirs_exist_ok=True)
                )
                print(f"{out} differs; it is kept in {kept}; {_table(met)}")
                return 1
            shutil.rmtree(out)
            if time.monotonic() - told > 300:
                told = time.monotonic()
                print(f"{hours:.2f} h: {runs} runs equal to the bit; {_table(met)}", flush=True)
    print(f"{hours:.2f} hours, {runs} of {runs} runs equal to the bit, no manual action: {_table(met)}")
    return 0


def _config() -> Config:
    config = dataclasses.replace(tiny_config(), eval=EvalConfig(every=10), sample=SampleConfig(tokens=3))
    return exact(config, steps=40)


def _one(config: Config, out: str, chance: random.Random, met: Counter[str]) -> None:
    """One run, from its beginning to its end, whatever happens."""
    for life in range(LIVES):
        world = chance.choice((1, 1, 2, 4))
        what = chance.choice(FAULTS) if life < LIVES // 2 else "none"
        rank, step = chance.randrange(world), chance.randrange(40)
        fault = None
        if what == "signal":
            name = chance.choice(("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"))
            fault = (rank, step, f"{name} in {chance.choice(PLACES)}")
        elif what == "planted" or what in DAMAGE:  # damage befalls what a dead process left
            fault = (rank, step, f"SIGKILL in {chance.choice(PLACES)}")
        elif what == "full":
            fault = (0, step, "no space")
        processes = start(world, config, out, fault)
        if what in ("kill", "frozen"):
            processes[0].join(chance.uniform(0.2, 2.5))
            victim = processes[rank]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            if what == "frozen":  # now and then so long that the others give it up
                for process in processes[:rank] + processes[rank + 1 :]:
                    process.join(chance.choice((0.5, 2.0, 40.0)) if world > 1 else 0)
                    break
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGCONT)
        ended = statuses(processes)
        if ended == [0] * world:
            met["full" if what == "full" else "nothing"] += 1  # what was planted was never come to
            return
        allowed = {
            0,
            2,
            4,
            -signal.SIGKILL,
            *(128 + s for s in (1, 2, 10, 15)),
            *(-s for s in (1, 2, 10, 15)),
        }
        if not set(ended) <= allowed or (2 in ended and what != "full"):
            raise SystemExit(f"{out}: {what} {fault}, statuses {ended}: {said(out, 0)}")
        met[what] += 1
        if what in DAMAGE and not _damage(out, what, chance):
            met[what] -= 1
    raise SystemExit(f"{out} did not end in {LIVES} lives: {said(out, 0)}")


def _damage(out: str, what: str, chance: random.Random) -> bool:
    """What may befall files while nobody trains; a run recovers from it alone as long as one checkpoint is whole.

    False: there was nothing yet to be damaged.
    """
    saved = sorted((Path(out) / "checkpoints").glob("step-*"))
    if what == "bit" and len(saved) > 1:
        file = chance.choice(sorted(saved[-1].iterdir()))
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    elif what == "torn log" and (log := Path(out) / "log.jsonl").exists():
        with open(log, "ab") as opened:
            opened.write(b'{"event": "step", "st')
    elif what == "stale temporary" and saved:
        shutil.copytree(saved[-1], saved[-1].with_name(".tmp-step-000099-1"), dirs_exist_ok=True)
    else:
        return False
    return True


def _table(met: Counter[str]) -> str:
    return ", ".join(f"{what} {n}" for what, n in sorted(met.items()))


if __name__ == "__main__":
    sys.exit(main())
