"""GPT-2's tokenizer, and two small models of its vocabulary: of random weights, and trained for some dozen steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regpt.config import ModelConfig
from regpt.models.gpt2 import GPT2
from regpt.tokenizers import Tokenizer, open_tokenizer


@pytest.fixture(scope="session")
def gpt2_files(test_data: Path) -> Path:
    return test_data / "tokenizer"


@pytest.fixture(scope="session")
def tokenizer(gpt2_files: Path) -> Tokenizer:
    """GPT-2's."""
    return open_tokenizer("gpt2", files=str(gpt2_files))


def small_model(n_embd: int = 64, n_layer: int = 2, block_size: int = 256) -> GPT2:
    torch.manual_seed(3)
    shape = ModelConfig(n_layer=n_layer, n_head=2, n_embd=n_embd, block_size=block_size, dropout=0.0)
    return GPT2(shape, 50257).eval()


@pytest.fixture(scope="session")
def random_model() -> GPT2:
    """Random weights, spread so wide that it has opinions."""
    model = small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0) if p.dim() > 1 else None
    return model


@pytest.fixture(scope="session")
def trained_model(test_data: Path, tokenizer: Tokenizer) -> GPT2:
    """Some dozen steps on web text: it knows which tokens are frequent and which follow one another."""
    text = (test_data / "small" / "fineweb_sample_1MB.txt").read_text(encoding="utf-8")[:200_000]
    ids = torch.tensor(tokenizer.encode(text))
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    draw = torch.Generator().manual_seed(0)
    for _ in range(40):
        at = torch.randint(len(ids) - 65, (8,), generator=draw)
        rows = torch.stack([ids[i : i + 65] for i in at.tolist()])
        loss = model(rows[:, :-1], rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 8.0  # ln 50257 = 10.8
    return model.eval()
