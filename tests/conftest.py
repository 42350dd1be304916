"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of shared texts and checkpoints; tests that need it skip, saying so, where it is not given."""
    folder = os.environ.get("REGPT_TEST_DATA")
    if not folder:
        pytest.skip("REGPT_TEST_DATA is not set: it names the folder with the real texts and checkpoints")
    return Path(folder)
