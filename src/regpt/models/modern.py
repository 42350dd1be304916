"""The modern model: what a decade of small changes made of GPT-2's decoder, each of them a switch of `ModernConfig`.

Where it comes from, which switch paid how much elsewhere, is in the comments: modded-nanogpt (records by date, its file
train_gpt.py) and nanochat (nanochat/gpt.py). No biases and no parameters in norms. Parameter names are GPT-2's where the
part is GPT-2's: wte h.0.attn.c_attn h.0.mlp.c_fc … Shapes are named in `regpt/models/__init__.py`.
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
from regpt.models.elementwise import relu_squared, rms_norm
from regpt.models.loss import cross_entropy, in_chunks, linear_cross_entropy
from regpt.models.shape import VALUE_GATE_CHANNELS, check_model, has_values, rotated_dimensions, window_of

MLP_RATIO = 4
EMBED_STD = 0.02  # GPT-2's; a norm follows, so it only says how large Adam's steps are beside the vectors
VALUE_STD = 0.01  # of value embeddings, as modded-nanogpt's record of 2026-07-17
X0_START = 0.1  # nanochat has 0.20 in the first layer and 0.05 in the last
NORM_EPS = 1e-7
# With q and k normalised, q·k / sqrt(D) lies in ±sqrt(D); both are stretched by 1.2 in nanochat: 0.127 at D = 128, where
# modded-nanogpt found 0.12 (its record of 2025-01-16).
QK_SCALE = 1.2 * 1.2
# The hash of three ids: odd numbers near 2^31 over the golden ratio, its square and its cube.
HASH = (1_327_217_885, 820_265_763, 506_952_121)


def normalized(x: Tensor, kind: str = "rms") -> Tensor:
    """x (…, C), every vector divided by its root mean square (`rms`, Zhang and Sennrich 2019, equation 4, without the gain),
    or freed of its mean and divided by its standard deviation (`layer`)."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:])
    return rms_norm(x, NORM_EPS)


def turns(config: ModelConfig) -> Tensor:
    """Cosines and sines of rotary positions, (2, block_size, R / 2), computed in float64, kept in float32.

    Su et al. 2021, "RoFormer", equation 34, in the half-split order of GPT-NeoX and Llama: dimensions i and i + R / 2 are a
    plane that turns by position x base^(-2i / R). R is `rope_fraction` of D; modded-nanogpt too lets half of them stay.
    """
    R = rotated_dimensions(config)
    speed = config.modern.rope_base ** -(torch.arange(0, R, 2, dtype=torch.float64) / R)
    angles = torch.outer(torch.arange(config.block_size, dtype=torch.float64), speed)
    return torch.stack((angles.cos(), angles.sin())).float()


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, T, …, H, D), its first R dimensions turned by `turn` (2, T, R / 2)."""
    half = turn.shape[-1]
    cos, sin = turn.to(x.dtype).view(2, 1, turn.shape[1], *[1] * (x.dim() - 3), half)
    a, b, still = x.tensor_split((half, 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos, still), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions, normalised queries and keys, and value embeddings."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        m, size = config.modern, config.n_embd // config.n_head
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.qk_norm, self.window = m.qk_norm, window_of(config, layer)
        self.scale = m.attention_scale or (QK_SCALE if m.qk_norm else 1.0) / math.sqrt(size)
        # Queries, keys and values by one product; Muon takes it for three matrices (optim/groups.py).
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        if has_values(config, layer):
            channels = min(VALUE_GATE_CHANNELS, config.n_embd)
            self.value_gate = nn.Linear(channels, config.n_head, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, turn: Tensor | None, values: Tensor | None, cache: KVLayers | None = None
    ) -> Tensor:
        """x (B, T, C); turn (2, T, R / 2); values (B, T, C), the tokens' value embeddings; -> (B, T, C)."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qk, v = qkv[:, :, :2], qkv[:, :, 2]  # (B, T, 2, H, D), (B, T, H, D)
        if self.qk_norm:
            qk = normalized(qk)
        if turn is not None:
            qk = rotate(qk, turn)
        if values is not None:
            gate = 2 * torch.sigmoid(self.value_gate(x[..., : self.value_gate.in_features]))  # (B, T, H)
            v = v + gate.unsqueeze(-1) * values.view_as(v).to(v.dtype)
        q, k = (part.transpose(1, 2).to(v.dtype) for part in qk.unbind(2))  # (B, H, T, D)
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H, S, D), positions already in the keys
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v, dropout=dropout, scale=self.scale, window=self.window)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C)
        return cast(Tensor, self.resid_dropout(self.c_proj(y)))


