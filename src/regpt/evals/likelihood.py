"""How likely a model finds given continuations of given contexts: what every task of choosing and of guessing asks.

Nothing is computed twice and nothing in vain. Choices of one question share their context: it passes through the model
once, and each choice continues it from its keys and values. Contexts of nearly equal length go together: what all have
room for is stored, the few tokens behind that belong to each choice. So no position is masked: what is shorter is padded
on the right, where causal attention does not look. Logits, a third of the work of a small model, are made only where a
target counts, in chunks (`models/loss.CHUNK_BYTES`), and softmax and sums are in float32 or wider.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import torch
from torch import Tensor, nn

from regpt.errors import DataError
from regpt.infer.cache import Continued, KVCache, cache_bytes
from regpt.models import LanguageModel
from regpt.models.loss import chunk_rows
from regpt.train.dist import Ranks, is_sharded

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768, "mps": 8192}  # of one pass, padding included
CACHE_BYTES = 1 << 30  # of keys and values of shared contexts, at most
SHARED_FROM = 8  # tokens of a context that are worth a pass of their own
SPREAD = 8  # tokens by which contexts that pass together may differ, where equal ones are too few
COPIED = 8  # times the tokens of a pass: positions of which keys and values are copied for it, those that are shared included
PADDED = 1 / 8  # of a row at most, in a pass that is well filled (a quarter of its tokens) without it

Autocast = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Request:
    """A question to a model: how likely is `continuation` after `context`?"""

    context: tuple[int, ...]
    """Never empty: end-of-text stands for nothing."""
    continuation: tuple[int, ...]
    """Never empty."""


@dataclass(frozen=True)
class Scored:
    """The answer to a `Request`."""

    logprob: float
    """Of the continuation, in nats: the sum over its tokens."""
    tokens: int
    """Of the continuation."""
    greedy: bool
    """Whether the model holds every token of it for the likeliest."""


class Options(TypedDict, total=False):
    """The keywords of `score`, for those who pass them on."""

    device: str
    autocast: Autocast
    batch_tokens: int | None
    between: Callable[[], None]
    progress: Callable[[int, int], None]
    ranks: Ranks | None


@dataclass(frozen=True)
class _Row:
    """One request as it passes through the model."""

    place: int
    """Of the request among all."""
    ids: tuple[int, ...]
    """Context and continuation, the last token of which is only a target; cut on the left to fit the model."""
    targets: int
    """Tokens of the continuation."""

    @property
    def context(self) -> tuple[int, ...]:
        return self.ids[: len(self.ids) - self.targets]


@dataclass(frozen=True)
class _Batch:
    """Rows that pass together: those of one list begin with the same `shared` tokens."""

    shared: int
    groups: list[list[_Row]]

    @property
    def rows(self) -> int:
        return sum(map(len, self.groups))


@torch.no_grad()  # not inference_mode: FSDP makes tensors here that training uses later
def score(
    model: LanguageModel,
    requests: Sequence[Request],
    *,
    device: str = "cpu",
    autocast: Autocast = contextlib.nullcontext,
    batch_tokens: int | None = None,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> list[Scored]:
    """The log-probability of every continuation, in the order of the requests.

    Of what is longer than the model's context the end is taken, as lm-eval does: block_size tokens and the last target.

    Args:
        autocast: opened around each pass.
        batch_tokens: tokens in one pass, padding included; a single row may be longer. None: what suits the device.
            The result does not depend on it beyond rounding.
        between: called between passes; may raise to stop.
        progress: hears how many of the requests are scored.
        ranks: share the passes; the result is the same to the bit on any number of them. Where each holds but a part of
            the model (FSDP), all make all passes, since each pass needs all of them.

    Raises:
        DataError: a continuation is empty or longer than the model's context, or an id is not in its vocabulary.
    """
    ranks = ranks or Ranks()
    check_requests(model, requests)
    # Longest first: what does not fit into memory fails at once, and the time left is not promised too short.
    position_bytes = cache_bytes(model.config, 1, 1, next(cast(nn.Module, model).parameters()).dtype)
    tokens = batch_tokens or tokens_of(device)
    kept = min(tokens, max(CACHE_BYTES // position_bytes, 1))
    batches = list(_batches(_rows(requests, model.config.block_size), tokens, kept))
    logprobs = torch.zeros(len(requests), dtype=torch.float64)
    greedy = torch.zeros(len(requests), dtype=torch.int64)
    sharded = is_sharded(next(cast(nn.Module, model).parameters()))
    was_training, done = model.training, 0
    model.eval()
    try:
        for number, batch in enumerate(batches):
            if sharded or number % ranks.world == ranks.rank:
                with autocast():
                    _score_batch(model, batch, device, tokens, between, logprobs, greedy)
            done += batch.rows
            progress(done, len(requests))
    finally:
        model.train(was_training)
    if not sharded:  # everything but our own is 0
        logprobs, greedy = ranks.total(logprobs), ranks.total(greedy)
    return [
        Scored(logprob, len(request.continuation), bool(best))
        for request, logprob, best in zip(requests, logprobs.tolist(), greedy.tolist(), strict=True)
    ]


def tokens_of(device: str) -> int:
    """The tokens of one pass that suit a device."""
    return BATCH_TOKENS.get(device.partition(":")[0], BATCH_TOKENS["cpu"])


def check_requests(model: LanguageModel, requests: Sequence[Request]) -> None:
    """Refuse what the model cannot score, before anything is computed. Raises DataError."""
    context = model.config.block_size
    for number, request in enumerate(requests, 1):
        if not request.context or not request.continuation:
            part = "continuation" if request.context else "context"
            raise DataError(
                f"request {number} has an empty {part}.",
                expected="at least one token; end-of-text stands for an empty context",
            )
        if len(request.continuation) > context:
            raise DataError(
                f"continuation {number} is longer than the model's context.",
                got=f"{len(request.continuation):,} tokens",
                expected=f"at most {context:,}",
            )
        for part_ids in (request.context, request.continuation):
            if min(part_ids) < 0 or max(part_ids) >= model.vocab_size:
                raise DataError(
                    f"request {number} has an id that is not in the model's vocabulary.",
                    got=min(part_ids) if min(part_ids) < 0 else max(part_ids),
                    expected=f"ids from 0 to {model.vocab_size - 1}",
                    hint="the tokenizer that the model was trained with",
                )


def _rows(requests: Sequence[Request], block_size: int) -> Iterator[_Row]:
    for place, request in enumerate(requests):
        ids = (request.context + request.continuation)[-(block_size + 1) :]
        yield _Row(place, ids, len(request.continuation))


def _batches(rows: Iterator[_Row], batch_tokens: int, kept_tokens: int) -> Iterator[_Batch]:
    """All rows, the longest contexts first; of shared contexts at most `kept_tokens` at a time, or one."""
    by_context: dict[tuple[int, ...], list[_Row]] = {}
    for row in rows:
        by_context.setdefault(row.context, []).append(row)
    several = [g for c, g in by_context.items() if len(g) > 1 and len(c) > SHARED_FROM]
    alone = [row for c, g in by_context.items() if len(g) == 1 or len(c) <= SHARED_FROM for row in g]
    several.sort(key=lambda g: len(g[0].context), reverse=True)
    batch: list[list[_Row]] = []
    tokens = 0
    for group in several:
        length, first = len(group[0].context), len(batch[0][0].context) if batch else 0
        # Contexts that are shorter make the others' choices longer: only where the pass is not well filled without.
        shorter = batch and length < first and (tokens > kept_tokens // 2 or first - length > SPREAD)
        if batch and (shorter or tokens + length > kept_tokens):
            yield _Batch(len(batch[-1][0].context) - 1, batch)
            batch, tokens = [], 0
        batch.append(group)
        tokens += length
    if batch:
        yield _Batch(len(batch[-1][0].context) - 1, batch)
    for part in _cut(sorted(alone, key=lambda row: len(row.ids), reverse=True), batch_tokens, 0):
        yield _Batch(0, [part])


def _cut(rows: list[_Row], batch_tokens: int, shared: int) -> Iterator[list[_Row]]:
    """Rows, longest first, in parts of `batch_tokens` behind what they share, padded to the longest of each part."""
    at = 0
    while at < len(rows):
        longest = len(rows[at].ids) - 1 - shared
        most = max(min(batch_tokens // longest, COPIED * batch_tokens // (shared + longest)), 1)
        count = enough = max(min(batch_tokens // 4 // longest, most), 1)
        for row in rows[at + enough : at + most]:
            if len(row.ids) - 1 - shared < (1 - PADDED) * longest:
                break
            count += 1
        yield rows[at : at + count]
        at += count


def _score_batch(
    model: LanguageModel,
    batch: _Batch,
    device: str,
    batch_tokens: int,
    between: Callable[[], None],
    logprobs: Tensor,
    greedy: Tensor,
) -> None:
    """Write what the rows of a batch come to into `logprobs` and `greedy`, at their places."""
    cache = None
    if batch.shared:
        between()
        weight = next(cast(nn.Module, model).parameters())
        cache = KVCache(
            model.config,
            len(batch.groups),
            batch.shared,
            device,
            weight.dtype,
            hint="fewer tokens in one pass: a smaller batch_tokens (--batch-tokens)",
        )
        model.hidden(torch.tensor([g[0].ids[: batch.shared] for g in batch.groups], device=device), cache)
    continues = {row.place: number for number, group in enumerate(batch.groups) for row in group}
    rows = sorted((r for g in batch.groups for r in g), key=lambda row: len(row.ids), reverse=True)
    for part in _cut(rows, batch_tokens, batch.shared):
        between()
        tails = [torch.tensor(row.ids[batch.shared : -1]) for row in part]
        ids = nn.utils.rnn.pad_sequence(tails, batch_first=True).to(device)  # (B, T)
        places = torch.tensor([continues[row.place] for row in part], device=device)
        hidden = model.hidden(ids, Continued(cache, places) if cache is not None else None)  # (B, T, C)
        counted = [range(len(t) - row.targets, len(t)) for t, row in zip(tails, part, strict=True)]
        at = torch.tensor([n * ids.shape[1] + p for n, ps in enumerate(counted) for p in ps], device=device)
        targets = torch.tensor([i for row in part for i in row.ids[-row.targets :]], device=device)
        nats, best = of_targets(model, hidden.flatten(0, 1)[at], targets)
        sizes = [row.targets for row in part]
        for row, own, likeliest in zip(part, torch.split(nats, sizes), torch.split(best, sizes), strict=True):
            logprobs[row.place], greedy[row.place] = own.sum(), likeliest.all()


def of_targets(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """hidden (N, C), targets (N,) -> their log-probabilities (N,) float64, and whether each is the likeliest (N,) bool."""
    nats, best = [], []
    rows = chunk_rows(len(targets), model.padded_vocab_size)
    for x, y in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = model.head(x)[:, : model.vocab_size]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        aimed = logits.gather(1, y.unsqueeze(1))  # (rows, 1)
        largest, likeliest = logits.max(1, keepdim=True)
        total = logits.sub_(largest).exp_().sum(1, keepdim=True)  # in place: the largest tensor there is
        nats.append((aimed - largest - total.log()).squeeze(1).cpu().double())
        best.append((likeliest.squeeze(1) == y).cpu())
    return torch.cat(nats), torch.cat(best)
