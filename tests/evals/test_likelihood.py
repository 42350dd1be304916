"""Log-probabilities of continuations: against Hugging Face, against plain passes, under any batches and ranks."""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from harness import as_hugging_face
from regpt.config import ModelConfig, ModernConfig
from regpt.errors import DataError, DeviceError
from regpt.evals.likelihood import COPIED, Request, Scored, score
from regpt.infer.cache import Continued
from regpt.models import build_model
from regpt.train.dist import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB, CONTEXT = 211, 48
SHAPES = {
    "gpt2": ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=CONTEXT, dropout=0.1),
    "modern": ModelConfig(arch="modern", n_layer=3, n_head=4, n_embd=32, block_size=CONTEXT, dropout=0.1),
    "modern, all switches": ModelConfig(
        arch="modern",
        n_layer=3,
        n_head=4,
        n_embd=32,
        block_size=CONTEXT,
        modern=ModernConfig(bigram=True, trigram=50, window=9, softcap=15.0, embed_norm=True),
    ),
    "modern, no positions but learned ones": ModelConfig(
        arch="modern", n_layer=2, n_head=2, n_embd=32, block_size=CONTEXT, modern=ModernConfig(rope=False)
    ),
}


def made(config: ModelConfig, vocab_size: int = VOCAB) -> Any:
    """Its weights spread wide enough for every position to tell."""
    torch.manual_seed(1)
    model: Any = build_model(config, vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.08)
    return model.eval()


