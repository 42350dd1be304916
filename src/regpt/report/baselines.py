"""Which published figures may stand as lines in a run's charts: those of the same text and tokens, counted the same way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from regpt.config import TokenizerConfig, load_preset
from regpt.evals.published import Published, figures
from regpt.report.history import History

NEAR = 2.0  # a model more than so many times larger or smaller says little beside the run
AT_MOST = 3  # lines in one chart: more hide the curve


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A published figure, drawn as a dashed line."""

    label: str
    value: float
    source: str


def loss_baselines(histories: Sequence[History]) -> list[Baseline]:
    """Losses per token of the text that all these runs are held against, in the same tokens."""
    found = [f for f in figures("loss") if f.figure == "nats" and all(_same_text(f, h) for h in histories)]
    return _lines(found, histories)


def task_baselines(histories: Sequence[History], task: str, figure: str) -> list[Baseline]:
    """Scores of one task by the same figure on no fewer rows, of models of about the runs' size."""
    rows = min((h.rows[task] for h in histories if task in h.rows), default=0)
    return _lines([f for f in figures(task) if f.figure == figure and rows >= (f.rows or 0)], histories)


def _same_text(f: Published, history: History) -> bool:
    """Whether a loss per token of this run is of the text and tokens of the figure."""
    config = history.part("config")
    source, tokenizer = config.get("data"), config.get("tokenizer")
    if not isinstance(source, dict) or not isinstance(tokenizer, dict) or f.corpus is None:
        return False
    named = {source.get("source"), history.part("facts").get("corpus")}
    theirs = _tokenizer(f.presets[0]) if f.presets else TokenizerConfig()
    same = tokenizer.get("name") == theirs.name and tokenizer.get("vocab_size") == theirs.vocab_size
    return f.corpus in named and same


@cache
def _tokenizer(preset: str) -> TokenizerConfig:
    return load_preset(preset).config.tokenizer


def _lines(found: Sequence[Published], histories: Sequence[History]) -> list[Baseline]:
    """The trusted ones of about the runs' size, GPT-2 and GPT-3 before reproductions; of one model the first."""
    sizes = [n for h in histories if isinstance(n := h.part("plan").get("parameters"), int) and n > 0]
    near = [
        f
        for f in found
        if f.trusted and any(abs(math.log(f.parameters / n)) <= math.log(NEAR) for n in sizes)
    ]
    of_model = {f.model: f for f in reversed(near)}
    kept = sorted(of_model.values(), key=lambda f: (not f.model.startswith("GPT-"), near.index(f)))[:AT_MOST]
    return [Baseline(label=f.model, value=f.value, source=_with_caveat(f)) for f in kept]


def _with_caveat(f: Published) -> str:
    return f"{f.source} ({f.caveat})" if f.caveat else f.source
