"""Parameters and FLOPs of a model by arithmetic: nothing is built and torch is not imported.

Letters as in `regpt/models/__init__.py`: L layers, C channels, H heads, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from regpt.config import ModelConfig
from regpt.models import pad_vocab

# The four published shapes. With the vocabulary of 50,257: 124,439,808 · 354,823,168 · 774,030,080 · 1,557,611,200.
SIZES = {
    "gpt2": ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024),
    "gpt2-medium": ModelConfig(n_layer=24, n_head=16, n_embd=1024, block_size=1024),
    "gpt2-large": ModelConfig(n_layer=36, n_head=20, n_embd=1280, block_size=1024),
    "gpt2-xl": ModelConfig(n_layer=48, n_head=25, n_embd=1600, block_size=1024),
}


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """How many numbers a model learns, by place."""

    tokens: int
    """Token embedding, which is also the head: counted once."""
    positions: int
    """Position embedding."""
    blocks: int
    """Attention, MLP and norms of all layers, and the last norm."""
    padding: int
    """Rows that round the vocabulary up; always zero, in no published count, but they take memory."""

    @property
    def total(self) -> int:
        """What papers and Hugging Face count."""
        return self.tokens + self.positions + self.blocks

    @property
    def embedding(self) -> int:
        """Both embeddings."""
        return self.tokens + self.positions

    @property
    def non_embedding(self) -> int:
        """Everything else."""
        return self.blocks

    @property
    def stored(self) -> int:
        """What the built model holds."""
        return self.total + self.padding


def count_parameters(config: ModelConfig, vocab_size: int) -> Parameters:
    """The parameters of GPT-2 in the shape of `config`."""
    C, bias = config.n_embd, int(config.bias)
    norm = C + bias * C
    attention = 4 * C * C + bias * 4 * C  # c_attn (3C, C) and c_proj (C, C)
    mlp = 8 * C * C + bias * 5 * C  # c_fc (4C, C) and c_proj (C, 4C)
    return Parameters(
        tokens=vocab_size * C,
        positions=config.block_size * C,
        blocks=config.n_layer * (2 * norm + attention + mlp) + norm,
        padding=(pad_vocab(vocab_size) - vocab_size) * C,
    )


def forward_flops_per_token(config: ModelConfig, vocab_size: int, context: int | None = None) -> int:
    """FLOPs of one forward pass for one token that attends to `context` positions (None: the whole block): two for
    every weight it meets in a matrix product, and the two products of attention."""
    T = config.block_size if context is None else context
    parameters = count_parameters(config, vocab_size)
    return 2 * (parameters.total - parameters.positions) + 4 * config.n_layer * config.n_embd * T


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Training FLOPs for each token: 6 N + 12 L C T, as nanoGPT and llm.c count them (PaLM, appendix B).

    N leaves out the position embedding, which is looked up, and keeps the token embedding, which as the head is a
    matrix product. The backward pass is two forward passes. Attention is counted as if nothing were masked.
    124M at T = 1024: 855 MFLOP.
    """
    return 3 * forward_flops_per_token(config, vocab_size)
