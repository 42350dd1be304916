"""What follows from a model's settings before it is built: which layer has what, and which shapes are refused. No torch."""

from __future__ import annotations

from regpt.config import ModelConfig, ModernConfig, differences
from regpt.errors import ConfigError

# Of the stream, which a head's gate of its value embedding reads; nanochat and modded-nanogpt.
VALUE_GATE_CHANNELS = 12
MOST_LAYERS = 10_000  # to build more modules than that takes minutes, and nobody means it
BIGRAM_VOCAB = 1024  # up to which pairs of ids have a row each: a million rows


def has_values(config: ModelConfig, layer: int) -> bool:
    """Whether the layer adds value embeddings: every other one, the last included, as in nanochat."""
    return config.modern.value_embeddings and (config.n_layer - 1 - layer) % 2 == 0


def window_of(config: ModelConfig, layer: int) -> int | None:
    """Positions that the layer attends to; None: all before it. Every other layer has the window, the last has not."""
    return config.modern.window if (config.n_layer - 1 - layer) % 2 else None


def rotated_dimensions(config: ModelConfig) -> int:
    """How many dimensions of a head rotate: an even number."""
    return 2 * round(config.modern.rope_fraction * (config.n_embd // config.n_head) / 2)


def check_shape(config: ModelConfig) -> None:
    """Refuse a shape that cannot be built.

    Raises:
        ConfigError: naming the setting.
    """
    for name in ("n_layer", "n_head", "n_embd", "block_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"model.{name} must be at least 1.", got=getattr(config, name))
    if config.n_layer > MOST_LAYERS:
        raise ConfigError(
            "model.n_layer is too large.", got=config.n_layer, expected=f"at most {MOST_LAYERS:,}"
        )
    if config.n_embd % config.n_head:
        raise ConfigError(
            f"model.n_embd={config.n_embd} is not a multiple of model.n_head={config.n_head}.",
            hint=f"--model.n-embd {config.n_head * max(1, round(config.n_embd / config.n_head))}",
        )
    if not 0.0 <= config.dropout < 1.0:
        raise ConfigError("model.dropout must lie in [0, 1).", got=config.dropout)


def check_model(config: ModelConfig, vocab_size: int) -> None:
    """Refuse a model that cannot be built, or settings that it would pass over.

    Raises:
        ConfigError: naming the setting.
    """
    check_shape(config)
    changed = differences(ModernConfig(), config.modern, "model.modern.")
    if config.arch == "gpt2" and changed:
        raise ConfigError(
            f"GPT-2 has no {', '.join(changed)}: these are switches of the modern model.",
            hint="--model.arch modern, or leave them as they are",
        )
    if config.arch == "modern":
        _check_modern(config, vocab_size)


def _check_modern(config: ModelConfig, vocab_size: int) -> None:
    m = config.modern
    if not 0.0 < m.rope_fraction <= 1.0:
        raise ConfigError(
            "model.modern.rope_fraction must lie in (0, 1].",
            got=m.rope_fraction,
            hint="--model.modern.rope false",
        )
    if m.rope and not rotated_dimensions(config):
        raise ConfigError(
            f"model.modern.rope_fraction={m.rope_fraction:g} of {config.n_embd // config.n_head} dimensions a head is less"
            " than the two that a rotation needs.",
            hint="--model.modern.rope-fraction 1",
        )
    if not m.rope_base > 1.0:
        raise ConfigError("model.modern.rope_base must be above 1.", got=m.rope_base)
    for name in ("attention_scale", "softcap", "trigram", "window"):
        value = getattr(m, name)
        if value is not None and not value > 0:
            off = f"--model.modern.{name.replace('_', '-')} none"
            raise ConfigError(f"model.modern.{name} must be above 0.", got=value, hint=off)
    if m.bigram and vocab_size > BIGRAM_VOCAB:
        raise ConfigError(
            f"model.modern.bigram would need {vocab_size + 1:,} x {vocab_size:,} rows: an exact table is for vocabularies"
            f" up to {BIGRAM_VOCAB:,}.",
            hint="--model.modern.trigram 65536, whose table is hashed",
        )
