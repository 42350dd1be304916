"""Tokenizers and texts that several files here ask for; GPT-2's own only where the shared data is given."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiktoken
from sample_texts import RHYME
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tiktoken_ext import openai_public

from regpt.tokenizers.bpe import BPETokenizer, train_bpe
from regpt.tokenizers.gpt2 import SHA256, GPT2Tokenizer, open_gpt2


@pytest.fixture(scope="session")
def gpt2(test_data: Path) -> GPT2Tokenizer:
    """Ours."""
    return open_gpt2(str(test_data / "tokenizer"))


@pytest.fixture(scope="session")
def tiktoken_gpt2(test_data: Path) -> tiktoken.Encoding:
    """The authority: tiktoken's own reader, split pattern and hashes, on the local files instead of its URLs."""
    folder = test_data / "tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # local files: no copies
        ranks = data_gym_to_mergeable_bpe_ranks(
            vocab_bpe_file=str(folder / "vocab.bpe"),
            encoder_json_file=str(folder / "encoder.json"),
            vocab_bpe_hash=SHA256["vocab.bpe"],
            encoder_json_hash=SHA256["encoder.json"],
        )
    return tiktoken.Encoding(
        name="gpt2-reference",
        pat_str=openai_public.r50k_pat_str,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )


@pytest.fixture(scope="session")
def small_bpe() -> BPETokenizer:
    """Trained on a rhyme, for tests that need no data."""
    return train_bpe([RHYME, RHYME], 320)
