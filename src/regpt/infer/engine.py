"""Generation: the prompt through the model once, then a token at a time for all completions, streamed.

A context of `block_size` tokens that is full slides: the model goes on from the last three quarters of it.
(GPT-2's positions are learned, one vector each, so the kept tokens move to the front and are computed anew.)
The rule looks at lengths alone: text is the same with or without the cache, whatever `max_new_tokens` is.

What is promised: the same call gives the same tokens. Completion i of n draws the same random numbers as
alone, but float32 products of one row and of several differ in their last bits: once in a very long while a
draw on the border between two tokens may fall otherwise.
"""

from __future__ import annotations

import codecs
import contextlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from regpt.infer.cache import KVCache
from regpt.infer.sampling import choose, uniform
from regpt.infer.settings import SamplingSettings as SamplingSettings
from regpt.models import LanguageModel
from regpt.tokenizers import Tokenizer
from regpt.train.dist import is_sharded

FinishReason = Literal["stop", "length"]
"""stop: a stop string, or `<|endoftext|>`; length: `max_new_tokens`."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One token of one completion, and the text that it released."""

    index: int
    """Which completion, from 0."""
    token: int
    """Its id; `<|endoftext|>` ends the completion and is not part of it."""
    text: str
    """Whole characters; empty while a character or a possible stop string is incomplete."""
    finish_reason: FinishReason | None
    """Set on a completion's last piece."""
    slid: bool
    """The model no longer saw the beginning when it chose this token."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One finished completion."""

    text: str
    """Without the prompt, without the stop string."""
    tokens: list[int]
    """The ids chosen, those of a stop string included, `<|endoftext|>` not."""
    finish_reason: FinishReason
    slid: bool
    """The beginning left the context before the end was reached."""


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    cached: bool = True,
) -> Iterator[Piece]:
    """Stream the completions of `prompt`, token by token, those of several completions interleaved.

    Dropout is off inside, and the model is left in the mode it was in between any two pieces.

    Args:
        prompt: ids, or text, in which `<|endoftext|>` is text as any other. An empty one means "a document
            begins": the end-of-text token stands for it. Of one longer than the context the end is used.
        settings: None: the defaults.
        cached: False computes each token from the whole context anew: slow; the cache is tested against it.

    Raises:
        DataError: the prompt has characters or ids that the tokenizer lacks, before anything is computed.
        CheckpointError: the model's output is not finite.
    """
    ids = prompt_ids(tokenizer, prompt)
    return _decode(model, tokenizer, ids, settings or SamplingSettings(), cached)


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    settings: SamplingSettings | None = None,
    *,
    cached: bool = True,
) -> list[Completion]:
    """The completions of `prompt`, whole, in order; arguments and errors as for `generate`."""
    return collect(generate(model, tokenizer, prompt, settings, cached=cached), tokenizer.eot_id)


def collect(pieces: Iterator[Piece], eot_id: int) -> list[Completion]:
    """Put the pieces of finished completions together."""
    parts: dict[int, list[Piece]] = {}
    for piece in pieces:
        parts.setdefault(piece.index, []).append(piece)
    return [
        Completion(
            text="".join(p.text for p in row),
            tokens=[p.token for p in row if p.token != eot_id],
            finish_reason=cast(FinishReason, row[-1].finish_reason),
            slid=row[-1].slid,
        )
        for _, row in sorted(parts.items())
    ]


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """The ids that a prompt stands for; never empty. Raises DataError for what the tokenizer lacks."""
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
    else:
        ids = list(prompt)
        tokenizer.decode_bytes(ids)  # refuses ids that do not exist
    return ids or [tokenizer.eot_id]


