"""Writes docs/cli.md from the commands' own help, so that the page cannot drift: `make docs`; a test compares."""

from __future__ import annotations

import contextlib
import io
import os

from regpt.cli import COMMANDS, main, usage
from regpt.cli.bench import BENCHES
from regpt.cli.tokenizer import ACTIONS

WIDTH = "110"


def page() -> str:
    """The whole page, in Markdown."""
    os.environ["COLUMNS"] = WIDTH
    parts = [
        "# The command line\n\nMade from the commands' own help by `make docs`.\n",
        f"```\n{usage()}\n```\n",
    ]
    below = [*(["bench", name] for name in BENCHES), *(["tokenizer", name] for name in ACTIONS)]
    for words in (found for name in COMMANDS for found in [[name], *(b for b in below if b[0] == name)]):
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*words, "--help"])
        parts.append(f"## regpt {' '.join(words)}\n\n```\n{_plain(text.getvalue())}\n```\n")
    return "\n".join(parts)


def _plain(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


if __name__ == "__main__":
    print(page(), end="")
