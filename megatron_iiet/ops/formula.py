"""The derivative of ``merge_norm`` in terms of the kernels, the same for every fused backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class FusedMergeNorm(torch.autograd.Function):
    """``merge_norm`` of a fused backend.

    ``apply(kernels, residual, coefficients, norm_weight, eps, *increments)`` → merged, where there are
    increments, then normed and rstd, where there is a weight: a compiler has gradients for all of them.
    ``kernels`` has ``merge_norm`` and ``merge_norm_backward`` with the signatures of csrc/schema.cpp.
    """

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Any,
        residual: Tensor | None,
        coefficients: Tensor | None,
        norm_weight: Tensor | None,
        eps: float,
        *increments: Tensor,
    ) -> tuple[Tensor, ...]:
        merged, normed, rstd = kernels.merge_norm(residual, increments, coefficients, norm_weight, eps)
        ctx.kernels = kernels
        ctx.merges, ctx.norms = bool(increments), norm_weight is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        # No copy of anything: the history is long.
        norm = (None, None) if norm_weight is None else (merged if increments else residual, rstd)
        ctx.save_for_backward(*norm, norm_weight, coefficients, *(() if coefficients is None else increments))
        return (merged,) * ctx.merges + (normed, rstd) * ctx.norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        grad_merged = gradients[0] if ctx.merges else None
        grad_normed = gradients[int(ctx.merges)] if ctx.norms else None
        _, for_residual, for_coefficients, for_weight, _, *for_increments = ctx.needs_input_grad
        if grad_merged is None and grad_normed is None:
            return (None,) * len(ctx.needs_input_grad)
        # Once: behind this attribute may be a recomputation.
        merged, rstd, norm_weight, coefficients, *saved = ctx.saved_tensors
        norm = (None, None, None) if grad_normed is None else (merged, rstd, norm_weight)
        base, weight, scaled, row = ctx.kernels.merge_norm_backward(
            grad_merged, grad_normed, *norm, saved, coefficients, any(for_increments), for_coefficients
        )
        gradient = grad_merged if grad_normed is None else base
        assert gradient is not None
        increments: Sequence[Tensor | None] = scaled or [None] * len(for_increments)
        if coefficients is None:  # all ones: each receives what the residual receives
            increments = [gradient] * len(for_increments)
        several_rows = coefficients is not None and coefficients.dim() == 2
        return (
            None,
            (gradient.sum(0) if several_rows else gradient) if for_residual else None,
            row if for_coefficients else None,
            weight.to(norm_weight.dtype) if for_weight and grad_normed is not None else None,
            None,
            *(each if wanted else None for each, wanted in zip(increments, for_increments, strict=True)),
        )
