"""What idle threads are told, and that it comes before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from regpt.threads import OF_THE_USERS, SPINS

CHILD = """
import os, sys
import regpt
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, f"{SPINS} False"),
        ({"GOMP_SPINCOUNT": "7"}, "7 False"),
        ({"OMP_WAIT_POLICY": "active"}, "None False"),
    ],
)
def test_set_before_torch_unless_the_user_has(given: dict[str, str], expected: str) -> None:
    env = {k: v for k, v in os.environ.items() if k not in OF_THE_USERS} | given
    done = subprocess.run([sys.executable, "-c", CHILD], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
