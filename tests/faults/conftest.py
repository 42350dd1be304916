"""Faults are planted by the same forked processes as the tests of several ranks."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
