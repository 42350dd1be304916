"""How much memory a training process will take at its peak, by arithmetic; checked against processes that ran.

On a CPU the figure is the resident set of the whole process, with malloc told to keep freed memory (train/allocator.py):
the heap then holds more than is alive at any instant, and the factors here were fitted to runs of 4 to 24 layers, 128 to
1,024 channels, vocabularies of 65 to 50,257, float32 and bfloat16, which they meet within 15 % (tests/models/test_memory.py).
The same run repeated may differ by a tenth. Losses by chunks (2,048 ids and more) came after these fits and meet them: with
50,257 ids the plan is 0.95 to 0.97 of the peak at 12 x 768, 0.91 and 0.95 at 4 x 256. On a GPU it is what PyTorch's
allocator hands out; that has not been measured yet. torch.compile needs less.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from regpt.config import ModelConfig
from regpt.models import pad_vocab
from regpt.models.attention import by_products
from regpt.models.count import count_parameters
from regpt.models.loss import CHUNKED_FROM, chunk_rows

# Python, torch, its kernels, Dynamo (which AdamW imports; Muon does without), the tokenizer, a sample's generation.
PROCESS_BYTES = 366 << 20
# Bytes kept for the backward pass, for each token, layer and channel: the stream and both norms' outputs, q k v and the
# attention's output, the MLP before and after its GELU. Under autocast all but the stream are of two bytes.
ACTIVATION_BYTES = {"float32": 64, "bfloat16": 36, "float16": 36}
# Of the modern model, every switch at its default: also queries and keys before and after their norm and rotation, and what
# the stream was multiplied by. Switches that are off make it up to a quarter less.
MODERN_ACTIVATION_BYTES = {"float32": 80, "bfloat16": 49, "float16": 49}
STREAM_BYTES = 4  # of one channel between layers
LOGIT_BYTES = 12  # float32 logits, their log-softmax, their gradient
SOFTCAP_BYTES = 8  # the hyperbolic tangent, and its gradient
# Of a logit in the chunk at hand (models/loss.py): one float32 number for all, with a copy in the products' dtype; its tanh.
CHUNK_LOGIT_BYTES = {"float32": 4, "bfloat16": 6, "float16": 6}
CHUNK_SOFTCAP_BYTES = 4
# What the heap holds over what is alive: activations, logits; the fit of one backward pass a step, and of several.
CPU_ONE_PASS = (1.27, 1.54)
CPU_SEVERAL_PASSES = {"float32": (1.76, 2.60), "bfloat16": (1.25, 1.80), "float16": (1.25, 1.80)}
# Gradients of a model larger than its activations; the room that these leave is not all in the right places.
CPU_GRADIENTS = 1.6


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes by purpose, at the peak of a training step."""

    process: int
    """Python and PyTorch themselves; 0 on a GPU."""
    weights: int
    gradients: int
    """What of the gradients does not fit into the room that activations leave when they are freed."""
    optimizer: int
    """AdamW's two moments; of Muon's matrices one."""
    activations: int
    logits: int
    saving: int = 0
    """The copy of weights and moments that a checkpoint is written from, while training goes on or where they are in
    shards; 0 on a GPU, whose copy lies in the host's memory."""

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(dataclasses.astuple(self))


def saved_bytes_per_token(config: ModelConfig, dtype: str, device_type: str) -> int:
    """What one layer keeps of one token from its forward pass for its backward pass.

    With dropout there are its masks: a byte each on CUDA, numbers elsewhere. A fused attention keeps no T x T matrix. Where
    it is not used there is one a head, four with dropout (weights, mask, their product, and one in passing): on a CPU by
    our own products (`models/attention.py`), or, with dropout, by PyTorch's, which turn queries, keys and values float32, as
    MPS does in training.
    """
    width = 4 if dtype == "float32" else 2
    kept = (MODERN_ACTIVATION_BYTES if config.arch == "modern" else ACTIVATION_BYTES)[dtype] * config.n_embd
    if config.dropout:
        kept += 2 * config.n_embd * (1 if device_type == "cuda" else width)
    matrices = 4 if config.dropout else 1
    if by_products(device_type, getattr(torch, dtype), config.block_size):
        kept += matrices * width * config.n_head * config.block_size
    elif device_type == "mps" or (device_type == "cpu" and config.dropout):
        kept += 3 * (4 - width) * config.n_embd + matrices * 4 * config.n_head * config.block_size
    return kept


