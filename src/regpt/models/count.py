"""Parameters, FLOPs and memory of a model by arithmetic: nothing is built and torch is not imported.

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


MIB = 2**20
# What a process or device holds before the first tensor of ours. CPU: Python, PyTorch's CPU build, its kernels, and
# Dynamo, which the first optimizer step imports; measured, Linux. CUDA: cuBLAS's workspace; the context is not counted.
PROCESS_BYTES = {"cpu": 310 * MIB, "cuda": 32 * MIB}
# On a CPU, freed blocks are kept (train/allocator.py), and glibc cannot use one for an aligned request of equal size,
# so more is resident than is alive: by these factors, fitted to 50 runs from 0.8 M to 354 M parameters with glibc 2.36,
# (activations, logits) without and with accumulation. Largest error 14 % and 19 %, from run to run as much as 15 %.
RESIDENT_OVER_ALIVE = {False: (1.25, 1.55), True: (1.75, 2.40)}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a training step: when the backward pass begins, and all activations are alive."""

    weights: int
    """float32, whatever the arithmetic."""
    gradients: int
    """float32; those that are alive beside the activations."""
    optimizer: int
    """AdamW: two float32 moments."""
    activations: int
    """What the backward pass needs from the forward pass, and the weights cast to 16 bits."""
    logits: int
    """Log-probabilities and two gradients, in float32."""
    process: int
    """Python and PyTorch themselves."""

    @property
    def total(self) -> int:
        """All together: the peak resident set on a CPU, the peak that PyTorch allocates on a GPU."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.process


def saved_bytes_per_token(config: ModelConfig, dtype: str, device_type: str) -> int:
    """Activations that one layer keeps for its backward pass, for one token, run eagerly.

    In C numbers: two residual inputs of norms, their two outputs, q k v, attention's output, and 4 + 4 around GELU.
    With 16 bits only the residual stream stays float32. Dropout keeps its mask. A fused attention keeps no T x T matrix;
    CPU with dropout and MPS in training have none: three float32 matrices stay, and a fourth in passing.
    """
    C, narrow = config.n_embd, dtype != "float32"
    width = 2 if narrow else 4
    kept = (2 * 4 + 14 * width) * C
    if config.dropout:
        kept += 2 * C * (1 if device_type == "cuda" else width)
    if device_type == "mps" or (device_type == "cpu" and config.dropout):
        kept += 3 * (4 - width) * C + 4 * 4 * config.n_head * config.block_size  # q, k, v turn float32 there
    return kept


def memory_estimate(
    config: ModelConfig,
    vocab_size: int,
    *,
    micro_rows: int,
    dtype: str,
    device_type: str,
    n_micro: int = 1,
    state_bytes: int = 8,
) -> Memory:
    """The peak memory of training on one device, without torch.compile (which needs less).

    Args:
        micro_rows: rows of block_size tokens in one forward pass.
        dtype: of matrix products: float32, bfloat16 or float16.
        device_type: cpu, cuda or mps.
        n_micro: forward passes in one update; above 1, gradients wait while activations are alive.
        state_bytes: optimizer state for each parameter.
    """
    parameters = count_parameters(config, vocab_size)
    tokens, stored = micro_rows * config.block_size, parameters.stored
    activations = tokens * config.n_layer * saved_bytes_per_token(config, dtype, device_type)
    if dtype != "float32":
        activations += 2 * (stored - parameters.positions)
    logits = 3 * 4 * tokens * pad_vocab(vocab_size)
    head = 4 * (parameters.tokens + parameters.padding)  # its gradient waits for the embedding's, to be added
    gradients = 4 * stored + (head if n_micro > 1 else 0)
    if device_type == "cpu":
        more_activations, more_logits = RESIDENT_OVER_ALIVE[n_micro > 1]
        activations, logits = round(more_activations * activations), round(more_logits * logits)
    elif n_micro == 1:  # gradients appear while activations go: only what does not fit their place adds
        gradients = max(head, gradients - activations - logits)
    return Memory(
        weights=4 * stored,
        gradients=gradients,
        optimizer=state_bytes * stored,
        activations=activations,
        logits=logits,
        process=PROCESS_BYTES.get(device_type, 0),
    )


def evaluation_bytes(config: ModelConfig, vocab_size: int, *, rows: int, dtype: str) -> int:
    """What one evaluation pass over `rows` of block_size tokens needs beside the weights: the logits, their float32
    copy where they are narrow, and the log-probabilities; or one layer's activations, where those are more."""
    narrow = dtype != "float32"
    logits = pad_vocab(vocab_size) * (4 + 4 + (2 if narrow else 0))
    layer = config.n_embd * (2 * 4 + 8 * (2 if narrow else 4))
    return rows * config.block_size * max(logits, layer)
