"""Idle threads of arithmetic sleep soon instead of spinning, so that training bears with a machine that does other work too.

Linux builds of PyTorch use GNU OpenMP, whose threads wait for each other in a loop of 300,000 turns before they sleep. Where
another program wants a core, the threads that spin keep it from the one they wait for.
"""

from __future__ import annotations

import os

SPINS = 1000
OF_THE_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # who has set one of these means it


def rest_soon() -> None:
    """Set it for this process and its children; without effect once torch is loaded."""
    if not any(name in os.environ for name in OF_THE_USERS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
