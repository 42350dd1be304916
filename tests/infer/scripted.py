"""Stand-ins for the engine's tests: a byte tokenizer, and a model that says what it is told to say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from regpt.config import ModelConfig
from regpt.models.gpt2 import GPT2


class ByteIds:
    """As much of a tokenizer as the engine asks for: ids are bytes, modulo 256; the last ends a document."""

    def __init__(self, vocab_size: int = 257) -> None:
        self.vocab_size, self.eot_id = vocab_size, vocab_size - 1

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(i % 256 for i in ids)


class Scripted(nn.Module):
    """After a prompt of one token it says `script`, one id a position, then the end-of-text token for ever.

    Generate with temperature 0. A context of 10,000 tokens, so that it never slides.
    """

    def __init__(self, script: Sequence[int], vocab_size: int = 257) -> None:
        super().__init__()
        self.config = ModelConfig(n_layer=1, n_head=1, n_embd=1, block_size=10_000)
        self.vocab_size = self.padded_vocab_size = vocab_size
        self.weight = nn.Parameter(torch.zeros(1))
        self.script = list(script)

    def hidden(self, ids: Tensor, cache: object = None) -> Tensor:
        start = cache.length if cache is not None else 0
        if cache is not None:
            cache.advance(ids.shape[1])
        positions = torch.arange(start, start + ids.shape[1])
        return positions.expand(len(ids), -1)[:, :, None].float()

    def head(self, hidden: Tensor) -> Tensor:
        script = torch.tensor([*self.script, self.vocab_size - 1])
        said = script[hidden[:, :, 0].long().clamp(max=len(self.script))]
        return nn.functional.one_hot(said, self.vocab_size).float()


def random_model(
    vocab_size: int = 257, *, seed: int = 0, spread: float = 5.0, dropout: float = 0.0, **shape: int
) -> GPT2:
    """A tiny GPT-2. `spread` multiplies its initial weights, which make all tokens nearly equally likely."""
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16} | shape
    model = GPT2(ModelConfig(dropout=dropout, **shape), vocab_size).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(spread)
    return model
