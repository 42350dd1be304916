"""Three epochs of a run that is killed twenty times: every token is an input exactly once an epoch, none twice, none never.

Counted from what the batches held, not from what the loader says of itself: the text has no two equal rows, so a row's place
in the split is found by its content.
"""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rank_child import said, start, statuses
from runs import exact

from regpt.config import Config, EvalConfig, SampleConfig, SaveConfig
from regpt.data.corpus import corpus

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks processes")
EPOCHS = 3


@pytest.mark.parametrize(
    ("world", "kills"),
    [(1, 5), pytest.param(1, 20, marks=pytest.mark.slow), pytest.param(2, 20, marks=pytest.mark.slow)],
)
def test_each_row_exactly_once_an_epoch(tiny_run: Config, world: int, kills: int) -> None:
    block = tiny_run.model.block_size
    # 8 characters a number: any 32 in a row tell where they stand. A hundred windows and some.
    Path("text.txt").write_text("".join(f"{i * 7919 % 10**8:08d}" for i in range(block * 16)))
    config = exact(tiny_run, steps=1, batch_tokens=8 * block)
    config = dataclasses.replace(
        config, eval=EvalConfig(every=None), sample=SampleConfig(tokens=0), save=SaveConfig(every=3)
    )
    split = corpus(config)[1].split("train")
    ids = split.rows(np.array([0]), split.n_tokens)[0].tolist()
    windows = -(-split.n_tokens // block)
    steps = -(-EPOCHS * windows // 8)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))

    # Each life ends a few steps on, in the middle of something; the last one is let alone.
    chance = random.Random(kills + world)
    ends = sorted(chance.sample(range(1, steps - 3), kills))
    for end in ends:
        where = chance.choice(("step", "backward", "update", "save", "writing", "saved"))
        ended = statuses(start(world, config, "run", (None, end, f"record rows, then SIGKILL in {where}")))
        assert -signal.SIGKILL in ended and set(ended) <= {-signal.SIGKILL, 4}, said("run", 0)
    assert statuses(start(world, config, "run", (None, 0, "record rows"))) == [0] * world, said("run", 0)
    begins = {steps[0] for rank in range(world) for steps in sittings(Path(f"run.rows-{rank}")) if steps}
    assert len(begins) > kills / 4, "lives began nearly all at the same step"

    seen = effective_rows([Path(f"run.rows-{rank}") for rank in range(world)])
    assert sorted(seen) == list(range(steps))
    place = {tuple(ids[(i + j) % len(ids)] for j in range(block)): i for i in range(len(ids))}
    assert len(place) == len(ids), "two rows of the text are equal"
    rows = [row for step in range(steps) for row in seen[step]]
    assert len(rows) == steps * 8
    for epoch in range(EPOCHS):
        starts = [place[tuple(row)] for row in rows[epoch * windows : (epoch + 1) * windows]]
        inputs = Counter((start + j) % len(ids) for start in starts for j in range(block))
        # Where the block size does not divide the split, one window overlaps another.
        overlap = windows * block - len(ids)
        assert len(inputs) == len(ids), f"epoch {epoch}: {len(ids) - len(inputs)} tokens missed"
        assert sum(n - 1 for n in inputs.values()) == overlap, f"epoch {epoch}: tokens doubled"
    print(f"{kills} kills, {EPOCHS} epochs of {windows} rows on {world} ranks: each once")


def sittings(file: Path) -> list[list[int]]:
    """The steps of each process that wrote into the file."""
    found: list[list[int]] = []
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        if entry == "begin":
            found.append([])
        else:
            found[-1].append(entry["step"])
    return found


def effective_rows(files: Sequence[Path]) -> dict[int, list[list[int]]]:
    """Step to the rows of its global batch, of the updates that stayed: a sitting replaces what came after its beginning."""
    seen: dict[int, list[list[int]]] = {}
    for file in files:  # of one rank each
        own: dict[int, list[list[int]]] = {}
        begins = True
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            if entry == "begin":
                begins = True
                continue
            if begins:
                own = {step: rows for step, rows in own.items() if step < entry["step"]}
                begins = False
            own.setdefault(entry["step"], []).extend(entry["rows"])
        for step, rows in own.items():
            seen.setdefault(step, []).extend(rows)
    return seen
