"""Parameters and FLOPs of a model by arithmetic: nothing is built and torch is not imported.

Letters as in `regpt/models/__init__.py`: L layers, C channels, H heads, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from regpt.config import ModelConfig
from regpt.models import pad_vocab
from regpt.models.shape import VALUE_GATE_CHANNELS, has_values, window_of

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
    """Token embedding. Where it is also the head it is counted once."""
    positions: int
    """Learned positions."""
    blocks: int
    """Attention, MLP and norms of all layers, and the last norm."""
    matrices: int
    """Of `blocks`, the weights of attention and MLP: what Muon turns, gates aside."""
    head: int = 0
    """A head of its own; 0 where it is the token embedding."""
    tables: int = 0
    """n-gram tables and value embeddings: looked up, in no product."""
    padding: int
    """Rows that round the vocabulary up; always zero, in no published count, but they take memory."""

    @property
    def total(self) -> int:
        """What papers and Hugging Face count."""
        return self.tokens + self.positions + self.blocks + self.head + self.tables

    @property
    def embedding(self) -> int:
        """All that is looked up."""
        return self.tokens + self.positions + self.tables

    @property
    def non_embedding(self) -> int:
        """Everything else."""
        return self.blocks + self.head

    @property
    def multiplied(self) -> int:
        """What a token meets in matrix products: the blocks and the head."""
        return self.blocks + (self.head or self.tokens)

    @property
    def stored(self) -> int:
        """What the built model holds."""
        return self.total + self.padding


def count_parameters(config: ModelConfig, vocab_size: int) -> Parameters:
    """The parameters of a model of that shape."""
    C, bias = config.n_embd, int(config.bias and config.arch == "gpt2")
    attention = 4 * C * C + bias * 4 * C  # c_attn (3C, C) and c_proj (C, C)
    mlp = 8 * C * C + bias * 5 * C  # c_fc (4C, C) and c_proj (C, 4C)
    padding = (pad_vocab(vocab_size) - vocab_size) * C
    if config.arch == "modern":
        return _count_modern(config, vocab_size, padding)
    norm = C + bias * C
    return Parameters(
        tokens=vocab_size * C,
        positions=config.block_size * C,
        blocks=config.n_layer * (2 * norm + attention + mlp) + norm,
        matrices=12 * config.n_layer * C * C,
        padding=padding,
    )


def _count_modern(config: ModelConfig, vocab_size: int, padding: int) -> Parameters:
    m, C, L = config.modern, config.n_embd, config.n_layer
    with_values = sum(has_values(config, layer) for layer in range(L))
    gates = with_values * config.n_head * min(VALUE_GATE_CHANNELS, C)
    rows = vocab_size * with_values + (m.trigram or 0)
    rows += (vocab_size + 1) * vocab_size if m.bigram else 0
    return Parameters(
        tokens=vocab_size * C,
        positions=0 if m.rope else config.block_size * C,
        blocks=12 * L * C * C + gates + L * (m.residual_scalars + m.x0_scalars),
        matrices=12 * L * C * C,
        head=0 if m.tied else vocab_size * C,
        tables=rows * C,
        padding=padding * (1 if m.tied else 2),
    )


def forward_flops_per_token(config: ModelConfig, vocab_size: int, context: int | None = None) -> int:
    """FLOPs of one forward pass for one token that attends to `context` positions (None: the whole block), or to a layer's
    window where that is less: two for every weight it meets in a matrix product, and the two products of attention."""
    T = config.block_size if context is None else context
    windows = (window_of(config, layer) or T for layer in range(config.n_layer))
    seen = sum(min(window, T) for window in windows)
    return 2 * count_parameters(config, vocab_size).multiplied + 4 * config.n_embd * seen


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Training FLOPs for each token: 6 N + 12 L C T, as nanoGPT and llm.c count them (PaLM, appendix B).

    N leaves out what is looked up and keeps the head, which is a matrix product, also where it is the token embedding.
    The backward pass is two forward passes. Attention is counted as if nothing in a layer's window were masked.
    124M at T = 1024: 855 MFLOP.
    """
    return 3 * forward_flops_per_token(config, vocab_size)
