"""Tasks beside the loss while a model trains: refused or read before it begins, asked of all ranks, said in few numbers.

What a task is and how it is scored stands in `evals/tasks.py`; when it is due, in the loop.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from regpt.config import Config, EvalConfig
from regpt.data.download import Unreachable
from regpt.errors import ConfigError, did_you_mean
from regpt.evals.names import LOSS, TASK_NAMES
from regpt.evals.task import Parts, Task
from regpt.evals.tasks import open_task
from regpt.models import LanguageModel, build_model
from regpt.paths import user_path
from regpt.tokenizers import Tokenizer
from regpt.train.dist import Ranks
from regpt.train.plan import Plan

# Rows of the whole task, and GPT-2 tokens that pass through a model for one of them, all prompts of it; counted, but for
# arc_easy and piqa: those two are estimates. What a plan of time needs to know before a file is there.
SIZES = {
    "hellaswag": (10_042, 334),
    "lambada": (5_153, 86),
    "wikitext": (62, 13_600),
    "arc_easy": (2_376, 60),
    "piqa": (1_838, 60),
}
BYTES_A_TOKEN = 4.4  # of GPT-2's, in such text: as many more tokens has a tokenizer of bytes or characters
FORWARD_SHARE = 1 / 3  # of a training step's arithmetic: the backward pass has twice as much


def task_names(config: EvalConfig) -> list[str]:
    """The tasks that the settings name.

    Raises:
        ConfigError: there is no such task, or it is evaluated anyway.
    """
    if config.tasks is None:
        return []
    names = [name.strip() for name in config.tasks.split(",")]
    for name in names:
        if name == LOSS:
            raise ConfigError(
                f"eval.tasks names {LOSS}, which is evaluated anyway.", hint="--eval.every sets how often"
            )
        if name not in TASK_NAMES:
            raise ConfigError(
                f"eval.tasks names {name!r}, which is no task.{did_you_mean(name, TASK_NAMES)}",
                expected=", ".join(TASK_NAMES),
            )
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class Prepared:
    """A task whose rows are encoded once for a whole run."""

    task: Task
    parts: Parts


def open_tasks(config: EvalConfig, ranks: Ranks, note: Callable[[str], None]) -> list[Task]:
    """The tasks with their rows, the same on all ranks; what must be downloaded is, once on each host.

    Args:
        note: told of a task that is left out: where tasks_required is off and a download fails.

    Raises:
        ConfigError: as `task_names`.
        DataError: a file is missing, damaged or cannot be downloaded.
    """
    names = ranks.together(lambda: task_names(config))
    data = user_path(config.tasks_data) if config.tasks_data is not None else None
    first = ranks.local_rank == 0

    def attempted(name: str) -> Task | str:
        """The task, or why there is none, where that is no reason to stop."""
        try:
            return open_task(name, data, config.tasks_rows)
        except Unreachable as e:
            if config.tasks_required or data is not None:
                raise
            return str(e)

    found = ranks.together(lambda: [attempted(name) for name in names] if first else [])
    wanted = []
    for i, name in enumerate(names):
        reason = found[i] if first and isinstance(found[i], str) else None
        # A host without internet must not stop the others in the middle of a task.
        without = ranks.largest(ranks.rank + 1 if reason is not None else 0)
        if not without:
            wanted.append(name)
        elif ranks.main:
            reason = reason or f"rank {without - 1} could not have its file."
            note(f"{name} is left out (eval.tasks_required=false): {reason}")
    later = ranks.together(
        lambda: [] if first else [open_task(name, data, config.tasks_rows) for name in wanted]
    )
    opened = {task.name: task for task in [*found, *later] if isinstance(task, Task)}
    return [opened[name] for name in wanted]


def prepare_tasks(tasks: Sequence[Task], config: Config, tokenizer: Tokenizer) -> list[Prepared]:
    """The tasks' rows as ids; refused now is what would end a run at its first evaluation.

    Raises:
        DataError: the tokenizer lacks characters of a task, or a continuation is longer than the model's context.
    """
    if not tasks:
        return []
    with torch.device("meta"):  # its shape only
        model = cast(LanguageModel, build_model(config.model, tokenizer.vocab_size))
    prepared = [Prepared(task, task.requests(tokenizer, config.model.block_size)) for task in tasks]
    for p in prepared:
        p.task.check(model, p.parts)
    return prepared


def evaluate_tasks(
    tasks: Sequence[Prepared],
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    device: str,
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
    poll: Callable[[], None],
    ranks: Ranks,
) -> dict[str, dict[str, Any]]:
    """The figures of each task, the same to the bit on any number of ranks: {"hellaswag": {"acc": 0.25, …}}.

    Args:
        poll: called on all ranks equally often, between batches; may raise to stop.
    """
    calls = itertools.count(1)

    def progress(done: int, total: int) -> None:
        # Every rank hears of every batch, its own or not. Asked after each, ranks would wait for one another's.
        if next(calls) % ranks.world == 0:
            poll()

    figures = {}
    for prepared in tasks:
        poll()
        result = prepared.task.evaluate(
            model,
            tokenizer,
            parts=prepared.parts,
            device=device,
            autocast=autocast,
            progress=progress,
            ranks=ranks,
        )
        figures[prepared.task.name] = result.as_dict()
    return figures


def passing_tokens(config: Config, names: Sequence[str]) -> int:
    """About how many tokens pass through the model in one evaluation of these tasks."""
    smaller = BYTES_A_TOKEN if config.tokenizer.name in ("bytes", "chars") else 1.0
    sizes = [SIZES[name] for name in names]
    return round(sum(smaller * tokens * min(rows, config.eval.tasks_rows or rows) for rows, tokens in sizes))


def evaluations(config: EvalConfig, steps: int) -> int:
    """How often the tasks are evaluated in a run of so many steps."""
    return -(-steps // config.tasks_every) if config.tasks_every else 1


def tasks_time_s(config: Config, plan: Plan) -> float | None:
    """About how long all evaluations of tasks of a run take: None where there are none, or its steps' time is unknown."""
    if config.eval.tasks is None or plan.time_s is None:
        return None
    token_s = plan.time_s / plan.total_tokens * FORWARD_SHARE
    return token_s * passing_tokens(config, task_names(config.eval)) * evaluations(config.eval, plan.steps)
