"""A run's screen on a pseudo-terminal: the plot over the bar, in every kind and size of terminal."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.cells import cell_len

from regpt.report.terminal import LEAST_HEIGHT, LEAST_WIDTH

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX's", allow_module_level=True)

import fcntl
import pty
import termios

CHILD = """
import fcntl, struct, sys, termios
from regpt.cli.parse import CommonArgs, Output
from regpt.cli.train import Screen
from regpt.config import Config
flags = {name: True for name in sys.argv[1:] if name in ("json", "quiet")}
screen = Screen(Output(CommonArgs(**flags)), Config(), plot="no_plot" not in sys.argv)
def size(rows, columns):
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
with screen:
    for step in range(1, 41):
        values = {"loss": 4 - step / 20, "tokens_per_second": 1e4, "memory_bytes": 2**30, "total_steps": 40}
        screen.hear("step", step, values | {"elapsed_s": 1.0, "lr": 1e-3})
        if step % 20 == 0:
            screen.hear("eval", step, {"val_loss": 3.0, "val_perplexity": 20.0, "val_bits_per_byte": 1.0, "best": True})
            figures = {"acc": 0.31, "acc_norm": 0.2945, "acc_norm_stderr": 0.00455, "rows": 10042}
            screen.hear("tasks", step, {"tokens": 1, "hellaswag": figures, "lambada": {"acc": 0.5}, "tasks_s": 1.0})
        if screen.bar is not None and hasattr(screen.bar, "bar"):
            if "resized" in sys.argv:
                size(*{10: (30, 60), 20: (10, 20), 30: (40, 120)}.get(step, (40, 120)))
            screen.bar.bar.refresh()
"""
PLAIN = {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}


def on_terminal(*words: str, env: Mapping[str, str] = PLAIN, rows: int = 40, columns: int = 80) -> str:
    """What a screen of 40 steps writes to a terminal of that size."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "FORCE_COLOR")}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *words], stdin=slave, stdout=slave, stderr=slave, env=kept | dict(env)
    )
    os.close(slave)
    read = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the child has closed its end
            break
        if not part:
            break
        read += part
    os.close(master)
    said = read.decode(env.get("PYTHONIOENCODING", "utf-8"))
    assert child.wait() == 0, said
    return said


def cells(said: str) -> list[str]:
    """The lines as they are seen, without colours and movements of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).replace("\r", "\n").splitlines()


def test_a_terminal_shows_the_plot_over_the_bar() -> None:
    said = on_terminal()
    lines = cells(said)
    assert any("training loss 2 " in line and "◆ validation loss 3" in line for line in lines)
    assert any(re.search("[\u2801-\u28ff]", line) for line in lines)
    assert any(line.startswith("training ") and "100%" in line for line in lines)
    assert all(cell_len(line) <= 80 for line in lines)
    assert "\x1b[1;32m◆" in said and "\x1b[2;36m" in said


def test_no_color_is_kept_to() -> None:
    said = on_terminal(env=PLAIN | {"NO_COLOR": "1"})
    assert "◆ validation loss 3" in said and not re.search(r"\x1b\[[0-9;]*3[0-9]m", said)


def test_another_encoding_gets_ascii() -> None:
    said = on_terminal(env=PLAIN | {"PYTHONIOENCODING": "ascii"})
    assert "o validation loss 3" in said and "+----" in said


@pytest.mark.parametrize(
    ("words", "env", "rows", "columns"),
    [
        (["no_plot"], PLAIN, 40, 80),
        (["json"], PLAIN, 40, 80),
        (["quiet"], PLAIN, 40, 80),
        ([], PLAIN | {"TERM": "dumb"}, 40, 80),
        ([], PLAIN, 40, LEAST_WIDTH - 1),
        ([], PLAIN, 2 * LEAST_HEIGHT - 1, 80),
    ],
)
def test_where_there_is_no_plot(words: list[str], env: dict[str, str], rows: int, columns: int) -> None:
    said = on_terminal(*words, env=env, rows=rows, columns=columns)
    assert "training loss" not in said and "└" not in said
    assert ("perplexity" in said) == ("quiet" not in words)


def test_a_terminal_may_change_its_size() -> None:
    """In steps 10 and 20: the frame fits what is there, or is left out, and comes back."""
    lines = cells(on_terminal("resized"))
    floors = {len(line) for line in lines if "└" in line}
    assert max(floors) == 120 and 60 in floors and all(cell_len(line) <= 120 for line in lines)


def test_into_a_file_no_frame_is_drawn(tmp_path: Path) -> None:
    with (tmp_path / "said").open("w") as file:
        subprocess.run([sys.executable, "-c", CHILD], stderr=file, env=os.environ | PLAIN, check=True)
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said.startswith("step      1/40  loss 3.9500") and "\x1b" not in said
    assert "step     20  hellaswag acc_norm 0.2945 ± 0.0046\nstep     20  lambada acc 0.5000\n" in said
