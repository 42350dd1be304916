"""What every model must offer, so that training, evaluation and generation need not know which one it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from regpt.config import ModelConfig, ModernConfig
from regpt.errors import ConfigError
from regpt.infer.cache import KVCache
from regpt.models import KVLayers, pad_vocab
from regpt.models.gpt2 import GPT2
from regpt.models.modern import Modern

pytestmark = pytest.mark.usefixtures("one_thread")

MODELS = [GPT2, Modern]
# All that is off by default, so that the contract holds for it too.
ON = {GPT2: ModernConfig(), Modern: ModernConfig(bigram=True, trigram=50, window=9)}
VOCAB, CONTEXT = 65, 24


class ListCache:
    """The plainest thing that follows `KVLayers`: chunks in lists, joined when asked for."""

    def __init__(self) -> None:
        self.length = 0
        self.chunks: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.ids: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.chunks.setdefault(layer, []).append((k, v))
        keys, values = zip(*self.chunks[layer], strict=True)
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def with_previous(self, ids: Tensor, before: int) -> Tensor:
        self.ids.append(ids)
        all_ids = torch.cat([torch.full((len(ids), before), -1), *self.ids], dim=1)
        return all_ids[:, self.length :]

    def advance(self, positions: int) -> None:
        self.length += positions


@pytest.fixture(params=MODELS, ids=lambda cls: cls.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    """In evaluation, its weights spread wide enough for positions to differ."""
    return made(request.param)


def made(cls: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    arch = "modern" if cls is Modern else "gpt2"
    config = ModelConfig(
        arch=arch, n_layer=3, n_head=4, n_embd=32, block_size=CONTEXT, dropout=0.1, modern=ON[cls]
    )
    made = cls(config, VOCAB).eval()
    with torch.no_grad():
        for p in made.parameters():
            if not p.any():  # what begins at zero hides what stands before it
                p.normal_(std=0.02)
            p.mul_(5.0) if p.dim() > 1 else None
    return made


def some_ids(rows: int = 2, positions: int = CONTEXT) -> Tensor:
    return torch.randint(0, VOCAB, (rows, positions), generator=torch.Generator().manual_seed(1))


def through(model: Any, cache: KVLayers, ids: Tensor, sizes: list[int]) -> Tensor:
    """Logits of ids put in by chunks of these sizes."""
    assert sum(sizes) == ids.shape[1]
    return torch.cat([model.head(model.hidden(chunk, cache)) for chunk in ids.split(sizes, dim=1)], dim=1)


def test_says_what_it_is(model: Any) -> None:
    assert model.config.block_size == CONTEXT
    assert (model.vocab_size, model.padded_vocab_size) == (VOCAB, pad_vocab(VOCAB))


@pytest.mark.parametrize(("rows", "positions"), [(1, 1), (1, CONTEXT), (3, 7)])
def test_shapes(model: Any, rows: int, positions: int) -> None:
    ids = some_ids(rows, positions)
    hidden = model.hidden(ids)
    assert hidden.shape == (rows, positions, 32)
    assert model.head(hidden).shape == model(ids).shape == (rows, positions, model.padded_vocab_size)
    assert torch.equal(model.head(hidden), model(ids))
    assert model(ids, ids).shape == model(ids, ids, reduction="sum").shape == ()
    assert model(ids, ids, reduction="none").shape == (rows, positions)
    assert model(ids, ids).dtype == torch.float32


def test_padding_ids_are_masked(model: Any) -> None:
    logits = model(some_ids())
    assert torch.isneginf(logits[..., VOCAB:]).all() and logits[..., :VOCAB].isfinite().all()


@pytest.mark.parametrize("changed", range(0, CONTEXT, 5))
def test_a_token_changes_nothing_before_it(model: Any, changed: int) -> None:
    """Not by one bit; and everything from it on."""
    ids = some_ids()
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % VOCAB
    with torch.no_grad():
        same = (model(ids) == model(other)).all(dim=-1)
    assert same[:, :changed].all() and not same[:, changed:].any()


def test_no_gradient_comes_from_the_future(model: Any) -> None:
    """Of the first five losses, with respect to the embeddings of the tokens after them."""
    seen: list[Tensor] = []

    def keep(_module: object, _inputs: object, output: Tensor) -> None:
        output.retain_grad()
        seen.append(output)

    model.wte.register_forward_hook(keep)
    ids = some_ids()
    model(ids, ids, reduction="none")[:, :5].sum().backward()
    grad = seen[0].grad
    assert grad is not None and grad[:, :5].any(dim=-1).all() and not grad[:, 5:].any()


def test_rows_do_not_see_each_other(model: Any) -> None:
    ids = some_ids(3)
    with torch.no_grad():
        alone = torch.cat([model(row[None]) for row in ids])
        torch.testing.assert_close(model(ids), alone, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes",
    [
        [1] * CONTEXT,
        [CONTEXT],
        [1, CONTEXT - 1],
        [CONTEXT - 1, 1],
        [7, 1, 1, 8, 2, 5],
        [12, 12],
    ],
    ids=str,
)
@pytest.mark.parametrize("cache", ["list", "buffers"])
def test_cached_equals_the_full_forward(model: Any, sizes: list[int], cache: str) -> None:
    """Token by token and in chunks, whoever owns the cache."""
    ids = some_ids()
    holder: KVLayers = (
        ListCache() if cache == "list" else KVCache(model.config, 2, CONTEXT, "cpu", torch.float32)
    )
    with torch.no_grad():
        torch.testing.assert_close(through(model, holder, ids, sizes), model(ids), rtol=0.0, atol=2e-5)
    assert holder.length == CONTEXT


def test_cache_ends_where_the_context_does(model: Any) -> None:
    cache = ListCache()
    model.hidden(some_ids(1, CONTEXT - 1), cache)
    with pytest.raises(ConfigError) as caught:
        model.hidden(some_ids(1, 2), cache)
    assert str(caught.value) == "25 positions do not fit the model's context of 24 tokens."


@pytest.mark.parametrize("cls", MODELS, ids=lambda cls: cls.__name__)
def test_state_dict_round_trip(cls: Any) -> None:
    """Through safetensors' bytes, which refuse shared memory: every entry stands for itself."""
    one, other, ids = made(cls, seed=0), made(cls, seed=9), some_ids()
    assert not torch.equal(one(ids), other(ids))
    other.load_state_dict(load(save(one.state_dict())), strict=True)
    assert torch.equal(one(ids), other(ids))
    assert set(one.state_dict()) == {name for name, _ in one.named_parameters()}


def test_learns(model: Any) -> None:
    """One batch by heart, from the weights that training starts with."""
    torch.manual_seed(0)
    model = type(model)(model.config, VOCAB)
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2), some_ids(2, 12)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
    assert model.eval()(ids[:, :-1], ids[:, 1:]).item() < 0.2


@pytest.mark.slow
def test_exports_as_one_graph(model: Any) -> None:
    """torch.export: no Python decides anything by the data."""
    ids = some_ids()
    program = torch.export.export(model, (ids,))
    torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.slow
def test_training_step_traces_without_a_break(model: Any) -> None:
    """What torch.compile of the training step needs; the backend that runs the graph as it is needs no compiler."""
    ids = some_ids()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(model(ids, ids), list(model.parameters()))
    got = torch.autograd.grad(compiled(ids, ids), list(model.parameters()))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
