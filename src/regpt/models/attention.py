"""Causal attention: PyTorch's fused kernel, or three matrix products where those are faster.

On a CPU the fused kernel's backward pass is slow at short contexts in bfloat16 (measured, forward and backward of a layer:
11.5 ms against 2.2 at 16 rows x 4 heads x 128 positions x 48, 136 against 54 at 64 x 6 x 256 x 64) and, in float32, where
products go through oneDNN (`train/machine.using`; 15.9 against 2.8). The products keep a T x T matrix a head, which
the kernel does not, so they are for contexts up to `PRODUCTS_UP_TO`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PRODUCTS_UP_TO = 512  # positions
# Set while float32 products go through oneDNN; a plain name, which Dynamo can guard.
products_in_float32 = False


def by_products(device_type: str, dtype: torch.dtype, positions: int) -> bool:
    """Whether `attend` multiplies matrices itself instead of calling the fused kernel."""
    if device_type != "cpu" or not 1 < positions <= PRODUCTS_UP_TO:
        return False
    return dtype == torch.bfloat16 or products_in_float32


def attend(q: Tensor, k: Tensor, v: Tensor, *, dropout: float = 0.0) -> Tensor:
    """Attention of T queries over S >= T keys whose last T are the queries' own positions.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D).
        dropout: of the attention weights; 0 outside of training.

    Returns:
        (B, H, T, D) in the dtype of q.
    """
    T, S = q.shape[2], k.shape[2]
    if S == T and by_products(q.device.type, q.dtype, T):
        return _products(q, k, v, dropout)
    mask = None
    if 1 < T < S:  # is_causal aligns at the top left, which is wrong once S > T
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1
    )


def _products(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    B, H, T, D = q.shape
    future = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = (part.reshape(B * H, T, D) for part in (q, k, v))
    scores = torch.baddbmm(future.expand(B * H, T, T), q, k.transpose(1, 2), alpha=D**-0.5)  # (B·H, T, T)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout)
    return torch.bmm(weights, v).view(B, H, T, D)
