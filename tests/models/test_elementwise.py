"""The hand-written passes against PyTorch's own functions and their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.models.elementwise import relu_squared, rms_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype)


def both(ours: object, theirs: object, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradient of each, for one gradient of the value; theirs in float64."""
    out = []
    for f, like in ((ours, x), (theirs, x.double())):
        leaf = like.clone().requires_grad_()
        y = f(leaf)  # type: ignore[operator]
        (2.0 * y.sin()).sum().backward()
        assert leaf.grad is not None
        out.append([y.detach().double(), leaf.grad.double()])
    return out[0], out[1]


@pytest.mark.parametrize(
    ("dtype", "far"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]
)
@pytest.mark.parametrize("shape", [(3, 5, 32), (2, 7, 2, 4, 8), (4, 1)])
def test_values_and_gradients_are_pytorchs(dtype: torch.dtype, far: float, shape: tuple[int, ...]) -> None:
    """The bound of bfloat16 is a few of its roundings (2^-9)."""
    x = drawn(*shape, dtype=dtype)
    eps = 1e-7 if dtype != torch.float64 else 1e-3
    pairs = [
        both(lambda t: rms_norm(t, eps), lambda t: F.rms_norm(t, t.shape[-1:], eps=eps), x),
        both(relu_squared, lambda t: F.relu(t).square(), x),
    ]
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            assert (a - b).abs().max() <= far * (1 + b.abs().max())


def test_dtypes_stay_and_no_gradient_means_no_graph() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = drawn(2, 3, 16, dtype=dtype)
        assert rms_norm(x, 1e-7).dtype == relu_squared(x).dtype == dtype
        assert not rms_norm(x, 1e-7).requires_grad
        assert rms_norm(x.requires_grad_(), 1e-7).requires_grad


def test_a_vector_of_zeros_has_no_infinite_gradient() -> None:
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, 1e-7).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
