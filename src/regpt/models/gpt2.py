"""GPT-2 to the letter: the decoder of Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".

Pre-norm blocks, learned positions, tanh GELU, one matrix for embedding and head. Parameter names equal Hugging Face's
`GPT2Model` (wte wpe h.0.ln_1 h.0.attn.c_attn …), except that our linear weights are (out, in) and HF's Conv1D (in, out).
Shapes are named in `regpt/models/__init__.py`.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regpt.config import ModelConfig
from regpt.errors import ConfigError
from regpt.models import KVLayers, pad_vocab
from regpt.models.attention import attend
from regpt.models.loss import cross_entropy, in_chunks, linear_cross_entropy
from regpt.models.shape import check_shape

INIT_STD = 0.02  # of every matrix and embedding, as Hugging Face; OpenAI's model.py has 0.01 for wpe
MLP_RATIO = 4


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVLayers | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D)
        y = attend(q, k, v, dropout=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return cast(Tensor, self.resid_dropout(self.c_proj(y)))


class MLP(nn.Module):
    """Position-wise feed-forward, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, MLP_RATIO * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(MLP_RATIO * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C)
        return cast(Tensor, self.dropout(self.c_proj(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVLayers | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class GPT2(nn.Module):
    """The language model.

    Args:
        config: the shape; `n_head` must divide `n_embd`.
        vocab_size: ids that exist. Inside it is padded to a multiple of 128; the logits of padding ids are -inf, so
            they can be neither sampled nor learned.

    Raises:
        ConfigError: where the shape is impossible.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check_shape(config)
        self.config, self.vocab_size, self.padded_vocab_size = config, vocab_size, pad_vocab(vocab_size)
        self.checkpoint_activations = False  # set while training, where memory is short
        self.wte = nn.Embedding(self.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        # Added by the head's own matrix product, so that masking costs no pass over the logits.
        self.register_buffer("pad_bias", torch.empty(self.padded_vocab_size), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """N(0, 0.02) for matrices and embeddings; projections into the stream scaled by 1/sqrt(2 n_layer), as there
        are that many of them and their variances add up (GPT-2, section 2.3). Biases 0, norms 1."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(std=INIT_STD / math.sqrt(2 * self.config.n_layer))
            elif p.dim() >= 2:
                p.normal_(std=INIT_STD)
            elif name.endswith(".bias"):
                p.zero_()
            else:
                p.fill_(1.0)
        self.wte.weight[self.vocab_size :] = 0.0
        bias = cast(Tensor, self.pad_bias).zero_()
        bias[self.vocab_size :] = -math.inf

    def hidden(self, ids: Tensor, cache: KVLayers | None = None) -> Tensor:
        """ids (B, T) int64 -> the normalised stream (B, T, C). With a cache, the ids continue what it holds."""
        T = ids.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ConfigError(
                f"{start + T} positions do not fit the model's context of {self.config.block_size} tokens."
            )
        pos = torch.arange(start, start + T, device=ids.device)
        x = self.drop(self.wte(ids) + self.wpe(pos))  # (B, T, C)
        for block in self.h:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, use_reentrant=False)  # dropout's random numbers are replayed
            else:
                x = block(x, cache)
        if cache is not None:
            cache.advance(T)
        return cast(Tensor, self.ln_f(x))

    def head(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> logits (B, T, V); -inf at padding ids."""
        return F.linear(hidden, self.wte.weight, cast(Tensor, self.pad_bias).to(hidden.dtype))

    def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V), or, given targets (B, T), their `cross_entropy`."""
        hidden = self.hidden(ids)
        return self.head(hidden) if targets is None else self.loss(hidden, targets, reduction)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The `cross_entropy` of hidden (B, T, C) and targets (B, T)."""
        if in_chunks(self.padded_vocab_size):
            matrix = self.wte.weight
            return linear_cross_entropy(
                hidden, matrix, targets, vocab_size=self.vocab_size, reduction=reduction
            )
        return cross_entropy(self.head(hidden), targets, reduction)
