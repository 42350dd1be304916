"""The loss of both models."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from regpt.models import IGNORE


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy of logits (B, T, V) in nats, computed in float32.

    Args:
        targets: (B, T) int64; `IGNORE` (-1) does not count.
        reduction: mean (over the targets that count), sum, or none for (B, T).
    """
    loss = F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]),
        targets.reshape(-1),
        ignore_index=IGNORE,
        reduction=reduction,
    )
    return loss.view_as(targets) if reduction == "none" else loss