def logit_bytes(
    config: ModelConfig, vocab_size: int, tokens: int, dtype: str, *, compiled: bool = False
) -> int:
    """What the loss of so many tokens holds: all logits, or those of a chunk."""
    width, capped = pad_vocab(vocab_size), config.arch == "modern" and config.modern.softcap is not None
    if compiled or width < CHUNKED_FROM:
        return (LOGIT_BYTES + SOFTCAP_BYTES * capped) * tokens * width
    chunk = (CHUNK_LOGIT_BYTES[dtype] + CHUNK_SOFTCAP_BYTES * capped) * chunk_rows(tokens, width) * width
    of_gradient = 0 if dtype == "float32" else 2 * width * config.n_embd  # a part of the matrix's
    return chunk + of_gradient


def memory_estimate(
    config: ModelConfig,
    vocab_size: int,
    *,
    micro_rows: int,
    dtype: str,
    device_type: str,
    n_micro: int = 1,
    optimizer: str = "adamw",
    saves_in_background: bool = False,
    shards: int = 1,
    exact_sums: bool = False,
    checkpoint_activations: bool = False,
    compiled: bool = False,
) -> Memory:
    """The peak of one rank's process, in bytes; of rank 0, which also writes the checkpoints.

    Args:
        micro_rows: rows of config.block_size in one forward pass.
        dtype: of matrix products; weights, gradients and moments are float32.
        n_micro: passes whose gradients are added up before an update.
        optimizer: adamw or muon.
        saves_in_background: checkpoints are written while training goes on.
        shards: ranks that share one copy of weights, gradients and moments (FSDP2).
        exact_sums: gradients of micro-batches are added up as a tree, which keeps a list for each of its levels.
        checkpoint_activations: only the stream is kept between layers, and one layer at a time is computed again.
        compiled: torch.compile traces the loss, whose logits then are all there.
    """
    n, tokens = count_parameters(config, vocab_size), micro_rows * config.block_size
    layer = saved_bytes_per_token(config, dtype, device_type)
    if checkpoint_activations:
        activations = tokens * (config.n_layer * STREAM_BYTES * config.n_embd + layer)
    else:
        activations = tokens * config.n_layer * layer
    if dtype != "float32":
        activations += 2 * (n.multiplied + n.padding)  # autocast's copies of the weights
    logits = logit_bytes(config, vocab_size, tokens, dtype, compiled=compiled)
    head = 4 * pad_vocab(vocab_size) * config.n_embd  # the first gradient, made while all else is still there
    if device_type == "cpu":
        factors = CPU_ONE_PASS if n_micro == 1 else CPU_SEVERAL_PASSES[dtype]
        activations, logits = round(activations * factors[0]), round(logits * factors[1])
    if exact_sums:
        gradients = (1 + (n_micro - 1).bit_length()) * 4 * n.stored + head
    elif n_micro > 1:
        gradients = 4 * n.stored + head
    elif device_type != "cpu":
        gradients = max(head, 4 * n.stored - activations - logits)
    else:
        gradients = max(head, round(CPU_GRADIENTS * 4 * n.stored) - activations - logits)
    moments = 8 * n.stored - (4 * n.matrices if optimizer == "muon" else 0)
    gathered = 0
    if shards > 1:  # what is not in layers, and two layers, one of them ahead of time
        gathered = 4 * (n.stored - n.blocks) + 2 * 4 * n.blocks // config.n_layer
    return Memory(
        process=PROCESS_BYTES if device_type == "cpu" else 0,
        weights=4 * n.stored // shards + gathered,
        gradients=gradients // shards,
        optimizer=moments // shards,
        activations=activations,
        logits=logits,
        saving=4 * n.stored + moments if device_type == "cpu" and (saves_in_background or shards > 1) else 0,
    )
