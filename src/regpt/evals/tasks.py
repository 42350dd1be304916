"""The tasks by their names: where each is defined, and what opens it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from regpt.errors import ConfigError, did_you_mean
from regpt.evals.choices import ARC_EASY, HELLASWAG, PIQA, open_arc_easy, open_hellaswag, open_piqa
from regpt.evals.figures import Figure as Figure
from regpt.evals.figures import TaskResult as TaskResult
from regpt.evals.files import Files
from regpt.evals.lambada import LAMBADA, open_lambada
from regpt.evals.names import LOSS, TASK_NAMES
from regpt.evals.task import Task as Task
from regpt.evals.wikitext import WIKITEXT, open_wikitext
from regpt.paths import user_path


@dataclass(frozen=True, kw_only=True)
class Named:
    """A task that can be asked for by name."""

    open: Callable[[Path | None, int | None], Task]
    files: Files


TASKS = {
    "wikitext": Named(open=open_wikitext, files=WIKITEXT),
    "lambada": Named(open=open_lambada, files=LAMBADA),
    "hellaswag": Named(open=open_hellaswag, files=HELLASWAG),
    "arc_easy": Named(open=open_arc_easy, files=ARC_EASY),
    "piqa": Named(open=open_piqa, files=PIQA),
}

assert set(TASKS) == set(TASK_NAMES)


def open_task(name: str, data: Path | None = None, rows: int | None = None) -> Task:
    """The task of that name, its rows read and checked.

    Args:
        data: its file, or a folder with the files of several tasks; None: downloaded once into regpt's cache.
        rows: the first so many only; None: all.

    Raises:
        ConfigError: there is no such task, or `rows` is no number of rows.
        DataError: its file is missing, empty or damaged, or a row lacks a field.
    """
    if name not in TASKS:
        raise ConfigError(
            f"there is no task {name!r}.{did_you_mean(name, TASKS)}", expected=", ".join([LOSS, *TASKS])
        )
    if rows is not None and rows < 1:
        raise ConfigError("--rows is out of range.", got=rows, expected="1 or more")
    return TASKS[name].open(user_path(str(data)) if data is not None else None, rows)
