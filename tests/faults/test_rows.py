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
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rank_child import said, start
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

    chance, done, whole_s = random.Random(kills + world), 0, 0.5
    for life in range(1000):
        processes = start(world, config, "run", (None, 0, "record rows"))
        began = time.monotonic()
        processes[0].join(chance.uniform(0.3, 1.0) * whole_s if done < kills else 90)
        for process in processes:
            process.kill()
            process.join()
        if processes[0].exitcode == 0:
            if done >= kills:
                break
            Path("run").rename(f"early-{life}")  # it was faster than the kill: begin again
            for rank in range(world):
                Path(f"run.rows-{rank}").unlink()
        else:
            assert processes[0].exitcode in (-signal.SIGKILL, 4), said("run", 0)
            done += 1
        whole_s = max(whole_s, time.monotonic() - began)
    assert done >= kills

    seen = effective_rows([Path(f"run.rows-{rank}") for rank in range(world)])
    assert sorted(seen) == list(range(steps))
    place = {tuple(ids[(i + j) % len(ids)] for j in range(block)): i for i in range(len(ids))}
    assert len(place) == len(ids), "two rows of the text are equal"
    rows = [row for step in range(steps) for row in seen[step]]
    assert len(rows) == steps * 8
    for epoch in range(EPOCHS):
        starts = [place[tuple(row)] for row in rows[epoch * windows : (epoch + 1) * windows]]
        inputs = Counter((start + j) % len(ids) for start in starts for j in range(block))
        overlap = windows * block - len(
            ids
        )  # where the block size does not divide the split, one window overlaps
        assert len(inputs) == len(ids), f"epoch {epoch}: {len(ids) - len(inputs)} tokens missed"
        assert sum(n - 1 for n in inputs.values()) == overlap, f"epoch {epoch}: tokens doubled"
    print(f"{done} kills, {EPOCHS} epochs of {windows} rows on {world} ranks: each once")


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
