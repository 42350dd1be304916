"""What others have published, each figure with its source and what stands against comparing it: read from published.toml.

A loss is comparable on the same text, in the same tokens; a share of right answers on the same rows, by the same rule. So
every entry says which text, which rule, and how sure it is. No torch here: reports and the command line read this alone.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from regpt.config import build
from regpt.evals.names import LOSS

Standing = Literal["published", "measured", "unsupported", "contaminated"]
"""Published by its authors; measured by us; claimed with nothing behind it; of text that the model had seen."""
GPT2 = ("GPT-2 124M", "GPT-2 355M", "GPT-2 774M", "GPT-2 1558M")
"""OpenAI's own four."""
SHARES = {"acc", "acc_norm", "acc_norm_tokens", "acc_bytes"}
"""Figures that are a share of right answers."""
LOWER_IS_BETTER = {
    "nats",
    "bits_per_byte",
    "perplexity",
    "word_perplexity",
    "byte_perplexity",
    "word_perplexity_strided",
    "token_perplexity",  # which nothing of ours gives: GPT-2's paper has it
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One figure."""

    model: str
    parameters: int
    task: str
    """As `regpt eval --tasks` takes it."""
    figure: str
    """As `regpt eval --json` names it; of a loss `nats`."""
    value: float
    data: str
    """Which text, and which split of it."""
    source: str
    """A citation: file, address, table."""
    method: str
    """How it was scored."""
    caveat: str = ""
    """What stands against comparing it, or explains a difference, where something does."""
    comparable: bool = True
    """False: scored by another rule than ours, which the caveat names; no difference is judged."""
    standing: Standing = "published"
    corpus: str | None = None
    """Of a loss, the named set (data.source) that the text belongs to."""
    tokenizer: str | None = None
    """Of a loss, what its tokens are: gpt2, chars, bytes, or bpe of so many ids (`compare.tokens_of`)."""
    held_out: str | None = None
    """Of a loss, the held-out part: a share, or a split's name (`compare.held_out`). None: not one that we can draw; the
    caveat says so."""
    context: int | None = None
    """Of a loss over a whole split, the tokens in a window; windows follow end to end."""
    tokens: int | None = None
    """That the model was trained on."""
    rows: int | None = None
    """That were scored."""
    stderr: float | None = None
    """Of the published value; of a share of right answers it follows from the rows."""
    runs: int = 1
    """That the value is the mean or the median of."""
    seed_sd: float | None = None
    """The standard deviation of runs that differ in nothing but the seed."""
    seeds: str = ""
    """Which runs those were."""
    presets: tuple[str, ...] = ()
    """That reproduce it, or should stand beside it."""

    @property
    def error(self) -> float | None:
        """The standard error of the value, as published or as of so many independent rows."""
        if self.stderr is None and self.figure in SHARES and self.rows:
            return math.sqrt(self.value * (1 - self.value) / self.rows)
        return self.stderr

    @property
    def trusted(self) -> bool:
        """Whether something stands behind it."""
        return self.standing in ("published", "measured")


def figures(task: str | None = None) -> list[Published]:
    """Every published figure, or those of one task, in the order of the file."""
    return [f for f in _all() if task in (None, f.task)]


def of_preset(preset: str) -> list[Published]:
    """The figures to set beside a run of a preset."""
    return [f for f in _all() if preset in f.presets]


def tasks_of(preset: str) -> list[str]:
    """The tasks that a preset has figures for, `loss` first."""
    return list(dict.fromkeys([LOSS, *(f.task for f in of_preset(preset))]))


def nearest_gpt2(parameters: int) -> str:
    """Of GPT-2's four sizes the one nearest by ratio, by its name here: GPT-2 124M, …"""
    sizes = {f.model: f.parameters for f in _all() if f.model in GPT2}
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / max(parameters, 1))))


@cache
def _all() -> tuple[Published, ...]:
    text = (resources.files("regpt") / "evals" / "published.toml").read_text(encoding="utf-8")
    return tuple(read(tomllib.loads(text)))


def read(document: Mapping[str, Any]) -> Iterable[Published]:
    """The figures of a file in that form. Raises ConfigError for a key that there is not, or of another type."""
    sources, parameters = document["sources"], document["parameters"]
    for group in document["figures"]:
        shared = {key: value for key, value in group.items() if key != "values"}
        for own in group["values"]:
            entry = shared | own
            presets = tuple(entry.pop("presets", ()))
            citation = ", ".join(
                part for part in (sources[entry.pop("source")], entry.pop("where", "")) if part
            )
            entry |= {"source": citation, "parameters": parameters[entry["model"]]}
            base = Published(**(_REQUIRED | {"presets": presets}))
            made: Published = build(Published, entry, where="published.toml", base=base)
            yield made


_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("model", "task", "figure", "data", "source", "method"), ""),
    "parameters": 0,
    "value": math.nan,
}
