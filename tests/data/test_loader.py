"""The loader: every window once an epoch, a pure function of its arguments, the same batch on any number of ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regpt.data.loader import IGNORE, Loader, eval_batches, permute
from regpt.errors import ConfigError

LAX = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@LAX
@given(n=st.integers(1, 3000), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_permute_is_a_permutation(n, seed, epoch) -> None:
    """Every place goes to another window, for any number of windows."""
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permute_mixes_well() -> None:
    """Neighbours part, and each place is about equally likely to hold each window: no order is left to see."""
    n = 10_007
    for epoch in range(3):
        windows = permute(np.arange(n), n, 7, epoch)
        assert abs(np.corrcoef(np.arange(n), windows)[0, 1]) < 0.04
        assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.04
        assert (np.abs(np.diff(windows)) == 1).mean() < 0.002
    counts = np.zeros((8, 8), dtype=int)
    for seed in range(800):
        counts[np.arange(8), permute(np.arange(8), 8, seed, 0)] += 1
    assert counts.min() > 60 and counts.max() < 145  # 100 expected, standard deviation 9.4


def test_permute_of_a_trillion_windows() -> None:
    """Far above 2**32 nothing overflows: images are distinct and inside."""
    n = 10**12 + 39
    windows = permute(np.arange(n - 4096, n), n, 1, 0)
    assert len(set(windows.tolist())) == 4096 and windows.min() >= 0 and windows.max() < n
    assert windows.std() > 0.2 * n


@LAX
@given(
    n_tokens=st.integers(3, 400),
    block_size=st.integers(1, 40),
    rows=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_every_window_once_an_epoch(make_shards, n_tokens, block_size, rows, seed) -> None:
    """Two epochs, batch by batch: each has every window exactly once, and with them every token as input and target."""
    if n_tokens < block_size + 1:
        return
    split = make_shards(range(n_tokens)).split("train")
    loader = Loader(split, block_size=block_size, batch_rows=rows, seed=seed)
    steps = -(-2 * loader.n_windows // rows)
    seen = torch.cat([loader.batch(s)[0] for s in range(steps)])[: 2 * loader.n_windows]
    targets = torch.cat([loader.batch(s)[1] for s in range(steps)])[: 2 * loader.n_windows]
    assert torch.equal((seen + 1) % n_tokens, targets)
    for epoch in (seen[: loader.n_windows], seen[loader.n_windows :]):
        starts = sorted(((epoch[:, 0] - epoch[0, 0]) % n_tokens).tolist())
        gaps = np.diff([*starts, starts[0] + n_tokens])
        short = n_tokens - (loader.n_windows - 1) * block_size
        assert sorted(gaps.tolist()) == sorted([short] + [block_size] * (loader.n_windows - 1))
        assert set(epoch.flatten().tolist()) == set(range(n_tokens))


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("n_micro", [1, 2, 4])
@pytest.mark.parametrize("order", ["permuted", "replacement"])
def test_ranks_and_micro_batches_are_slices_of_one_batch(make_shards, world, n_micro, order) -> None:
    """The global batch does not depend on how many ranks and micro-batches share it."""
    split = make_shards(np.random.default_rng(0).integers(0, 50000, 1000), shard_tokens=77).split("train")
    loader = Loader(split, block_size=16, batch_rows=32, seed=3, order=order)
    for step in (0, 1, 5):
        whole = loader.batch(step)
        parts = [
            [loader.batch(step, micro, n_micro, rank, world) for micro in range(n_micro)]
            for rank in range(world)
        ]
        for side in (0, 1):
            joined = torch.cat([torch.cat([micro[side] for micro in rank]) for rank in parts])
            assert torch.equal(joined, whole[side])
            assert parts[0][0][side].is_contiguous() and parts[0][0][side].dtype == torch.int64


@LAX
@given(n_tokens=st.integers(40, 400), rows=st.integers(1, 3), ramp=st.integers(1, 9), seed=st.integers(0, 3))
def test_a_ramp_reads_every_window_once_an_epoch(make_shards, n_tokens, rows, ramp, seed) -> None:
    """The ramp moves the borders between batches, not the rows."""
    split = make_shards(range(n_tokens)).split("train")
    plain = Loader(split, block_size=8, batch_rows=1, seed=seed)
    loader = Loader(split, block_size=8, batch_rows=4 * rows, seed=seed, ramp_steps=ramp)
    seen = torch.cat([loader.batch(s)[0] for s in range(2 * ramp)])
    assert torch.equal(seen, torch.cat([plain.batch(row)[0] for row in range(len(seen))]))
    for epoch in range(len(seen) // loader.n_windows):
        windows = seen[epoch * loader.n_windows : (epoch + 1) * loader.n_windows]
        assert len(set(windows[:, 0].tolist())) == loader.n_windows


def test_ranks_and_micro_batches_are_slices_of_a_ramped_batch(make_shards) -> None:
    split = make_shards(np.random.default_rng(0).integers(0, 50000, 1000)).split("train")
    loader = Loader(split, block_size=16, batch_rows=16, seed=3, ramp_steps=5)
    for step, (n_micro, world) in itertools.product(range(7), [(1, 1), (2, 2), (1, 4), (2, 1)]):
        parts = [loader.batch(step, m, n_micro, r, world, 2)[0] for r in range(world) for m in range(n_micro)]
        assert torch.equal(torch.cat(parts), loader.batch(step, skipped=2)[0])


def test_a_batch_depends_on_its_arguments_alone(make_shards) -> None:
    """Asked in any order, by any loader, among torch's and numpy's own random draws: the same batch."""
    shards = make_shards(range(5000), shard_tokens=512)
    first = Loader(shards.split("train"), block_size=32, batch_rows=8, seed=1)
    expected = {step: first.batch(step)[0] for step in range(20)}
    torch.manual_seed(0)
    np.random.seed(0)
    state = torch.get_rng_state()
    other = Loader(shards.split("train"), block_size=32, batch_rows=8, seed=1)
    for step in (19, 3, 3, 0, 11):
        assert torch.equal(other.batch(step)[0], expected[step])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(
        Loader(shards.split("train"), block_size=32, batch_rows=8, seed=2).batch(0)[0], expected[0]
    )


def test_a_batch_stays_what_it_was(make_shards) -> None:
    """The order of the data is part of the format: a run resumed under a later version must see the same rows.

    Rows 120 to 125 lie in the second epoch.
    """
    split = make_shards(range(1000)).split("train")
    x, _ = Loader(split, block_size=10, batch_rows=6, seed=1337).batch(20)
    assert x[:, 0].tolist() == [432, 842, 272, 572, 692, 762]


def test_epochs_differ_in_offset_and_order(make_shards) -> None:
    """Windows of another epoch begin elsewhere, and follow in another order."""
    loader = Loader(make_shards(range(1000)).split("train"), block_size=10, batch_rows=100, seed=0)
    epochs = [loader.batch(e)[0][:, 0] for e in range(4)]
    assert len({int(e[0]) % 10 for e in epochs}) > 1
    orders = {tuple(((e - e.min()) // 10).tolist()) for e in epochs}
    assert len(orders) == 4


def test_the_size_of_files_changes_nothing(make_shards) -> None:
    """Windows run across the borders of files, and around the end."""
    ids = np.random.default_rng(1).integers(0, 50000, 997)
    batches = [
        Loader(
            make_shards(ids, shard_tokens=size).split("train"), block_size=50, batch_rows=20, seed=4
        ).batch(0)
        for size in (None, 499, 64, 7, 1)
    ]
    for x, y in batches[1:]:
        assert torch.equal(x, batches[0][0]) and torch.equal(y, batches[0][1])


def test_replacement_draws_anywhere(make_shards) -> None:
    """nanoGPT's sampling: windows anywhere, never across the end, some twice."""
    loader = Loader(
        make_shards(range(200)).split("train"), block_size=20, batch_rows=4000, seed=0, order="replacement"
    )
    x, y = loader.batch(0)
    assert torch.equal(x + 1, y)  # none wraps
    assert set(x[:, 0].tolist()) == set(range(180))


