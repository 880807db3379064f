"""The reference backend of ``merge_norm``: plain torch. Others are tested against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def merge_norm_reference(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """See :func:`megatron_iiet.ops.merge_norm`; arguments are already checked."""
    if coefficients is not None and coefficients.dim() == 2:
        return torch.stack([_merge(residual, increments, row) for row in coefficients]), None
    merged = _merge(residual, increments, coefficients)
    return merged, None if norm_weight is None else _rms_norm(merged, norm_weight, eps)


def _merge(residual: Tensor | None, increments: Sequence[Tensor], coefficients: Tensor | None) -> Tensor:
    if not increments:
        assert residual is not None
        return residual
    if coefficients is None:
        return _sum(residual, increments, None)
    merged: Tensor = _WeightedSum.apply(coefficients, residual, *increments)
    return merged


def _sum(residual: Tensor | None, increments: Sequence[Tensor], coefficients: Tensor | None) -> Tensor:
    storage = increments[0].dtype
    total = None if residual is None else residual.float()
    for j, increment in enumerate(increments):
        if total is None:
            total = increment.float() if coefficients is None else coefficients[j] * increment.float()
        elif coefficients is None:
            total = total + increment.float()
        else:
            total = torch.addcmul(total, increment.float(), coefficients[j])
    assert total is not None
    return total.to(storage)


class _WeightedSum(torch.autograd.Function):
    """The sum with coefficients, keeping the increments themselves for the backward pass.

    Autograd would keep an fp32 copy of every half-precision increment for every layer that merges it:
    memory that grows with the square of the depth.
    """

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, residual: Tensor | None, *increments: Tensor) -> Tensor:
        ctx.save_for_backward(coefficients, *increments)
        return _sum(residual, increments, coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, *increments = ctx.saved_tensors
        for_coefficients, for_residual, *for_increments = ctx.needs_input_grad
        return (
            inner_products(increments, gradient) if for_coefficients else None,
            gradient if for_residual else None,
            *(
                _scaled(coefficients[j], gradient) if wanted else None
                for j, wanted in enumerate(for_increments)
            ),
        )


def merge_gradients(
    gradient: Tensor, increments: Sequence[Tensor], coefficients: Tensor, wanted: bool
) -> tuple[list[Tensor], Tensor]:
    """See :class:`megatron_iiet.ops.backends.Backend`."""
    for_increments = [_scaled(c, gradient) for c in coefficients] if wanted else []
    return for_increments, inner_products(increments, gradient)


def transposed_merge(
    direct: Tensor | None, increment: Tensor, gradients: Sequence[Tensor], coefficients: Tensor, wanted: bool
) -> tuple[Tensor, Tensor]:
    """See :class:`megatron_iiet.ops.backends.Backend`."""
    products = inner_products(gradients, increment) if wanted else coefficients.new_empty(0)
    return _sum(direct, gradients, coefficients), products


def inner_products(tensors: Sequence[Tensor], other: Tensor) -> Tensor:
    """⟨tensors[j], other⟩ in fp32, [k]."""
    other32 = other.float()
    return torch.stack([(other32 * t.float()).sum() for t in tensors])


def _scaled(coefficient: Tensor, gradient: Tensor) -> Tensor:
    return (coefficient * gradient.float()).to(gradient.dtype)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    mean_square = torch.linalg.vecdot(x32, x32).unsqueeze(-1) / x.shape[-1]
    return (x32 * torch.rsqrt(mean_square + eps) * weight.float()).to(x.dtype)
