"""SwiGLU's product and the rotary embedding give what their formulas give, gradients included."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_iiet.ops.pointwise import rotate, rotated_heads, swiglu
from tests.ops.inputs import needs_extension

COS, SIGNED_SIN = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def turned(x: Tensor) -> Tensor:
    return rotate(x, COS.to(x.dtype), SIGNED_SIN.to(x.dtype))


def plain_turned(x: Tensor) -> Tensor:
    swapped = torch.cat((x[..., 4:], x[..., :4]), dim=-1)
    return x * COS.to(x.dtype) + swapped * SIGNED_SIN.to(x.dtype)


PAIRS = {
    "swiglu": (swiglu, plain_swiglu),
    "swiglu, kernel": (partial(swiglu, backend="cpu"), plain_swiglu),
    "rotate": (turned, plain_turned),
}
KERNEL = pytest.param("cpu", marks=needs_extension)


def value_and_gradient(
    function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_()
    # As it comes in a layer: heads before positions, in memory the other way round.
    out = function(leaf.transpose(1, 2))
    (gradient,) = torch.autograd.grad(out, leaf, upstream[..., : out.shape[-1]].to(out.dtype))
    return out, gradient


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_extension] * ("kernel" in name)) for name in PAIRS]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_as_the_formula(name: str, dtype: torch.dtype) -> None:
    """In bf16 no further from fp64 than the formula in bf16."""
    if dtype == torch.float64 and "kernel" in name:
        with pytest.raises(ValueError, match="gate_up is Double, expected fp32, bf16 or fp16"):
            PAIRS[name][0](torch.ones(2, 8, dtype=dtype))
        return
    generator = torch.Generator().manual_seed(0)
    x, upstream = torch.randn(2, 5, 3, 8, generator=generator), torch.randn(2, 3, 5, 8, generator=generator)
    ours, plain = PAIRS[name]
    exact = value_and_gradient(plain, x.to(dtype).double(), upstream.to(dtype).double())
    found = value_and_gradient(ours, x.to(dtype), upstream.to(dtype))
    theirs = value_and_gradient(plain, x.to(dtype), upstream.to(dtype))
    for right, got, other in zip(exact, found, theirs, strict=True):
        assert got.dtype == dtype
        allowed = {torch.float64: 1e-12, torch.float32: 1e-6}.get(
            dtype, (other.double() - right).abs().max().item()
        )
        assert (got.double() - right).abs().max().item() <= allowed


def plain_heads(qkv: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, ...]:
    """Two heads of queries, one of keys, one of values."""
    q, k, v = qkv.unflatten(-1, (4, -1)).transpose(1, 2).split((2, 1, 1), dim=1)
    swapped = (torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1) for x in (q, k))
    q, k = (x * cos + swap * signed_sin for x, swap in zip((q, k), swapped, strict=True))
    return q, k, v


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        pytest.param("cpu", torch.float32, marks=needs_extension),
        pytest.param("cpu", torch.bfloat16, marks=needs_extension),
    ],
)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("used", [(0, 1, 2), (2,), (0,)], ids=str)
@pytest.mark.parametrize("width", [8, 128, 134])
def test_heads_as_the_formula(
    backend: str, dtype: torch.dtype, documents: bool, used: tuple[int, ...], width: int
) -> None:
    """With tables of all samples or of each; a part that nothing uses has gradient 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    places = (2, 1, 5) if documents else (5,)
    cos, sin, weights = draw(*places, width), draw(*places, width), draw(2, 2, 5, width)
    qkv = draw(2, 5, 4 * width).requires_grad_()
    found = rotated_heads(qkv, (2, 1), cos, sin, backend)
    exact = qkv.detach().double().requires_grad_()
    wanted = plain_heads(exact, cos.double(), sin.double())
    for got, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, right.to(dtype))
    of_ours, of_plain = (
        torch.autograd.grad(
            [parts[i] for i in used], of, [weights[:, : parts[i].shape[1]].to(of.dtype) for i in used]
        )[0]
        for parts, of in ((found, qkv), (wanted, exact))
    )
    torch.testing.assert_close(of_ours, of_plain.to(dtype))


@pytest.mark.parametrize("backend", ["reference", KERNEL])
def test_heads_are_one_tensor(backend: str) -> None:
    """Of which nothing else is kept; the gradient is written once, where autograd's is put together."""
    qkv = torch.randn(2, 5, 32, requires_grad=True)
    counts, storages = [], []
    for function in (partial(rotated_heads, heads=(2, 1), backend=backend), plain_heads):
        parts = function(qkv, cos=COS, signed_sin=SIGNED_SIN)
        storages.append({part.untyped_storage().data_ptr() for part in parts})
        with Written() as written:
            torch.autograd.grad(sum(part.sum() for part in parts), qkv)
        counts.append(written.elements)
    assert len(storages[0]) == 1
    assert qkv.untyped_storage().data_ptr() not in storages[0]
    assert counts[0] <= 0.6 * counts[1]


class Written(TorchDispatchMode):
    """Counts the elements that operators write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not function.is_view and "empty" not in function.name():
            self.elements += out.numel()
        return out


def test_less_is_written() -> None:
    """By the rotation than by its formula with autograd's gradients."""
    x, upstream = torch.randn(2, 5, 3, 8), torch.randn(2, 3, 5, 8)
    counts = []
    for function in PAIRS["rotate"]:
        with Written() as written:
            value_and_gradient(function, x, upstream)
        counts.append(written.elements)
    assert counts[0] <= 0.5 * counts[1]


def test_only_the_input_is_kept() -> None:
    """SwiGLU's formula keeps the gate's sigmoid unit too; the rotation keeps nothing it was given."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(6, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = swiglu(x)
    assert kept == {x.untyped_storage().data_ptr(): x.numel() * 4}
    assert out.shape == (6, 4)
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rotate(x[:5], COS, SIGNED_SIN)
    assert set(kept) == {COS.untyped_storage().data_ptr(), SIGNED_SIN.untyped_storage().data_ptr()}