def kept_tokens(block_size: int) -> int:
    """What stays of a full context when it slides: three quarters.

    More would be computed anew too often, less would forget more than it must: at 1,024 tokens it costs one
    pass over 768 tokens for every 256 generated, about a tenth of the time on a CPU.
    """
    return max(1, block_size * 3 // 4)


def _decode(
    model: LanguageModel, tokenizer: Tokenizer, ids: list[int], settings: SamplingSettings, cached: bool
) -> Iterator[Piece]:
    s = settings
    seed = secrets.randbits(32) if s.seed is None else s.seed
    rows = [_Row(index, list(ids), TextStream(s.stop)) for index in range(s.n)]
    context = _Context(model, s.n, len(ids) + s.max_new_tokens - 1, cached)
    for step in range(s.max_new_tokens):
        # The prompt is the same in every row, so one row of it is enough.
        logits = context.next_logits([row.ids for row in (rows if step else rows[:1])])
        chosen = choose(
            logits.expand(len(rows), -1),
            [uniform(seed, row.index, step) for row in rows],
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            min_p=s.min_p,
        )
        going: list[int] = []
        for i, (row, token) in enumerate(zip(rows, chosen, strict=True)):
            reason: FinishReason | None = "length" if step + 1 == s.max_new_tokens else None
            data = b""
            if token == tokenizer.eot_id:
                reason = "stop"
            else:
                row.ids.append(token)
                data = tokenizer.decode_bytes([token])
            text = row.text.feed(data, last=reason is not None)
            if row.text.stopped:
                reason = "stop"
            yield Piece(index=row.index, token=token, text=text, finish_reason=reason, slid=context.start > 0)
            if reason is None:
                going.append(i)
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in going]
            context.keep(going)


@dataclass
class _Row:
    """One completion under way."""

    index: int
    ids: list[int]
    """Of the prompt and of what was chosen since."""
    text: TextStream


class TextStream:
    """Bytes in, text out: whole characters only, and nothing that may turn out to be part of a stop string.

    The text ends before the stop string that is complete first; of several complete at once, before the
    longest. So it does not depend on how the bytes were cut into tokens.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops, self.stopped, self._held = stops, False, ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes, last: bool = False) -> str:
        """The text that is now certain. `last` releases all; an incomplete character becomes U+FFFD."""
        self._held += self._decoder.decode(data, final=last)
        found = [(at + len(s), at) for s in self.stops if (at := self._held.find(s)) >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)[1]]
        open_ = 0 if last else self._open()
        sure, self._held = self._held[: len(self._held) - open_], self._held[len(self._held) - open_ :]
        return sure

    def _open(self) -> int:
        """Characters at the end of the held text that begin a stop string."""
        lengths = (k for s in self.stops for k in range(1, len(s)) if self._held.endswith(s[:k]))
        return max(lengths, default=0)


class _Context:
    """What the model sees of equally long rows of ids, with a cache or without."""

    def __init__(self, model: LanguageModel, rows: int, positions: int, cached: bool) -> None:
        weight = next(cast(nn.Module, model).parameters())
        self.model, self.device, self.start = model, weight.device, 0
        self.block_size = model.config.block_size
        # Of shards, FSDP makes tensors in the first pass that training uses later.
        self.mode = torch.no_grad if is_sharded(weight) else torch.inference_mode
        self.cache = None
        if cached:
            with self.mode():
                positions = min(positions, self.block_size)
                self.cache = KVCache(model.config, rows, positions, weight.device, weight.dtype)

    def next_logits(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """(rows, V): logits of the token that follows each row. Rows only ever grow from call to call."""
        n = len(rows[0])
        if n - self.start > self.block_size:
            self.start = n - kept_tokens(self.block_size)
            if self.cache is not None:
                self.cache.clear()
        seen = self.start + (self.cache.length if self.cache is not None else 0)
        ids = torch.tensor([row[seen:] for row in rows], device=self.device)  # (B, T); T = 1 after the prompt
        # Entered for each token: around a `yield` both modes would leak into the caller's code.
        with _evaluating(self.model), self.mode():
            hidden = self.model.hidden(ids, self.cache)
            return self.model.head(hidden[:, -1:])[:, 0, : self.model.vocab_size]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows; the others are finished."""
        if self.cache is not None:
            with self.mode():
                self.cache.keep(rows)


@contextlib.contextmanager
def _evaluating(model: LanguageModel) -> Iterator[None]:
    """Dropout off inside."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()
