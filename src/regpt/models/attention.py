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


def by_products(device_type: str, dtype: torch.dtype, positions: int, seen: int | None = None) -> bool:
    """Whether `attend` multiplies matrices itself instead of calling the fused kernel: T `positions`, S `seen` (None: T)."""
    if device_type != "cpu" or positions == 1 or max(positions, seen or 0) > PRODUCTS_UP_TO:
        return False
    return dtype == torch.bfloat16 or products_in_float32


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of T queries over S >= T keys whose last T are the queries' own positions.

    Args:
        q: (B, H, T, D). k, v: (B, H, S, D).
        dropout: of the attention weights; 0 outside of training.
        scale: what q.k is multiplied by; None: 1 / sqrt(D).
        window: how many positions a query sees, its own included; None: all up to its own.

    Returns:
        (B, H, T, D) in the dtype of q.
    """
    T, S = q.shape[2], k.shape[2]
    if window is not None and window >= S:
        window = None
    if window is not None and T + window - 1 < S:  # what no query sees
        k, v = k[:, :, S - (T + window - 1) :], v[:, :, S - (T + window - 1) :]
        S = T + window - 1
    if by_products(q.device.type, q.dtype, T, S):
        return _products(q, k, v, dropout, scale, window)
    mask = None
    if T > 1 and (T < S or window is not None):  # is_causal aligns at the top left, which is wrong once S > T
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        mask = mask if window is None else mask.triu(S - T - window + 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None and T > 1, scale=scale
    )


def _products(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float | None, window: int | None
) -> Tensor:
    (B, H, T, D), S = q.shape, k.shape[2]
    hidden = torch.full((T, S), -math.inf, dtype=q.dtype, device=q.device).triu(S - T + 1)
    if window is not None:
        hidden = hidden + torch.full_like(hidden, -math.inf).tril(S - T - window)
    q, k, v = (part.reshape(B * H, -1, D) for part in (q, k, v))
    scale = D**-0.5 if scale is None else scale
    scores = torch.baddbmm(hidden.expand(B * H, T, S), q, k.transpose(1, 2), alpha=scale)  # (B·H, T, S)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout)
    return torch.bmm(weights, v).view(B, H, T, D)
