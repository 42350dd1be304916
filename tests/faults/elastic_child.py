"""What torchrun starts in the elastic test: the command line, whose process kills itself in its first lives."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
import rank_child

from regpt.cli import entry

DEATHS = [(1, 3), (0, 6)]  # rank and step of each life's end


if __name__ == "__main__":
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    deaths, *words = sys.argv[1:]
    if life < int(deaths) and DEATHS[life][0] == rank:
        rank_child.plant((rank, DEATHS[life][1], "SIGKILL"), "rows")
    sys.argv[1:] = words
    entry()
