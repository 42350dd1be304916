"""Attention by plain products, against PyTorch's own kernel and against arithmetic in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regpt.models import attention
from regpt.models.attention import attend, by_products


@pytest.fixture(params=["fused", "products"])
def products(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Both ways that float32 may go on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "products_in_float32", request.param == "products")
        yield request.param == "products"


def qkv(T: int, S: int | None = None) -> list[Tensor]:
    torch.manual_seed(T)
    return [torch.randn(2, 3, n, 16, requires_grad=True) for n in (T, S or T, S or T)]


@pytest.mark.parametrize("T", [1, 2, 7, 64])
def test_both_ways_equal_float64(products: bool, T: int) -> None:
    """Values and gradients; which way was taken is checked too."""
    q, k, v = qkv(T)
    assert by_products("cpu", torch.float32, T) == (products and T > 1)
    up = torch.randn(2, 3, T, 16)
    attend(q, k, v).backward(up)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    y = F.scaled_dot_product_attention(*exact, is_causal=True)
    y.backward(up.double())
    assert torch.allclose(attend(q, k, v).double(), y, atol=2e-6)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=5e-6)


def test_bfloat16_is_as_near_to_the_truth_as_the_kernel() -> None:
    q, k, v = (x.detach().bfloat16() for x in qkv(128))
    assert by_products("cpu", torch.bfloat16, 128)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (attend(q, k, v), kernel))
    assert ours < 2 * theirs and ours < 0.01


def test_queries_that_continue_a_cache_see_all_before_them(products: bool) -> None:
    """The last 5 of 12 positions alone equal the last 5 of all 12."""
    q, k, v = qkv(12)
    assert torch.allclose(attend(q, k, v)[:, :, 7:], attend(q[:, :, 7:], k, v), atol=1e-6)
    assert torch.allclose(attend(q, k, v)[:, :, 11:], attend(q[:, :, 11:], k, v), atol=1e-6)
    for window in (1, 3, 6, 12):
        windowed = attend(q, k, v, window=window)
        assert torch.allclose(windowed[:, :, 7:], attend(q[:, :, 7:], k, v, window=window), atol=1e-6)
    assert by_products("cpu", torch.float32, 5, 12) == products


def test_dropout_keeps_the_mean_and_the_seed(products: bool) -> None:
    q, k, v = qkv(16)
    v = torch.ones_like(v)

    def once(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return attend(q, k, v, dropout=0.25)

    assert torch.equal(once(1), once(1)) and not torch.equal(once(1), once(2))
    assert torch.stack([once(s) for s in range(400)]).mean().item() == pytest.approx(1.0, abs=0.02)


def test_long_contexts_and_other_devices_take_the_kernel() -> None:
    assert not by_products("cpu", torch.bfloat16, attention.PRODUCTS_UP_TO + 1)
    assert not by_products("cpu", torch.bfloat16, 64, attention.PRODUCTS_UP_TO + 1)
    assert not by_products("cuda", torch.bfloat16, 64)