@pytest.mark.parametrize(
    "n_tokens, block_size, rows", [(101, 10, 3), (100, 10, 3), (12, 10, 1), (11, 10, 4), (57, 8, 2)]
)
def test_evaluation_sees_every_target_once(make_shards, n_tokens, block_size, rows) -> None:
    """In order, each target with the ids before it; what is padded is ignored."""
    split = make_shards(range(n_tokens), shard_tokens=13).split("train")
    xs, ys = zip(*eval_batches(split, block_size, rows), strict=True)
    assert all(
        x.shape == y.shape and x.shape[1] == block_size and x.shape[0] <= rows
        for x, y in zip(xs, ys, strict=True)
    )
    x, y = torch.cat(xs).flatten(), torch.cat(ys).flatten()
    counted = y != IGNORE
    assert y[counted].tolist() == list(range(1, n_tokens))
    assert torch.equal(x[counted] + 1, y[counted])
    assert not x[~counted].any() and (~counted).sum() < block_size


def test_too_short_a_split_is_said(make_shards) -> None:
    """The setting, the length and a value that fits."""
    split = make_shards(range(64)).split("train")
    message = (
        r"model.block_size=64 needs at least 65 tokens, the train split has 64.\n  try: --model.block-size 63"
    )
    with pytest.raises(ConfigError, match=message):
        Loader(split, block_size=64, batch_rows=1, seed=0)
    Loader(split, block_size=63, batch_rows=1, seed=0).batch(0)


def test_a_split_shorter_than_a_window_is_still_evaluated(make_shards) -> None:
    """Little validation text gives one short window, not an error."""
    ((x, y),) = eval_batches(make_shards(range(10)).split("train"), 64, 4)
    assert x.shape == y.shape == (1, 64)
    assert y[0, :9].tolist() == list(range(1, 10)) and (y[0, 9:] == IGNORE).all()


def test_rows_that_cannot_be_shared_are_said(make_shards) -> None:
    loader = Loader(make_shards(range(64)).split("train"), block_size=8, batch_rows=6, seed=0)
    with pytest.raises(ConfigError, match="a batch of 6 rows has no micro-batch 0 of 4 on rank 0 of 1"):
        loader.batch(0, 0, 4)
    with pytest.raises(ConfigError, match="no micro-batch 0 of 1 on rank 2 of 2"):
        loader.batch(0, rank=2, world=2)
