"""The contract of ``merge_norm``, checked on the reference backend against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_iiet.ops import merge_norm, resolve_backend

torch.set_num_threads(1)

EPS = 1e-6
# Results are rounded once to the storage type; fp32 sums of a few terms err in the last places.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def exact(
    residual: Tensor | None, increments: list[Tensor], coefficients: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The formula in fp64, differentiable, without any rounding in between."""
    stack = torch.stack([t.double() for t in increments]) if increments else None
    if coefficients is None:
        total = stack.sum(0) if stack is not None else 0
    elif stack is None:
        assert residual is not None
        total = torch.zeros(*coefficients.shape[:-1], *residual.shape, dtype=torch.float64)
    else:
        total = torch.tensordot(coefficients.double(), stack, 1)
    merged = total if residual is None else residual.double() + total
    assert isinstance(merged, Tensor)
    return merged, None if weight is None else exact_norm(merged, weight)


def exact_norm(merged: Tensor, weight: Tensor) -> Tensor:
    x, w = merged.double(), weight.double()
    if w.dim() == 2:
        w = w.view(w.shape[0], *[1] * (x.dim() - 2), -1)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * w


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Any admissible call."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (*draw(st.lists(st.integers(1, 3), max_size=2)), draw(st.integers(1, 33)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    k = draw(st.integers(0, 5))

    def tensor(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    rows = draw(st.sampled_from([None, 1, 2, 3])) if k else None
    coefficients = None
    if k and draw(st.booleans()):
        coefficients = tensor(k) if rows is None else tensor(rows, k)
    weight = None
    if draw(st.booleans()):
        per_row = coefficients is not None and coefficients.dim() == 2 and draw(st.booleans())
        weight = tensor(
            *((coefficients.shape[0],) if per_row and coefficients is not None else ()), shape[-1]
        )
    residual = tensor(*shape, dtype=dtype) if k == 0 or draw(st.booleans()) else None
    return {
        "residual": residual,
        "increments": [tensor(*shape, dtype=dtype) for _ in range(k)],
        "coefficients": coefficients,
        "norm_weight": weight,
    }


@settings(max_examples=80, deadline=None)
@given(arguments())
def test_values_against_fp64(call: dict[str, Any]) -> None:
    merged, normed = merge_norm(**call, eps=EPS)
    wanted, _ = exact(call["residual"], call["increments"], call["coefficients"], None)
    tolerance = TOLERANCE[merged.dtype]
    scale = (
        1 + sum(t.double().abs() for t in call["increments"]) * 3
    )  # a sum errs by its terms, not its value
    assert merged.shape == wanted.shape
    assert ((merged.double() - wanted).abs() <= tolerance * (scale + wanted.abs())).all()
    if call["norm_weight"] is None:
        assert normed is None
        return
    assert normed is not None
    assert normed.dtype == merged.dtype
    wanted_norm = exact_norm(merged, call["norm_weight"])  # of the rounded merge: that is the contract
    torch.testing.assert_close(normed.double(), wanted_norm, rtol=2 * tolerance, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(arguments())
def test_norm_is_of_the_rounded_merge_bit_for_bit(call: dict[str, Any]) -> None:
    merged, normed = merge_norm(**call, eps=EPS)
    if call["norm_weight"] is None or call["norm_weight"].dim() == 2:
        return
    again = merge_norm(merged, (), None, call["norm_weight"], eps=EPS)
    assert normed is not None
    assert again.normed is not None
    assert torch.equal(again.merged, merged)
    assert torch.equal(again.normed, normed)


@settings(max_examples=30, deadline=None)
@given(arguments())
def test_gradients_against_fp64(call: dict[str, Any]) -> None:
    """fp32 gradients of the fp64 formula. (gradcheck itself needs fp64 storage, which is not offered.)"""
    call = {
        name: [t.float().requires_grad_() for t in value]
        if name == "increments"
        else None
        if value is None
        else value.float().requires_grad_()
        for name, value in call.items()
    }
    leaves = [t for v in call.values() if v is not None for t in (v if isinstance(v, list) else [v])]
    merged, normed = merge_norm(**call, eps=EPS)
    wanted = exact(call["residual"], call["increments"], call["coefficients"], call["norm_weight"])
    generator = torch.Generator().manual_seed(0)

    def gradients(results: list[Tensor | None]) -> list[Tensor]:
        generator.manual_seed(0)
        total = sum(
            (r.double() * torch.randn(r.shape, generator=generator)).sum() for r in results if r is not None
        )
        assert isinstance(total, Tensor)
        return list(torch.autograd.grad(total, leaves))

    for ours, theirs in zip(gradients([merged, normed]), gradients(list(wanted)), strict=True):
        # A norm of a small vector amplifies; the gradient's own size sets the scale.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_coefficients_zero_and_one_are_exact(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residual, a, b = (torch.randn(3, 4, 64).to(dtype) for _ in range(3))
    assert torch.equal(merge_norm(residual, (a, b), torch.zeros(2)).merged, residual)
    assert torch.equal(merge_norm(residual, (a, b), torch.tensor([0.0, 1.0])).merged, residual + b)
    assert torch.equal(merge_norm(None, (a,), torch.ones(1)).merged, a)
    plain = merge_norm(residual, (a, b)).merged
    assert torch.equal(plain, merge_norm(residual, (a, b), torch.ones(2)).merged)
    assert torch.equal(plain, (residual.float() + a.float() + b.float()).to(dtype))


def test_sums_are_rounded_once() -> None:
    """In bf16, 1 + 256 * 2^-9 would stay 1 if every addition were rounded."""
    ones = torch.ones(8, dtype=torch.bfloat16)
    small = [torch.full((8,), 2.0**-9, dtype=torch.bfloat16)] * 256
    assert torch.equal(merge_norm(ones, small).merged, torch.full((8,), 1.5, dtype=torch.bfloat16))


def test_rows_equal_single_merges() -> None:
    torch.manual_seed(0)
    residual, increments = torch.randn(2, 5, 16), [torch.randn(2, 5, 16) for _ in range(3)]
    rows, weights = torch.randn(2, 3), torch.randn(2, 16)
    merged, normed = merge_norm(residual, increments, rows, weights)
    assert normed is not None
    for r in range(2):
        single = merge_norm(residual, increments, rows[r], weights[r])
        assert single.normed is not None
        assert torch.equal(merged[r], single.merged)
        assert torch.equal(normed[r], single.normed)


def test_without_increments_the_residual_is_returned() -> None:
    residual = torch.randn(3, 8)
    assert torch.equal(merge_norm(residual, ()).merged, residual)
    assert torch.equal(merge_norm(residual, (), torch.zeros(0)).merged, residual)
    assert torch.equal(merge_norm(residual, (), torch.zeros(2, 0)).merged, residual.expand(2, 3, 8))


X = torch.zeros(2, 4)
BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"residual": None, "increments": ()},
        "merge_norm: residual is None and increments is empty; give at least one of them",
    ),
    (
        {"residual": X.double(), "increments": ()},
        "merge_norm: storage type torch.float64 is not fp32, bf16 or fp16",
    ),
    (
        {"residual": X, "increments": (X, torch.zeros(2, 5))},
        "merge_norm: increments[1] is (2, 5) torch.float32 on cpu, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": X, "increments": (X.bfloat16(),)},
        "merge_norm: increments[0] is (2, 4) torch.bfloat16 on cpu, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": None, "increments": (X, X.to("meta"))},
        "merge_norm: increments[1] is (2, 4) torch.float32 on meta, expected (2, 4) torch.float32 on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(2)},
        "merge_norm: coefficients is (2,) torch.float32 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1).bfloat16()},
        "merge_norm: coefficients is (1,) torch.bfloat16 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1, 1, 1)},
        "merge_norm: coefficients is (1, 1, 1) torch.float32 on cpu, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (X,), "coefficients": torch.ones(1).to("meta")},
        "merge_norm: coefficients is (1,) torch.float32 on meta, expected fp32 [1] or [rows, 1] on cpu",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(3)},
        "merge_norm: norm_weight is (3,) on cpu, expected [4], or [rows, 4] with coefficient rows, on cpu",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(2, 4)},
        "merge_norm: norm_weight is (2, 4) on cpu, expected [4], or [rows, 4] with coefficient rows, on cpu",
    ),
    (
        {
            "residual": X,
            "increments": (X,),
            "coefficients": torch.ones(3, 1),
            "norm_weight": torch.ones(2, 4),
        },
        "merge_norm: norm_weight is (2, 4) on cpu, expected [4], or [rows, 4] with coefficient rows, on cpu",
    ),
    (
        {"residual": X, "increments": (), "norm_weight": torch.ones(4).to("meta")},
        "merge_norm: norm_weight is (4,) on meta, expected [4], or [rows, 4] with coefficient rows, on cpu",
    ),
    (
        {"residual": X, "increments": (), "backend": "cuda"},
        "merge_norm: backend is 'cuda', but only reference is available here",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_messages(call: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        merge_norm(**call)
    assert str(caught.value) == message


def test_backends() -> None:
    assert resolve_backend("auto")[0] == resolve_backend("reference")[0] == "reference"
    with pytest.raises(
        ValueError, match=r"ops\.backend is 'cuda', but only reference is available here; choose"
    ):
        resolve_backend("cuda")


def test_a_merge_keeps_no_copies_of_the_history() -> None:
    """N layers merge N²/2 increments; an fp32 copy of each would outweigh everything else in memory."""
    increments = [torch.randn(4, 64).bfloat16().requires_grad_() for _ in range(5)]
    coefficients = torch.randn(5, requires_grad=True)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        merge_norm(increments[0], increments, coefficients)
    assert set(saved) <= {t.untyped_storage().data_ptr() for t in (*increments, coefficients)}
