"""16-bit products are what they should be, with and without instructions for them; so are their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_iiet.models.attention_layout import AttentionLayout
from megatron_iiet.ops import products
from megatron_iiet.ops.products import linear, matmul, product_dtype


@pytest.fixture(params=[False, True], ids=["native", "in fp32"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "_SLOW_IN_BF16", request.param)
    monkeypatch.setattr(products, "_SLOW_IN_FP16", request.param)
    return bool(request.param)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> bool:
    """To the rounding of one value."""
    assert found.dtype == dtype
    return bool((found.float() - wanted).norm() < torch.finfo(dtype).eps / 2 * wanted.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_products(dtype: torch.dtype, slow: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, upstream = (
        torch.randn(shape, generator=generator, dtype=dtype) for shape in ((2, 5, 24), (16, 24), (2, 5, 16))
    )
    x.requires_grad_()
    weight.requires_grad_()
    out = linear(x, weight)
    out.backward(upstream)
    assert x.grad is not None
    assert weight.grad is not None
    assert close(out, x.float() @ weight.float().t(), dtype)
    assert close(x.grad, upstream.float() @ weight.float(), dtype)
    assert close(weight.grad, upstream.flatten(0, 1).float().t() @ x.flatten(0, 1).float(), dtype)
    assert close(matmul(upstream, weight), upstream.float() @ weight.float(), dtype)


def test_attention(slow: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 32, 8, generator=generator, dtype=torch.bfloat16) for _ in range(3))
    rotary = torch.ones(32, 8), torch.zeros(32, 8)
    wanted = torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    found = AttentionLayout(*rotary).attend(q, k, v)
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.01 * wanted.norm()


def test_where(slow: bool) -> None:
    """Only 16 bits on a CPU are ever multiplied in another dtype."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.bfloat16, torch.float16):
        assert product_dtype(dtype, cpu) == (torch.float32 if slow else dtype)
        assert product_dtype(dtype, cuda) == dtype
    assert product_dtype(torch.float32, cpu) == torch.float32
