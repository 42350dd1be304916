"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """`text` with ~ and ~name opened; of a name that nobody here has it stays, where `Path.expanduser` raises."""
    return Path(os.path.expanduser(text))
