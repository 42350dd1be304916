"""Keys and values of the positions a model has seen, in buffers allocated once and written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from regpt.config import ModelConfig
from regpt.errors import DeviceError


def cache_bytes(config: ModelConfig, rows: int, positions: int, dtype: torch.dtype) -> int:
    """What a `KVCache` of this shape takes: 2 x layers x rows x positions x channels numbers."""
    return 2 * config.n_layer * rows * positions * config.n_embd * dtype.itemsize


class KVCache:
    """The `KVLayers` of a batch whose rows are equally long.

    Args:
        config: the model's shape.
        rows: sequences side by side.
        positions: the most that a row will hold; nothing is allocated later.
        device, dtype: where and how keys and values are kept, normally the model's own.
        hint: what to try where the memory is not there.

    Raises:
        DeviceError: the memory is not there.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        positions: int,
        device: torch.device | str,
        dtype: torch.dtype,
        *,
        hint: str = "fewer completions at a time: a smaller -n",
    ) -> None:
        self.rows, self.positions, self._length = rows, positions, 0
        self.ids: Tensor | None = None  # (rows, positions), once a model asks for them
        heads, size = config.n_head, config.n_embd // config.n_head
        try:
            # (2, n_layer, rows, H, positions, D): keys, then values
            self.kv = torch.empty(2, config.n_layer, rows, heads, positions, size, device=device, dtype=dtype)
        except RuntimeError as e:  # out of memory on CUDA is a RuntimeError too
            gb = cache_bytes(config, rows, positions, dtype) / 1e9
            raise DeviceError(
                f"a cache of {rows} x {positions} positions takes {gb:,.1f} GB: more than {device} has.",
                hint=hint,
            ) from e

    @property
    def length(self) -> int:
        """Positions already stored in every row."""
        return self._length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) at `length` and return all, (B, H, S, D), as views of the buffers.

        B is `rows`, or 1: a single row, such as a prompt that all rows share, is stored in every row.
        """
        end, B = self._length + k.shape[2], k.shape[0]
        assert end <= self.positions and B in (1, self.rows)
        kv = self.kv[:, layer]
        kv[0, :, :, self._length : end], kv[1, :, :, self._length : end] = k, v
        # The cast does nothing unless autocast made k of another type than the buffers.
        return kv[0, :B, :, :end].to(k.dtype), kv[1, :B, :, :end].to(v.dtype)

    def with_previous(self, ids: Tensor, before: int) -> Tensor:
        """Store ids (B, T) at `length`; return them after the `before` ids before them, (B, before + T), -1 for none.

        B is `rows`, or 1, as for `update`.
        """
        start, (B, T) = self._length, ids.shape
        if self.ids is None:
            # `before` columns of -1 stand before the first position.
            self.ids = torch.full(
                (self.rows, before + self.positions), -1, dtype=torch.int64, device=ids.device
            )
        self.ids[:, before + start : before + start + T] = ids
        return self.ids[:B, start : before + start + T]

    def advance(self, positions: int) -> None:
        """Count `positions` as stored, once every layer has been updated."""
        self._length += positions

    def clear(self) -> None:
        """Forget everything; the buffers stay."""
        self._length = 0

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only, in this order; the others are finished."""
        for layer in range(self.kv.shape[1]):  # one layer at a time, so that the copy in between is small
            filled = self.kv[:, layer, :, :, : self._length]
            filled[:, : len(rows)] = filled[:, list(rows)]
        if self.ids is not None:
            self.ids = self.ids[list(rows)]
        self.kv, self.rows = self.kv[:, :, : len(rows)], len(rows)


class Continued:
    """The `KVLayers` of one pass over rows that each continue a row of a `KVCache`; nothing is stored.

    Several may continue the same row: choices of one question. Its keys and values are copied a layer at a time, as long
    as that layer needs them.

    Args:
        cache: what stands before; it is not changed.
        rows: (B,) int64, on its device: which of its rows each row continues.
    """

    def __init__(self, cache: KVCache, rows: Tensor) -> None:
        self.cache, self.rows = cache, rows

    @property
    def length(self) -> int:
        """Positions that stand before."""
        return self.cache.length

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v (B, H, T, D) behind what the cache has: (B, H, S, D)."""
        stored = self.cache.kv[:, layer, :, :, : self.length]  # (2, rows, H, length, D)
        before = stored.index_select(1, self.rows).to(k.dtype)
        return torch.cat((before[0], k), dim=2), torch.cat((before[1], v), dim=2)

    def with_previous(self, ids: Tensor, before: int) -> Tensor:
        """ids (B, T) behind the `before` ids that stand before them, (B, before + T), -1 for none."""
        assert self.cache.ids is not None
        # `before` columns of -1 stand before the first position.
        previous = self.cache.ids[:, self.length : self.length + before]
        return torch.cat((previous.index_select(0, self.rows), ids), dim=1)

    def advance(self, positions: int) -> None:
        """One pass is all there is."""
