"""The choice of the next token: pure functions from logits and one uniform number to an id.

The filters apply in the order of Hugging Face's `generate` (temperature, top-k, top-p, min-p) and keep the
same tokens as its logits warpers. Logits are (rows, V); a token that is filtered out gets -inf.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from regpt.errors import CheckpointError


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits over `temperature` > 0, the largest moved to 0 first: then a tiny one cannot overflow."""
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """The k likeliest tokens, and any as likely as the last of them. A k beyond V keeps all."""
    k = min(k, logits.shape[-1])
    kth = logits.topk(k).values[..., -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The smallest set of likeliest tokens whose probabilities reach p (Holtzman et al. 2020), at least one.

    Among equally likely tokens the lower id comes first.
    """
    ordered, ids = logits.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # the mass of all likelier tokens
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, ids, before >= p)
    return logits.masked_fill(drop, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest (Nguyen et al. 2024)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def uniform(seed: int, index: int, step: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone.

    A hash rather than a generator's state: completion `index` of a request then draws the same numbers
    whatever else is asked for, in whatever order, on any device and any version of PyTorch.
    """
    digest = hashlib.blake2b(f"{seed}/{index}/{step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def draw(probs: Tensor, uniforms: Sequence[float]) -> list[int]:
    """One id a row by inversion of the distribution function: the first id whose cumulative mass exceeds u.

    Args:
        probs: (rows, V) float64, not necessarily summing to 1. An id of mass 0 is never drawn.
        uniforms: one multiple of 2^-53 in [0, 1) a row: times the total, it cannot round up to the total.
    """
    cdf = probs.cumsum(-1)
    at = torch.tensor(uniforms, dtype=probs.dtype, device=probs.device)[:, None] * cdf[:, -1:]
    return cast(list[int], torch.searchsorted(cdf, at, right=True)[:, 0].tolist())


def choose(
    logits: Tensor,
    uniforms: Sequence[float],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> list[int]:
    """The next id of each row.

    Args:
        logits: (rows, V) of any float type; computed on in float64.
        uniforms: one number in [0, 1) a row; see `uniform`.
        temperature: 0 takes the likeliest token, the lowest id among equals, and ignores the rest.
        top_k, top_p, min_p: None (or a top_p of 1, a min_p of 0) keeps everything.

    Raises:
        CheckpointError: a row's logits are not finite.
    """
    logits = (logits.cpu() if logits.device.type == "mps" else logits).double()  # MPS has no float64
    if not logits.amax(-1).isfinite().all():
        raise CheckpointError(
            "the model's output is not finite, so no token can be chosen: training diverged, or the weights "
            "are damaged.",
            hint="an earlier checkpoint of the run",
        )
    if temperature == 0:
        return cast(list[int], logits.argmax(-1).tolist())
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None and top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p:
        logits = keep_min_p(logits, min_p)
    return draw(logits.softmax(-1), uniforms)
