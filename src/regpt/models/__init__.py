"""The models, each a complete file that can be read alone: `gpt2.py` and `modern.py`.

Shapes, everywhere in regpt:  B rows · T positions · S positions seen (cached and new) · C channels · H heads ·
D head size = C / H · V vocabulary, padded to a multiple of 128 inside the model.

What a model must offer, so that training, evaluation and generation need not know which one it is:
`hidden(ids, cache) -> (B, T, C)`, `head(hidden) -> (B, T, V)`, `forward(ids, targets)`, `config`, `vocab_size`,
`padded_vocab_size`, and a `cache` argument that follows `KVLayers`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # so that models/count.py answers without loading torch
    import torch

    from regpt.models.gpt2 import GPT2
    from regpt.models.modern import Modern

from regpt.config import ModelConfig

IGNORE = -1  # a target that no loss counts
VOCAB_MULTIPLE = 128  # matrix products are fastest where every side is a multiple of this


def pad_vocab(vocab_size: int) -> int:
    """The vocabulary size that the model uses inside: 50257 -> 50304."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class KVLayers(Protocol):
    """Keys and values of positions already seen, one pair a layer; owned by the caller, not by the model."""

    @property
    def length(self) -> int:
        """Positions already stored. New ones stand at length, length + 1, …"""

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store (B, H, T, D) at `length` and return all (B, H, S, D), S = length + T. Does not move `length`."""

    def with_previous(self, ids: torch.Tensor, before: int) -> torch.Tensor:
        """Store ids (B, T) at `length`; they come back with the `before` ids that stand before them, (B, before + T), -1
        where nothing does. For models that look at neighbouring tokens; GPT-2 does not ask."""

    def advance(self, positions: int) -> None:
        """Count `positions` as stored, once every layer has been updated."""


class LanguageModel(Protocol):
    """What training, evaluation and generation ask of a model."""

    config: ModelConfig
    vocab_size: int
    padded_vocab_size: int
    training: bool

    def hidden(self, ids: torch.Tensor, cache: KVLayers | None = None) -> torch.Tensor:
        """ids (B, T) -> (B, T, C)."""

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> logits (B, T, V)."""

    def __call__(
        self, ids: torch.Tensor, targets: torch.Tensor | None = None, reduction: str = "mean"
    ) -> torch.Tensor:
        """Logits, or the loss where targets are given."""

    def train(self, mode: bool = True) -> object:
        """Dropout on or off."""

    def eval(self) -> object:
        """Dropout off."""


def build_model(config: ModelConfig, vocab_size: int) -> GPT2 | Modern:
    """The model that `config.arch` names, with the weights that training starts from.

    Raises:
        ConfigError: where the shape is impossible.
    """
    from regpt.models.gpt2 import GPT2  # here, so that counting needs no torch
    from regpt.models.modern import Modern
    from regpt.models.shape import check_model

    check_model(config, vocab_size)
    return Modern(config, vocab_size) if config.arch == "modern" else GPT2(config, vocab_size)
