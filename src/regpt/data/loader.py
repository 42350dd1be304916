"""Step to batch, as a pure function: the order of the data has no state but the step, on any number of ranks.

The global batch of step s is rows [s*R, (s+1)*R) of an endless list of windows (fewer while a batch is ramped up, but
without a gap: `train/batches.py`). A row is a place in an epoch; a permutation, computed on the fly, says which window
stands there. Windows tile the split from an offset that each epoch draws anew and run around its end, so every token
is an input and a target in every epoch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from regpt.data.split import Ids, TokenSplit
from regpt.errors import ConfigError
from regpt.models import IGNORE
from regpt.train.batches import Batches

Words = NDArray[np.uint64]
ROUNDS = 3  # with 2 the images of a handful of windows are measurably uneven
MIX = np.array(
    [0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64
)  # splitmix64's (Steele, Lea, Flood 2014)
HALF = np.uint64(32)
BLOCK_ROWS = 4096  # whose windows are looked up together


class Loader:
    """Batches of one split.

    Args:
        block_size: T, positions in a row.
        batch_rows: R, rows in the global batch of one step.
        ramp_steps: over which the batch grows to them.
        seed: draws offsets and orders.
        order: permuted: every window once an epoch. replacement: windows drawn independently, as nanoGPT does.

    Raises:
        ConfigError: the split has no window of block_size + 1 ids.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        block_size: int,
        batch_rows: int,
        seed: int,
        order: Literal["permuted", "replacement"] = "permuted",
        ramp_steps: int = 0,
    ) -> None:
        _check_length(split, block_size)
        self.split, self.block_size, self.batches = split, block_size, Batches(batch_rows, ramp_steps)
        self.seed, self.order = seed, order
        self._ahead = functools.lru_cache(maxsize=2)(self._starts_of_block)

    @property
    def n_windows(self) -> int:
        """Windows in an epoch: the last one overlaps the first where block_size does not divide the split."""
        return -(-self.split.n_tokens // self.block_size)

    def batch(
        self, step: int, micro: int = 0, n_micro: int = 1, rank: int = 0, world: int = 1, skipped: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and targets of one micro-batch of one rank; the same for the same arguments, always.

        A rank has a contiguous slice of the global batch, a micro-batch a contiguous slice of that.

        Args:
            skipped: whole batches that were passed over before this step.

        Returns:
            x, y: (rows of the step / world / n_micro, block_size) int64 on the CPU; y is x one position on.
        """
        batch_rows = self.batches.rows(step)
        rows, rest = divmod(batch_rows, n_micro * world)
        if rest or not (0 <= micro < n_micro and 0 <= rank < world and step >= 0):
            raise ConfigError(
                f"a batch of {batch_rows} rows has no micro-batch {micro} of {n_micro} on rank {rank} of {world}."
            )
        first = self.batches.first_row(step, skipped) + (rank * n_micro + micro) * rows
        starts = self._starts_from(first, rows)
        ids = self.split.rows(starts, self.block_size + 1)
        x, y = ids[:, :-1].astype(np.int64), ids[:, 1:].astype(np.int64)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _starts_from(self, first: int, n: int) -> Ids:
        """`starts` of the rows [first, first + n), computed for many steps at once: per batch, a third of the work."""
        blocks = range(first // BLOCK_ROWS, (first + n - 1) // BLOCK_ROWS + 1)
        at = first - blocks.start * BLOCK_ROWS
        found = [self._ahead(block) for block in blocks]
        return (found[0] if len(found) == 1 else np.concatenate(found))[at : at + n]

    def _starts_of_block(self, block: int) -> Ids:
        return self.starts(np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS))

    def starts(self, rows: Ids) -> Ids:
        """The first id of each row's window. (R,) int64 -> (R,) int64."""
        n_tokens = self.split.n_tokens
        if self.order == "replacement":
            key = _keys(self.seed, "replacement")
            return (_mix(rows.astype(np.uint64), key[0]) % np.uint64(n_tokens - self.block_size)).astype(
                np.int64
            )
        starts = np.empty_like(rows)
        epochs, places = np.divmod(rows, self.n_windows)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            windows = permute(places[here], self.n_windows, self.seed, epoch)
            offset = int(_keys(self.seed, f"offset {epoch}")[0]) % n_tokens
            starts[here] = (offset + windows * self.block_size) % n_tokens
        return starts


def permute(places: Ids, n: int, seed: int, epoch: int) -> Ids:
    """Where each of `places` goes under a pseudorandom permutation of range(n), drawn by seed and epoch.

    A Feistel network on pairs (left, right) with left * width + right = place: each round adds to one half a hash of
    the other, which can be undone, so it permutes. There are a few more pairs than places; what lands outside goes
    through once more ("cycle walking"), which permutes still (Black and Rogaway, 2002).
    """
    keys = _keys(seed, f"order {epoch}")
    height = int(np.ceil(np.sqrt(n)))
    width = np.uint64(-(-n // height))
    out = places.astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        left, right = np.divmod(out[outside], width)
        for r in range(ROUNDS):
            left = (left + _mix(right, keys[2 * r])) % np.uint64(height)
            right = (right + _mix(left, keys[2 * r + 1])) % width
        out[outside] = walked = left * width + right
        outside = outside[walked >= n]
    return out.astype(np.int64)


def _mix(x: Words, key: np.uint64) -> Words:
    """A hash of each number, below 2**32 so that sums of it do not overflow."""
    z = (x + key) * MIX[0]
    z = (z ^ (z >> HALF)) * MIX[1]
    mixed: Words = z >> HALF
    return mixed


@functools.lru_cache(maxsize=16)
def _keys(seed: int, purpose: str) -> Words:
    """Eight numbers that look random, the same for the same arguments."""
    return np.frombuffer(
        hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=64).digest(), "<u8"
    ).astype(np.uint64)


def eval_batches(
    split: TokenSplit, block_size: int, rows: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split once, in order: every id but the first is a target exactly once.

    Args:
        rows: windows in one batch; the last batch may have fewer.
        rank, world: of every `world` batches in turn, rank r has the r-th. All ranks have equally many: where the split
            has run out, one without targets.

    Yields:
        x, y: (at most rows, block_size) int64; behind the split's end x is 0 and y is IGNORE.
    """
    targets = split.n_tokens - 1
    starts = range(0, targets, rows * block_size)
    for turn in range(-(-len(starts) // world)):
        place = turn * world + rank
        start = starts[place] if place < len(starts) else targets
        n = min(rows * block_size, targets - start)
        ids = split.read(start, n + 1)
        x = np.zeros(max(-(-n // block_size), 1) * block_size, dtype=np.int64)
        y = np.full_like(x, IGNORE)
        x[:n], y[:n] = ids[:-1], ids[1:]
        yield torch.from_numpy(x).view(-1, block_size), torch.from_numpy(y).view(-1, block_size)


def window_count(split: TokenSplit, context: int, stride: int) -> int:
    """Windows of `context` tokens, moved on by `stride`, in which every target of the split has its place."""
    return 1 + -(-max(split.n_tokens - 1 - context, 0) // stride)


def strided_batches(
    split: TokenSplit, context: int, stride: int, rows: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole split in order, in windows that overlap: every id but the first is a target once, the others IGNORE.

    Window w begins at id w * stride; of all but the first only the last `stride` targets count, so each has at least
    context - stride ids before it.

    Args:
        stride: at most `context`; equal to it, the windows are those of `eval_batches`.
        rows, rank, world: as of `eval_batches`.

    Yields:
        x, y: (at most rows, context) int64; behind the split's end x is 0 and y is IGNORE.
    """
    targets, windows = split.n_tokens - 1, window_count(split, context, stride)
    firsts = range(0, windows, rows)
    for turn in range(-(-len(firsts) // world)):
        place = turn * world + rank
        own = range(firsts[place], min(firsts[place] + rows, windows)) if place < len(firsts) else range(0)
        x = np.zeros((max(len(own), 1), context), dtype=np.int64)
        y = np.full_like(x, IGNORE)
        for row, window in enumerate(own):
            n = min(context, targets - window * stride)
            scored = 0 if window == 0 else context - stride
            ids = split.read(window * stride, n + 1)
            x[row, :n], y[row, scored:n] = ids[:-1], ids[1 + scored :]
        yield torch.from_numpy(x), torch.from_numpy(y)


def _check_length(split: TokenSplit, block_size: int) -> None:
    if split.n_tokens < block_size + 1:
        raise ConfigError(
            f"model.block_size={block_size} needs at least {block_size + 1} tokens, "
            f"the {split.name} split has {split.n_tokens}.",
            hint=f"--model.block-size {max(split.n_tokens - 1, 1)} or smaller, or more text",
        )
