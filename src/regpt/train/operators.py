"""What each operator of a profiled step costs: its own time, and its FLOPs or its bytes, both counted from its inputs' shapes.

Matrix products, attention's fused ones included, are limited by arithmetic, all else by memory. The profiler records inputs
and no outputs, so bytes are a lower bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# C++ names of dtypes, as the profiler has them: ours, and the bytes of a number.
DTYPES = {
    "float": ("float32", 4),
    "double": ("float64", 8),
    "c10::BFloat16": ("bfloat16", 2),
    "c10::Half": ("float16", 2),
    "long int": ("int64", 8),
    "long": ("int64", 8),
    "int": ("int32", 4),
    "unsigned char": ("uint8", 1),
    "bool": ("bool", 1),
}
LIST = "TensorList"
LIST_BYTES = 4  # of a number in a list of tensors, whose dtype is not recorded: weights, gradients and moments are float32
# The inputs that are multiplied.
PRODUCTS = {
    "mm": (0, 1),
    "addmm": (1, 2),
    "bmm": (0, 1),
    "baddbmm": (1, 2),
    "addmm_": (1, 2),
    "baddbmm_": (1, 2),
}
ATTENTION = "_scaled_dot_product_"  # _flash_attention, _efficient_attention, …, with _backward or without
# What looks rows up in a table reads only those: (the table, the ids).
LOOKUPS = {"embedding": (0, 1), "index_select": (0, 2), "nll_loss_forward": (0, 1)}
# What moves nothing itself: views, allocations, and what calls another operator to do it.
MOVES_NOTHING = {
    *("alias", "as_strided", "chunk", "detach", "expand", "permute", "reshape", "resolve_conj"),
    *("resolve_neg", "select", "slice", "split", "squeeze", "t", "transpose", "unbind", "unsqueeze"),
    *("view", "_unsafe_view", "empty_like", "ones_like", "zeros_like"),
    *("contiguous", "linear", "matmul", "to", "_to_copy"),
}

Shape = list[Any]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """All calls of one operator with the same input shapes and dtypes, over the profiled steps."""

    name: str
    shapes: list[Shape]
    """Of every input; of a list of tensors, a list of them; of a number, []."""
    dtypes: list[str]
    calls: int
    self_s: float
    """Without the operators that it calls; on a GPU, of its kernels."""
    flops: int
    """0 where it is no matrix product."""
    bytes: int
    """Of its inputs, at least; 0 where the profiler recorded none."""

    @property
    def dtype(self) -> str:
        """Of a matrix product's second factor."""
        place = PRODUCTS.get(self.name.removeprefix("aten::"), (0, 1))[1]
        return self.dtypes[place] if place < len(self.dtypes) else ""


def operators(events: Iterable[Any], *, on_device: bool) -> list[Operator]:
    """The operators of torch.profiler's `events()`, the one with the most time of its own first.

    Args:
        on_device: count the time of kernels, not of the calls that begin them.
    """
    groups: dict[str, list[Any]] = {}
    for e in events:
        if e.device_type.name == "CPU":
            groups.setdefault(f"{e.name} {_shapes(e)} {e.input_dtypes}", []).append(e)
    found = []
    for same in groups.values():
        first = same[0]
        times = (e.self_device_time_total if on_device else e.self_cpu_time_total for e in same)
        # Autocast has an operator call itself in another dtype: the inner one does the work.
        working = sum(all(child.name != e.name for child in e.cpu_children) for e in same)
        shapes = _shapes(first)
        found.append(
            Operator(
                name=first.name,
                shapes=shapes,
                dtypes=[DTYPES.get(d, (d, 0))[0] for d in first.input_dtypes or []],
                calls=len(same),
                self_s=sum(times) / 1e6,
                flops=working * product_flops(first.name, shapes),
                bytes=working * _bytes(first, shapes),
            )
        )
    return sorted(found, key=lambda o: -o.self_s)


def product_flops(name: str, shapes: list[Shape]) -> int:
    """FLOPs of one call, two for each multiplication with its addition; 0 where the operator is no matrix product.

    As `torch.utils.flop_counter` counts: attention's backward pass is five products, and nothing is masked.
    """
    name = name.removeprefix("aten::")
    if name in PRODUCTS:
        a, b = (shapes[i] for i in PRODUCTS[name])  # (…, m, k), (…, k, n)
        return int(2 * math.prod(a) * b[-1])
    if name.startswith(ATTENTION):
        back = "backward" in name  # whose first input is the output's gradient
        (B, H, T, D), (*_, S, _), (*_, Dv) = shapes[1:4] if back else shapes[:3]
        each = 3 * D + 2 * Dv if back else D + Dv  # back: the scores again, four gradients
        return int(2 * B * H * T * S * each)
    return 0


def _shapes(event: Any) -> list[Shape]:
    """Of every input, those of a list of tensors too where this PyTorch records them."""
    return list(getattr(event, "structured_input_shapes", None) or event.input_shapes or [])


def _bytes(event: Any, shapes: list[Shape]) -> int:
    """Of the inputs of one call: numbers that are the same by broadcasting count once, a table only where it is read."""
    name = event.name.removeprefix("aten::")
    if name in MOVES_NOTHING:
        return 0
    strides = getattr(event, "structured_input_strides", None) or [None] * len(shapes)
    if len(strides) != len(shapes):
        strides = [None] * len(shapes)
    dtypes = event.input_dtypes or []
    sizes = [_size(*of) for of in zip(shapes, strides, dtypes, strict=False)]
    if name in LOOKUPS and all(place < len(sizes) for place in LOOKUPS[name]):
        table, ids = LOOKUPS[name]
        row = 1 if name.startswith("nll") else math.prod(shapes[table][1:])
        width = DTYPES.get(dtypes[table], ("", 0))[1]
        sizes[table] = min(sizes[table], math.prod(shapes[ids]) * row * width)
    return sum(sizes)


def _size(shape: Shape, strides: Shape | None, dtype: str) -> int:
    """Bytes of one input; of a list of tensors, of all. What is no tensor has none."""
    if dtype == LIST:
        return sum(math.prod(s) * LIST_BYTES for s in shape if isinstance(s, list))
    if dtype not in DTYPES:
        return 0
    known = strides is not None and len(strides) == len(shape)
    numbers = (n for i, n in enumerate(shape) if not (known and strides is not None and strides[i] == 0))
    return int(math.prod(numbers)) * DTYPES[dtype][1]