class MLP(nn.Module):
    """Position-wise feed-forward, four times as wide inside; ReLU² is So et al. 2021, "Primer"."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.modern.activation
        self.c_fc = nn.Linear(config.n_embd, MLP_RATIO * config.n_embd, bias=False)
        self.c_proj = nn.Linear(MLP_RATIO * config.n_embd, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)  # (B, T, 4C)
        x = relu_squared(x) if self.activation == "relu2" else F.gelu(x, approximate="tanh")
        return cast(Tensor, self.dropout(self.c_proj(x)))


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.norm = config.modern.norm
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, turn: Tensor | None, values: Tensor | None, cache: KVLayers | None = None
    ) -> Tensor:
        x = x + self.attn(normalized(x, self.norm), turn, values, cache)
        return cast(Tensor, x + self.mlp(normalized(x, self.norm)))


class Modern(nn.Module):
    """The language model.

    Args:
        config: the shape, and the switches in `config.modern`.
        vocab_size: ids that exist. Inside it is padded to a multiple of 128; the logits of padding ids are -inf, so
            they can be neither sampled nor learned.

    Raises:
        ConfigError: where the shape is impossible.
    """

    turns: Tensor | None

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        check_model(config, vocab_size)
        m, C = config.modern, config.n_embd
        self.config, self.vocab_size, self.padded_vocab_size = config, vocab_size, pad_vocab(vocab_size)
        self.checkpoint_activations = False  # set while training, where memory is short
        self.wte = nn.Embedding(self.padded_vocab_size, C)
        # A row for every pair of ids, and for every id that nothing stands before.
        self.bigram = nn.Embedding((vocab_size + 1) * vocab_size, C) if m.bigram else None
        self.trigram = nn.Embedding(m.trigram, C) if m.trigram else None
        self.wpe = None if m.rope else nn.Embedding(config.block_size, C)
        self.drop = nn.Dropout(config.dropout)
        layers = range(config.n_layer)
        self.value_embeds = nn.ModuleDict(
            {str(layer): nn.Embedding(vocab_size, C) for layer in layers if has_values(config, layer)}
        )
        self.h = nn.ModuleList([Block(config, layer) for layer in layers])
        self.residual_scalars = nn.Parameter(torch.empty(len(layers))) if m.residual_scalars else None
        self.x0_scalars = nn.Parameter(torch.empty(len(layers))) if m.x0_scalars else None
        self.lm_head = None if m.tied else nn.Linear(C, self.padded_vocab_size, bias=False)
        self.register_buffer("turns", turns(config) if m.rope else None, persistent=False)
        self.register_buffer("pad_bias", torch.empty(self.padded_vocab_size), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Matrices uniform within 1/sqrt(fan in), as `nn.Linear` has them; projections into the stream and an untied head
        zero, or, without `zero_init`, scaled as GPT-2's. n-gram tables and gates (which are then 1) zero."""
        m, starts_at_zero = self.config.modern, ["bigram.weight", "trigram.weight", "value_gate.weight"]
        starts_at_zero += ["c_proj.weight", "lm_head.weight"] if m.zero_init else []
        for name, p in self.named_parameters():
            if name.endswith(tuple(starts_at_zero)):
                p.zero_()
            elif name in ("residual_scalars", "x0_scalars"):
                p.fill_(1.0 if name == "residual_scalars" else X0_START)
            elif name.startswith(("wte", "wpe")):
                p.normal_(std=EMBED_STD)
            elif name.startswith("value_embeds"):
                p.normal_(std=VALUE_STD)
            else:
                bound = 1 / math.sqrt(p.shape[1])
                residual = name.endswith("c_proj.weight")
                p.uniform_(-bound, bound).mul_(1 / math.sqrt(2 * self.config.n_layer) if residual else 1.0)
        for padded in (self.wte, self.lm_head):
            if padded is not None:
                padded.weight[self.vocab_size :] = 0.0
        bias = cast(Tensor, self.pad_bias).zero_()
        bias[self.vocab_size :] = -math.inf

    def hidden(self, ids: Tensor, cache: KVLayers | None = None) -> Tensor:
        """ids (B, T) int64 -> the normalised stream (B, T, C). With a cache, the ids continue what it holds."""
        m, T = self.config.modern, ids.shape[1]
        start = cache.length if cache is not None else 0
        if start + T > self.config.block_size:
            raise ConfigError(
                f"{start + T} positions do not fit the model's context of {self.config.block_size} tokens."
            )
        x = x0 = self.embed(ids, start, cache)  # (B, T, C)
        turn = self.turns[:, start : start + T] if self.turns is not None else None
        for layer, block in enumerate(self.h):
            # A stream that each layer may fade, and the embedding, fresh: +0.009 at 3,200 steps (modded-nanogpt, 2024-11-06).
            if self.residual_scalars is not None:
                x = self.residual_scalars[layer] * x
            if self.x0_scalars is not None:
                x = x + self.x0_scalars[layer] * x0
            values = self.value_embeds[str(layer)](ids) if has_values(self.config, layer) else None
            if self.checkpoint_activations and self.training:
                # Dropout's random numbers are replayed.
                x = checkpoint(block, x, turn, values, use_reentrant=False)
            else:
                x = block(x, turn, values, cache)
        if cache is not None:
            cache.advance(T)
        return normalized(x, m.norm)

    def embed(self, ids: Tensor, start: int, cache: KVLayers | None) -> Tensor:
        """ids (B, T) at `start` -> (B, T, C): of the token, the n-grams that it ends, and its place."""
        m, T, V = self.config.modern, ids.shape[1], self.vocab_size
        x = self.wte(ids)
        if self.bigram is not None or self.trigram is not None:
            before = 1 if self.trigram is None else 2
            if cache is not None:
                seen = cache.with_previous(ids, before)
            else:
                seen = F.pad(ids, (before, 0), value=-1)  # -1: nothing stands there
            seen = torch.where(seen < 0, V, seen)  # (B, before + T)
            last = seen[:, before - 1 : before - 1 + T]
            if self.bigram is not None:
                x = x + self.bigram(last * V + ids)
            if self.trigram is not None:
                mixed = (ids * HASH[0]) ^ (last * HASH[1]) ^ (seen[:, :T] * HASH[2])
                x = x + self.trigram((mixed ^ (mixed >> 20)) % self.trigram.num_embeddings)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, start + T, device=ids.device))
        return cast(Tensor, self.drop(normalized(x, m.norm) if m.embed_norm else x))

    @property
    def head_matrix(self) -> Tensor:
        """(V, C), of the head: the embedding's own where they are tied."""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def head(self, hidden: Tensor) -> Tensor:
        """(B, T, C) -> logits (B, T, V), float32 where there is a soft-cap; -inf at padding ids."""
        matrix = self.head_matrix
        cap, bias = self.config.modern.softcap, cast(Tensor, self.pad_bias)
        if cap is None:
            return F.linear(hidden, matrix, bias.to(hidden.dtype))
        # Gemma 2's soft-cap. In 16 bits a capped logit near 15 would be exact to 1/16 only.
        return cap * torch.tanh(F.linear(hidden, matrix).float() / cap) + bias

    def forward(self, ids: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V), or, given targets (B, T), their `cross_entropy`."""
        hidden = self.hidden(ids)
        return self.head(hidden) if targets is None else self.loss(hidden, targets, reduction)

    def loss(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The `cross_entropy` of hidden (B, T, C) and targets (B, T)."""
        if in_chunks(self.padded_vocab_size):
            return linear_cross_entropy(
                hidden,
                self.head_matrix,
                targets,
                vocab_size=self.vocab_size,
                softcap=self.config.modern.softcap,
                reduction=reduction,
            )
        return cross_entropy(self.head(hidden), targets, reduction)
