"""AdamW over a model's parameters: what decays, in which order, by what name."""

from __future__ import annotations

import math

import torch
from torch import nn

from regpt.config import OptimConfig
from regpt.errors import ConfigError

FUSED = ("cpu", "cuda", "mps")  # devices with a kernel that updates all parameters in one pass


def decayed_names(model: nn.Module, decay: str) -> set[str]:
    """Names of the parameters that weight decay pulls to zero.

    matrices: everything of two dimensions or more, embeddings too (GPT-3, nanoGPT); linear: without embeddings;
    all: norms and biases as well.
    """
    embeddings = {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }
    return {
        name
        for name, p in model.named_parameters()
        if decay == "all" or (p.dim() >= 2 and not (decay == "linear" and id(p) in embeddings))
    }


def adamw(model: nn.Module, config: OptimConfig, device_type: str) -> torch.optim.AdamW:
    """AdamW with two groups, "decay" and "no_decay", each in the model's order of parameters; empty groups are left out.

    A group's `param_names` run parallel to its `params`, so state can be saved by name. A tensor that appears under two
    names (tied weights) is one parameter, under its first name, and decays once.

    Raises:
        ConfigError: a setting outside its range.
    """
    check_adamw(config)
    decayed = decayed_names(model, config.decay)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {
            "params": [(n, p) for n, p in trainable if (n in decayed) == wanted],
            "weight_decay": rate,
            "name": label,
        }
        for label, wanted, rate in (("decay", True, config.weight_decay), ("no_decay", False, 0.0))
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=device_type in FUSED,
    )


def check_adamw(config: OptimConfig) -> None:
    """Refuse settings outside their range, before anything is built.

    Raises:
        ConfigError: naming the setting.
    """
    if not 0.0 < config.lr < math.inf:
        raise ConfigError("optim.lr must be above 0 and finite.", got=config.lr)
    for name in ("beta1", "beta2"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(f"optim.{name} must lie in [0, 1).", got=getattr(config, name))
    if not config.eps > 0.0:  # a gradient that is 0 would be divided by 0
        raise ConfigError("optim.eps must be above 0.", got=config.eps)
    if not config.weight_decay >= 0.0:
        raise ConfigError("optim.weight_decay must not be negative.", got=config.weight_decay)
    if config.clip_norm is not None and not config.clip_norm > 0.0:
        raise ConfigError(
            "optim.clip_norm must be above 0.", got=config.clip_norm, hint="--optim.clip-norm none"
        )
