"""Idle threads of arithmetic sleep soon instead of spinning, so that training bears with a machine that does other work too.

Linux builds of PyTorch use GNU OpenMP, whose threads wait for each other in a loop of 300,000 turns before they sleep. Where
another program wants a core, the threads that spin keep it from the one they wait for. Measured on two cores, a step of
modern-char with so many turns, alone and beside two busy programs: 300,000 45 to 62 and 219 ms; 100,000 45 to 57 and 134;
30,000 46 to 47 and 125; 10,000 48 to 50 and 133; 1,000 52 to 58 and 192. Beside eight programs 30,000 was not tried; 300,000
took 1.7 to 6.5 s, 10,000 and 1,000 0.3 to 1.2.
"""

from __future__ import annotations

import os

SPINS = 30_000
OF_THE_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # who has set one of these means it


def rest_soon() -> None:
    """Set it for this process and its children; without effect once torch is loaded."""
    if not any(name in os.environ for name in OF_THE_USERS):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)
