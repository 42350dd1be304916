"""The documents say what is true: the command line's page, the presets, the settings and files that they name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from regpt import __version__
from regpt.cli import COMMANDS
from regpt.cli.parse import options
from regpt.cli.train import Args
from regpt.config import preset_names

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_command_lines_page_is_current() -> None:
    """docs/cli.md is what `make docs` writes."""
    made = subprocess.run(
        [sys.executable, "-m", "regpt.cli.reference"], capture_output=True, text=True, check=True
    )
    assert made.stdout == (ROOT / "docs/cli.md").read_text(encoding="utf-8"), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_settings_and_presets_in_the_text_exist(page: Path) -> None:
    if page.name == "cli.md":
        return
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"(?:^|`|bin/)regpt ([a-z]+)", text, flags=re.M):
        assert command in COMMANDS, f"{page.name} speaks of `regpt {command}`"
    known = options(Args)
    for setting in re.findall(r"(--[a-z]+\.[a-z-]+)", text):
        assert setting in known, f"{page.name} speaks of {setting}"
    for preset in re.findall(r"regpt (?:train|plan|presets) ([a-z0-9][a-z0-9-]+)", text):
        assert preset in preset_names(), f"{page.name} speaks of the preset {preset}"
    for path in re.findall(r"`((?:src|docs|tests|benchmarks)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{page.name} speaks of {path}"


def test_every_command_and_preset_is_in_the_documents() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert not [c for c in COMMANDS if f"regpt {c}" not in text]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [p for p in ("demo", "shakespeare-char", "shakespeare-char-cpu") if p not in readme]


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## Unreleased" in text or f"## {__version__}" in text


def test_nothing_of_this_machine_is_written_down() -> None:
    """No absolute path of whoever works on this, in any tracked file."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    private = [f"{place}/" for place in (Path.home(), ROOT) if len(place.parts) > 2]
    for name in files.stdout.splitlines():
        path = ROOT / name
        if path.is_file():
            text = path.read_text(encoding="utf-8", errors="ignore")
            assert not [p for p in private if p in text], name


def test_every_makefile_goal_uses_files_that_exist() -> None:
    for path in re.findall(r"(?:benchmarks|src|tests)/[\w/]+\.py", (ROOT / "Makefile").read_text()):
        assert (ROOT / path).exists(), path
