"""Paths as people write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | Path) -> Path:
    """`text` with ~ and ~name opened; of a name that nobody here has it stays, where `Path.expanduser` raises."""
    return Path(os.path.expanduser(text))


def nearest_existing(path: Path) -> Path:
    """`path` itself, or the first folder above it that is there: what decides about room and rights."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())
