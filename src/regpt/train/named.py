"""A model's weights and an optimizer's state as tensors by name, and back; what does not fit is named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regpt.errors import CheckpointError


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights by name: the live ones, not copies."""
    return {name: t.detach() for name, t in _bare(model).state_dict().items()}


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy `tensors` into the model, which must have exactly these names, shapes and dtypes.

    Raises:
        CheckpointError: naming the tensor that does not fit. The model is untouched then.
    """
    check_model_tensors(model, tensors)
    with torch.no_grad():
        for name, t in model_tensors(model).items():
            t.copy_(tensors[name])


def check_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError, naming it, for a tensor that does not fit the model."""
    own = model_tensors(model)
    _same_names("weights", tensors, own)
    for name, t in own.items():
        new = tensors[name]
        if (new.shape, new.dtype) != (t.shape, t.dtype):
            got, expected = (f"{tuple(x.shape)} {x.dtype}" for x in (new, t))
            raise CheckpointError(f"the weight {name} does not fit this model.", got=got, expected=expected)


def optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch optimizer by parameter name, so that no order or grouping of parameters matters.

    Settings such as the learning rate are not part of it: they come from the config and the schedule.

    Returns:
        Tensors by "<parameter>.<key>", live ones, not copies; and JSON values: the names of all parameters
        that the optimizer holds, and the state that is not tensors:
        {"parameters": […], "values": {"<parameter>.<key>": …}}.
    """
    names = _optimizer_names(model, optimizer)
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            (tensors if isinstance(value, Tensor) else values)[f"{names[index]}.{key}"] = value
    return tensors, {"parameters": sorted(names), "values": values}


def load_optimizer(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        CheckpointError: it is the state of other parameters or shapes. The optimizer is untouched then.
    """
    names = _optimizer_names(model, optimizer)
    parameters = dict(_bare(model).named_parameters())
    _same_names("parameters in the optimizer", scalars["parameters"], names)
    state: dict[int, dict[str, Any]] = {}
    for full, value in {**tensors, **scalars["values"]}.items():
        name, _, key = full.rpartition(".")
        if name not in names:
            raise CheckpointError(f"the optimizer state {full} belongs to no parameter of this model.")
        if isinstance(value, Tensor) and not _fits(value, parameters[name]):
            got, expected = tuple(value.shape), tuple(parameters[name].shape)
            raise CheckpointError(f"the optimizer state {full} does not fit.", got=got, expected=expected)
        state.setdefault(names.index(name), {})[key] = value
    # Its own groups, so that only state is loaded; PyTorch moves each tensor to where its optimizer wants it.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(state: Tensor, parameter: Tensor) -> bool:
    """One number, or an entry for each of the parameter's, or for each row or column of it."""
    if state.numel() == 1:
        return True
    same_rank = state.dim() == parameter.dim()
    return same_rank and all(a in (1, b) for a, b in zip(state.shape, parameter.shape, strict=True))


def _optimizer_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the order of the optimizer's groups, which is how `state_dict` numbers them."""
    by_id = {id(p): name for name, p in _bare(model).named_parameters()}
    return [by_id[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _same_names(what: str, got: Iterable[str], expected: Iterable[str]) -> None:
    missing, unknown = sorted(set(expected) - set(got)), sorted(set(got) - set(expected))
    parts = [
        f"{word} {_some(names)}" for word, names in (("missing", missing), ("unknown", unknown)) if names
    ]
    if parts:
        raise CheckpointError(f"the {what} are not this model's: {'; '.join(parts)}.")


def _some(names: list[str]) -> str:
    """The first few of many names."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bare(model: nn.Module) -> nn.Module:
    """The model itself where `torch.compile` has wrapped it, whose names are the ones that last."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner
