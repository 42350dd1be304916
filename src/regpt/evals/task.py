"""What every task of requests is: texts to requests, and the answers to figures."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

from regpt.errors import DataError
from regpt.evals.figures import Figure, TaskResult
from regpt.evals.likelihood import Options, Request, Scored, check_requests, score
from regpt.evals.names import HEADLINES
from regpt.models import LanguageModel
from regpt.tokenizers import Tokenizer

Parts = dict[str, list[list[Request]]]
"""Requests by what they are for, then by row."""
Answers = Mapping[str, Sequence[Sequence[Scored]]]
"""The answers to `Parts`, in the same places."""


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A set of rows, and how a model is asked about them."""

    name: str

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many there are."""

    @abstractmethod
    def requests(self, tokenizer: Tokenizer, block_size: int) -> Parts:
        """What the model is asked. Raises DataError for text that the tokenizer lacks."""

    @abstractmethod
    def figures(self, answers: Answers) -> dict[str, Figure]:
        """What the answers come to."""

    def check(self, model: LanguageModel, parts: Parts) -> None:
        """Refuse what the model cannot score, before anything is computed: of the model its shape alone is looked at.

        Args:
            parts: what `requests` gave.

        Raises:
            DataError: naming task and row.
        """
        for rows in parts.values():
            for number, row in enumerate(rows, 1):
                try:
                    check_requests(model, row)
                except DataError as e:
                    raise DataError(
                        f"{self.name}, row {number}: {e.what}", got=e.got, expected=e.expected, hint=e.hint
                    ) from None

    def evaluate(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        parts: Parts | None = None,
        **options: Unpack[Options],
    ) -> TaskResult:
        """Ask `model` about every row.

        Args:
            tokenizer: the one that the model was trained with.
            parts: what `requests` gave, where that was asked before.
            options: the keywords of `likelihood.score`.

        Raises:
            DataError: the tokenizer is not the model's, or lacks characters of the rows.
        """
        begun = time.perf_counter()
        require_tokenizer(model, tokenizer)
        block_size = model.config.block_size
        parts = self.requests(tokenizer, block_size) if parts is None else parts
        flat = [request for rows in parts.values() for row in rows for request in row]
        scored = iter(score(model, flat, **options))
        answers = {part: [[next(scored) for _ in row] for row in rows] for part, rows in parts.items()}
        cut = {
            number
            for rows in parts.values()
            for number, row in enumerate(rows)
            if any(len(r.context + r.continuation) > block_size + 1 for r in row)
        }
        return TaskResult(
            task=self.name,
            figures=self.figures(answers),
            headline=HEADLINES[self.name],
            rows=self.rows,
            seconds=time.perf_counter() - begun,
            cut=len(cut),
        )


def require_tokenizer(model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Raises DataError where the ids of `tokenizer` cannot be the model's."""
    if tokenizer.vocab_size != model.vocab_size:
        raise DataError(
            "the tokenizer is not the one that the model was trained with.",
            got=f"{tokenizer.vocab_size:,} ids ({tokenizer.kind})",
            expected=f"the model's {model.vocab_size:,}",
            hint="the tokenizer folder of the model's own run",
        )


class Encoder:
    """Text to requests as lm-eval cuts it: context and continuation are encoded together, then parted."""

    def __init__(self, tokenizer: Tokenizer, task: str) -> None:
        self.tokenizer, self.task = tokenizer, task
        self._last: tuple[str, tuple[int, ...]] = ("", ())

    def ids(self, text: str, row: int) -> tuple[int, ...]:
        """The ids of one text; a context that several choices share is encoded once.

        Raises:
            DataError: naming the row, for characters that the tokenizer lacks.
        """
        if text != self._last[0]:
            self._last = (text, self.encoded(text, row))
        return self._last[1]

    def pair(self, context: str, continuation: str, row: int) -> Request:
        """lm-eval's `_encode_pair`: spaces at the context's end move to the continuation."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return Request((self.tokenizer.eot_id,), self.encoded(continuation, row))
        before = self.ids(context, row)
        return Request(before, self.encoded(context + continuation, row)[len(before) :])

    def encoded(self, text: str, row: int) -> tuple[int, ...]:
        """The ids of one text. Raises DataError, naming the row, for characters that the tokenizer lacks."""
        try:
            return tuple(self.tokenizer.encode(text))
        except DataError as e:
            raise DataError(
                f"{self.task}, row {row + 1}: the model's tokenizer cannot write this text: {e.what}",
                got=e.got,
                expected=e.expected,
                hint="a model whose tokenizer knows every byte: gpt2, bpe or bytes",
            ) from None