def requests(seed: int = 0, contexts: int = 30) -> list[Request]:
    """Contexts of 1 to 40 ids with 1, 2 or 4 continuations each, some longer together than the model's context."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> tuple[int, ...]:
        return tuple(draw.choices(range(VOCAB), k=draw.randint(least, most)))

    found = [
        Request(context, ids(1, 16))
        for _ in range(contexts)
        for context in [ids(1, 40)] * draw.choice((1, 2, 4))
    ]
    return draw.sample(found, len(found))


def plainly(logits_of: Any, request: Request) -> Scored:
    """One request by its own pass, softmax over all ids at all positions."""
    ids = torch.tensor([(request.context + request.continuation)[-(CONTEXT + 1) :]])
    n = len(request.continuation)
    with torch.no_grad():
        logits: Tensor = logits_of(ids[:, :-1])[0, -n:, :VOCAB].double()
    target = ids[0, -n:]
    nats = torch.log_softmax(logits, 1).gather(1, target[:, None]).sum()
    return Scored(float(nats), n, bool((logits.argmax(1) == target).all()))


def alike(ours: list[Scored], others: list[Scored], tolerance: float = 1e-4) -> bool:
    return len(ours) == len(others) and all(
        abs(a.logprob - b.logprob) < tolerance and (a.tokens, a.greedy) == (b.tokens, b.greedy)
        for a, b in zip(ours, others, strict=True)
    )


def likeliest(model: Any, request: Request, tokens: int) -> Request:
    """The same context with what the model holds for likeliest."""
    ids = list(request.context)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1, :VOCAB].argmax()))
    return Request(request.context, tuple(ids[len(request.context) :]))


def test_log_probabilities_equal_hugging_face() -> None:
    pytest.importorskip("transformers")
    ours = made(SHAPES["gpt2"])
    theirs = as_hugging_face(ours)
    asked = requests()
    assert alike(score(ours, asked), [plainly(lambda ids: theirs(ids).logits, r) for r in asked])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_every_model_scores_as_by_a_pass_of_each_request_alone(name: str, batch_tokens: int) -> None:
    """Shared contexts, cut ones and lone ones, in batches of one row up to all of them."""
    model = made(SHAPES[name])
    asked = requests()
    asked += [likeliest(model, r, 5) for r in asked[:8] if len(r.context) < CONTEXT - 5]
    expected = [plainly(model, r) for r in asked]
    assert {s.greedy for s in expected} == {True, False}
    assert max(len(r.context + r.continuation) for r in asked) > CONTEXT + 1
    assert alike(score(model, asked, batch_tokens=batch_tokens), expected)


def test_keys_are_copied_for_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context with many short choices: what they share counts for what a pass may take, too."""
    model = made(dataclasses.replace(SHAPES["gpt2"], block_size=512))
    context = tuple(i % VOCAB for i in range(400))
    asked = [Request(context, (choice, choice)) for choice in range(100)]
    expected = score(model, asked, batch_tokens=100_000)
    sizes, update = [], Continued.update

    def spied(self: Continued, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = update(self, layer, k, v)
        sizes.append(found[0].shape[0] * found[0].shape[2])
        return found

    monkeypatch.setattr(Continued, "update", spied)
    assert alike(score(model, asked, batch_tokens=256), expected)
    assert 400 < max(sizes) <= COPIED * 256


def test_too_little_memory_for_a_context_names_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(SHAPES["gpt2"])

    def full(*shape: int, **more: object) -> Tensor:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(DeviceError, match=r"a cache of 1 x 38 positions .*\n  try: .*\(--batch-tokens\)"):
        score(model, [Request((1,) * 39, (2,)), Request((1,) * 39, (3,))])


def test_two_ranks_give_the_bits_of_one() -> None:
    model, asked = made(SHAPES["gpt2"]), requests()
    alone = score(model, asked, batch_tokens=128)
    shares = [score(model, asked, batch_tokens=128, ranks=Apart(rank=r, world=2)) for r in range(2)]
    assert [a.logprob + b.logprob for a, b in zip(*shares, strict=True)] == [s.logprob for s in alone]
    counts = [sum(s.logprob != 0 for s in share) for share in shares]
    assert min(counts) > len(asked) // 4 and sum(counts) == len(asked)


class Apart(Ranks):
    """A rank whose sums hold its own share only."""

    def total(self, values: Tensor) -> Tensor:
        return values


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    model, asked = made(SHAPES["gpt2"]), requests(contexts=5)
    expected = score(model, asked)
    model.train()
    assert score(model, asked) == expected and model.training


def test_progress_counts_requests_and_between_may_stop() -> None:
    model, asked = made(SHAPES["gpt2"]), requests()
    heard: list[tuple[int, int]] = []
    score(model, asked, batch_tokens=64, progress=lambda done, total: heard.append((done, total)))
    assert len(heard) > 5 and heard[-1] == (len(asked), len(asked))
    assert all(a < b for (a, _), (b, _) in itertools.pairwise(heard))

    def stop() -> None:
        raise KeyboardInterrupt

    model.train()
    with pytest.raises(KeyboardInterrupt):
        score(model, asked, between=stop)
    assert model.training


def test_nothing_to_score_is_no_work() -> None:
    assert score(made(SHAPES["gpt2"]), []) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (
            Request((), (1,)),
            "request 2 has an empty context.\n  expected: at least one token; end-of-text stands",
        ),
        (Request((1,), ()), "request 2 has an empty continuation."),
        (
            Request((1,), (2,) * (CONTEXT + 1)),
            f"continuation 2 is longer than the model's context.\n  got: {CONTEXT + 1} tokens",
        ),
        (
            Request((1,), (VOCAB,)),
            f"request 2 has an id that is not in the model's vocabulary.\n  got: {VOCAB}\n"
            f"  expected: ids from 0 to {VOCAB - 1}\n  try: the tokenizer that the model was trained with",
        ),
        (Request((-1,), (1,)), "request 2 has an id that is not in the model's vocabulary.\n  got: -1"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_any_pass(request_: Request, message: str) -> None:
    model = made(SHAPES["gpt2"])
    model.hidden = None
    with pytest.raises(DataError) as caught:
        score(model, [Request((1,), (2,)), request_])
    assert str(caught.value).startswith(message)
