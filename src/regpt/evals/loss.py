"""Cross-entropy over a whole split, in order, once: never a random sample of it, so that two figures can be compared."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from regpt.data.loader import eval_batches
from regpt.data.split import TokenSplit
from regpt.models import LanguageModel
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
    device: str = "cpu",
    autocast: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    between: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> SplitLoss:
    """The mean loss over every target of `split`, in windows of the model's context that do not overlap.

    Args:
        rows: windows in one forward pass; the result does not depend on it beyond rounding.
        autocast: opened around each forward pass.
        between: called between passes; may raise to stop.
        ranks: share the passes; the result is the same to the bit on any number of them.
    """
    ranks = ranks or Ranks()
    was_training = model.training
    model.eval()
    sums: list[float] = []
    count = 0
    try:
        for x, y in eval_batches(split, model.config.block_size, rows, ranks.rank, ranks.world):
            between()
            with autocast():
                loss = model(x.to(device), y.to(device), reduction="sum")
            sums.append(float(loss))
            count += int((y >= 0).sum())
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
