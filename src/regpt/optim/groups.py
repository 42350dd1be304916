"""The optimizer over a model's parameters: which of them are whose, what decays, in which order, by what name."""

from __future__ import annotations

import math

import torch
from torch import nn

from regpt.config import OptimConfig
from regpt.errors import ConfigError
from regpt.optim.muon import Muon
from regpt.train.dist import Ranks

FUSED = ("cpu", "cuda", "mps")  # devices with a kernel that updates all parameters in one pass


def decayed_names(model: nn.Module, decay: str) -> set[str]:
    """Names of the parameters that weight decay pulls to zero.

    matrices: everything of two dimensions or more, embeddings too (GPT-3, nanoGPT); linear: without embeddings;
    all: norms and biases as well.
    """
    embeddings = _embeddings(model)
    return {
        name
        for name, p in model.named_parameters()
        if decay == "all" or (p.dim() >= 2 and not (decay == "linear" and id(p) in embeddings))
    }


def _embeddings(model: nn.Module) -> set[int]:
    """The identities of what is looked up; a head that is tied to it is one with it."""
    return {
        id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()
    }


# Weights of the layers that Muon takes, and how many matrices each holds, one upon the other: q, k and v.
MATRICES = {"attn.c_attn.weight": 3, "attn.c_proj.weight": 1, "mlp.c_fc.weight": 1, "mlp.c_proj.weight": 1}


def make_optimizer(
    model: nn.Module,
    config: OptimConfig,
    device_type: str,
    *,
    dtype: str = "float32",
    ranks: Ranks | None = None,
    exact: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer that `config.name` names.

    Args:
        dtype: of the run's matrix products; in bfloat16, Muon's are too.
        ranks: among whom Muon divides its work.
        exact: the result must not depend on their number. On a GPU, where a product's last bits may depend on how many
            are computed together, every rank then does all of the work.

    Raises:
        ConfigError: a setting outside its range.
    """
    if config.name == "adamw":
        return adamw(model, config, device_type)
    alone = exact and device_type != "cpu"
    products = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    return muon(model, config, device_type, dtype=products, ranks=None if alone else ranks)


def roles(model: nn.Module) -> dict[str, str]:
    """What each parameter is to `muon`: matrix (of a layer), embedding (looked up), head, or scalar (all that is left)."""
    embeddings = _embeddings(model)

    def role(name: str, p: nn.Parameter) -> str:
        if name.startswith("h.") and name.endswith(tuple(MATRICES)):
            return "matrix"
        if id(p) in embeddings:
            return "embedding"
        return "head" if name == "lm_head.weight" else "scalar"

    return {name: role(name, p) for name, p in model.named_parameters() if p.requires_grad}


def muon(
    model: nn.Module,
    config: OptimConfig,
    device_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks | None = None,
) -> Muon:
    """Muon for the layers' matrices, AdamW for the rest, in a group for every role (`roles`) and whether it decays.

    A group's `lr_scale` is its peak rate over `optim.lr`: one schedule moves all (`optim/schedule.set_rates`).

    Raises:
        ConfigError: a setting outside its range.
    """
    check_optimizer(config)
    decayed, parameters, kinds = (
        decayed_names(model, config.decay),
        dict(model.named_parameters()),
        roles(model),
    )
    peaks = {
        "matrix": config.muon_lr,
        "embedding": config.embed_lr or config.lr,
        "head": config.head_lr or config.lr,
        "scalar": config.scalar_lr or config.lr,
    }
    groups = []
    for role, peak in peaks.items():
        for decays in (True, False):
            names = [n for n, r in kinds.items() if r == role and (n in decayed) == decays]
            group = {
                "params": [(n, parameters[n]) for n in names],
                "name": f"{role}, {'decay' if decays else 'no decay'}",
                "lr": peak,
                "lr_scale": peak / config.lr,
                "weight_decay": config.weight_decay if decays else 0.0,
            }
            if role == "matrix":
                parts = [MATRICES[n.split(".", 2)[2]] for n in names]
                of_kind = {
                    "kind": "muon",
                    "parts": parts,
                    "momentum": config.muon_momentum,
                    "cautious": config.cautious_decay,
                }
            else:
                betas, fused = (config.beta1, config.beta2), device_type in FUSED
                of_kind = {"kind": "adam", "betas": betas, "eps": config.eps, "fused": fused}
            groups += [group | of_kind] if names else []
    return Muon(groups, method=config.orthogonalize, dtype=dtype, ranks=ranks)


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


def check_optimizer(config: OptimConfig) -> None:
    """Refuse settings outside their range, before anything is built.

    Raises:
        ConfigError: naming the setting.
    """
    check_adamw(config)
    for name in ("muon_lr", "embed_lr", "head_lr", "scalar_lr"):
        value = getattr(config, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(f"optim.{name} must be above 0 and finite.", got=value)
    for name in ("muon_momentum", "muon_momentum_start"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ConfigError(f"optim.{name} must lie in [0, 1).", got=getattr(config, name))
    if config.muon_momentum_steps < 0:
        raise ConfigError("optim.muon_momentum_steps must not be negative.", got=config.muon_momentum_steps)


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
