"""Cross-entropy over a whole split, in order, once: never a random sample of it, so that two figures can be compared."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from regpt.data.loader import eval_batches, strided_batches, window_count
from regpt.data.request import split_parts
from regpt.data.shards import dtype_for
from regpt.data.sources import open_source, reasons
from regpt.data.split import Ids, TokenSplit
from regpt.data.workers import FACTS, facts_path, tokenize
from regpt.errors import ConfigError, DataError
from regpt.evals.likelihood import of_targets
from regpt.models import IGNORE, LanguageModel
from regpt.models.modern import turns
from regpt.tokenizers import Tokenizer
from regpt.train.dist import Ranks


@dataclass(frozen=True, kw_only=True)
class SplitLoss:
    """The loss over one split."""

    nats: float
    """Mean over the targets, in nats a token."""
    tokens: int
    """Targets counted: every token of the split but the first."""
    bits_per_byte: float
    """Total loss over the bytes of source text: comparable between tokenizers."""

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return math.exp(min(self.nats, 700.0))


@torch.no_grad()  # not inference_mode: FSDP makes tensors here that training uses later
def split_loss(
    model: LanguageModel,
    split: TokenSplit,
    *,
    rows: int,
    context: int | None = None,
    stride: int | None = None,
    device: str = "cpu",
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    between: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ranks: Ranks | None = None,
) -> SplitLoss:
    """The mean loss over every target of `split`.

    Args:
        rows: windows in one forward pass; the result does not depend on it beyond rounding.
        context: tokens of a window; None: the model's context.
        stride: tokens by which windows are moved on; each scores its last `stride` targets, so that these have at least
            context - stride tokens before them. None: the context, so that windows do not overlap.
        autocast: opened around each forward pass.
        between: called between passes; may raise to stop.
        progress: hears how many windows are done, and of how many.
        ranks: share the passes; the result is the same to the bit on any number of them.

    Raises:
        ConfigError: `context` or `stride` is none that the model can take.
        DataError: the split is empty, or of other ids than the model's.
    """
    ranks = ranks or Ranks()
    context = model.config.block_size if context is None else context
    stride = context if stride is None else stride
    check_windows(model, context, stride)
    if split.n_tokens < 2:
        raise DataError(
            f"the split {split.name} has no target.", got=f"{split.n_tokens} tokens", expected="at least 2"
        )
    windows = window_count(split, context, stride)
    was_training, done = model.training, 0
    model.eval()
    sums: list[float] = []
    count = 0
    try:
        with stretched(model, context):
            for x, y in _batches(split, context, stride, rows, ranks):
                between()
                with autocast():
                    sums.append(_total(model, x.to(device), y.to(device), plain=stride == context))
                count += int((y >= 0).sum())
                done = min(done + rows * ranks.world, windows)
                progress(done, windows)
    finally:
        model.train(was_training)
    by_rank = ranks.gathered(torch.tensor(sums, dtype=torch.float64))
    total = sum(torch.stack(by_rank, dim=1).flatten().tolist())  # in the order of the split
    count = int(ranks.total(torch.tensor([count])))
    return SplitLoss(
        nats=total / count,
        tokens=count,
        bits_per_byte=total / math.log(2) / split.source_bytes if split.source_bytes else math.nan,
    )


def _batches(
    split: TokenSplit, context: int, stride: int, rows: int, ranks: Ranks
) -> Iterator[tuple[Tensor, Tensor]]:
    if stride == context:
        return eval_batches(split, context, rows, ranks.rank, ranks.world)
    return strided_batches(split, context, stride, rows, ranks.rank, ranks.world)


def _total(model: LanguageModel, x: Tensor, y: Tensor, *, plain: bool) -> float:
    """The summed loss of one batch, in nats. `plain`: nearly every position has a target."""
    if plain:
        return float(model(x, y, reduction="sum"))
    hidden = model.hidden(x)
    counts = y != IGNORE
    if not counts.any():  # a rank without a window of its own
        return 0.0
    return -float(of_targets(model, hidden[counts], y[counts])[0].sum())


def check_windows(model: LanguageModel, context: int, stride: int) -> None:
    """Refuse windows that the model cannot see. Raises ConfigError."""
    size = model.config.block_size
    if context < 1 or (context > size and not is_rotary(model)):
        why = "its positions are learned, and end there" if context > size else "a window needs a token"
        raise ConfigError(
            f"--context {context:,} does not fit the model: {why}.",
            expected=f"1 or more; positions go on beyond the {size:,} of training"
            if is_rotary(model)
            else f"1 to {size:,}",
            hint=f"--context {size}",
        )
    if not 1 <= stride <= context:
        raise ConfigError(f"--stride {stride:,} is out of range.", expected=f"1 to the context, {context:,}")


def is_rotary(model: LanguageModel) -> bool:
    """Whether positions are turns of queries and keys, which go on beyond the context of training."""
    return isinstance(getattr(model, "turns", None), Tensor)


@contextlib.contextmanager
def stretched(model: LanguageModel, context: int) -> Iterator[None]:
    """The model with room for `context` positions while this is open, where that is more than it was trained with.

    Rotary positions are computed on; attention windows stay as they were trained.
    """
    before = model.config
    if context <= before.block_size:
        yield
        return
    rotary, short = cast(Any, model), cast(Any, model).turns
    model.config = dataclasses.replace(before, block_size=context)
    rotary.turns = turns(model.config).to(short.device)
    try:
        yield
    finally:
        model.config, rotary.turns = before, short


class TextSplit(TokenSplit):
    """A file of text as a split, its ids in memory: the very ids that `regpt prepare` would write of it.

    Args:
        path: whatever `regpt prepare` takes for one file: text, with `<|endoftext|>` between documents or of one document;
            JSON lines or parquet with the field `text`; also packed.

    Raises:
        DataError: the file is missing, empty or damaged, or has characters that the tokenizer lacks.
    """

    def __init__(self, path: Path, tokenizer: Tokenizer) -> None:
        source, dtype = open_source(str(path)), dtype_for(tokenizer.vocab_size)
        parts, ends, skipped = [np.zeros(0, dtype)], list[int](), Counter[str]()
        n_tokens = size = 0
        with tempfile.TemporaryDirectory(prefix="regpt-") as folder:
            written = Path(folder) / "ids"
            for _, part in split_parts(source, None, Path(folder)):
                skipped.update(tokenize(part, tokenizer, written).skipped)
                parts.append(np.fromfile(written, dtype))
                facts = np.fromfile(facts_path(written), FACTS)
                if part.fragment != "middle":
                    ends += (n_tokens + np.cumsum(facts["tokens"])).tolist()
                n_tokens, size = n_tokens + len(parts[-1]), size + int(facts["bytes"].sum())
        self.ids = np.concatenate(parts).astype(np.int64)
        if not size:
            raise DataError(
                f"{path} is empty.", got=f"skipped: {reasons(skipped)}" if skipped else None, expected="text"
            )
        super().__init__(path.name, [], document_ends=lambda: np.array(ends), source_bytes=lambda: size)
        self.n_tokens = n_tokens

    def read(self, start: int, n: int) -> Ids:
        return self.ids[start : start + n]
