"""RMS norm and ReLU² in fewer passes over memory than PyTorch makes of them on a CPU, where it has no kernel of its own.

Forward and backward beside the plain forms, two cores, 1,024 tokens: the norm of queries and keys 0.37 ms against 0.56, of a
stream of 128 channels 0.15 against 0.23; ReLU² of 512 channels 0.25 against 1.0 (under autocast `pow` goes through float32).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x (…, C), each vector divided by sqrt(mean of its squares + eps); in x's dtype."""
    if x.device.type != "cpu" or not x.requires_grad:
        return F.rms_norm(x, x.shape[-1:], eps=eps)
    y: Tensor = _RMSNorm.apply(x, eps)  # type: ignore[no-untyped-call]
    return y


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², in x's dtype."""
    y: Tensor = _ReLUSquared.apply(x)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    """y = x r with r = 1 / sqrt(mean(x²) + eps), so dx = r (dy - y mean(dy y)). In 16 bits r is rounded to them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        r = (norm.square() / x.shape[-1] + eps).rsqrt().to(x.dtype)
        y: Tensor = x * r
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        y, r = ctx.saved_tensors
        return torch.addcmul(dy, y, (dy * y).mean(-1, keepdim=True), value=-1) * r, None


class _ReLUSquared(torch.autograd.Function):
    """dx = 2 max(x, 0) dy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = F.relu(x)
        ctx.save_for_backward(r)
        return r * r

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (r,) = ctx.saved_tensors
        dx: Tensor = 2 * (dy * r)
        return dx
