"""The derivative of ``merge_norm`` in terms of the kernels, the same for every fused backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def save_for_backward(
    ctx: Any,
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
    merged: Tensor,
    rstd: Tensor,
) -> None:
    """Keep what :func:`gradients_of_merge_norm` needs, and no copy of anything: the history is long."""
    ctx.increments = len(increments)
    norm = (None, None) if norm_weight is None else (merged if increments else residual, rstd)
    ctx.save_for_backward(*norm, norm_weight, coefficients, *(() if coefficients is None else increments))


def gradients_of_merge_norm(
    kernel: Callable[..., tuple[Tensor, Tensor, list[Tensor], Tensor]],
    grad_merged: Tensor | None,
    grad_normed: Tensor | None,
    ctx: Any,
    *,
    for_increments: bool,
    for_coefficients: bool,
) -> tuple[Tensor | None, Sequence[Tensor | None], Tensor | None, Tensor | None]:
    """Gradients of (residual, increments, coefficients, norm_weight).

    ``kernel`` is a backend's ``merge_norm_backward``, ``ctx`` was filled by :func:`save_for_backward`;
    gradients of results that nobody used are None.
    """
    nothing: list[Tensor | None] = [None] * ctx.increments
    if grad_merged is None and grad_normed is None:
        return None, nothing, None, None
    # Once: behind this attribute may be a recomputation.
    merged, rstd, norm_weight, coefficients, *saved = ctx.saved_tensors
    norm = (merged, rstd, norm_weight) if grad_normed is not None else (None, None, None)
    base, weight, scaled, row = kernel(
        grad_merged, grad_normed, *norm, saved, coefficients, for_increments, for_coefficients
    )
    gradient = grad_merged if grad_normed is None else base
    assert gradient is not None
    residual = gradient
    increments: Sequence[Tensor | None] = nothing
    if coefficients is None and for_increments:  # all ones: each receives what the residual receives
        increments = [gradient] * ctx.increments
    elif coefficients is not None:
        residual = gradient.sum(0) if coefficients.dim() == 2 else gradient
        increments = scaled if for_increments else nothing
    return (
        residual,
        increments,
        row if for_coefficients and coefficients is not None else None,
        None if grad_normed is None else weight.to(norm_weight.dtype),
    )


class FusedMergeNorm(torch.autograd.Function):
    """``merge_norm`` of a fused backend in eager mode.

    ``apply(kernels, residual, coefficients, norm_weight, eps, *increments)`` → (merged, normed, rstd),
    where the merge of no increments is empty. ``kernels`` has ``merge_norm`` and ``merge_norm_backward``
    with the signatures of csrc/schema.cpp. (The extension's operators are differentiable themselves, for
    torch.compile; this saves what flattening lists costs them on every call.)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        merged, normed, rstd = kernels.merge_norm(residual, increments, coefficients, norm_weight, eps)
        ctx.kernels = kernels
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        save_for_backward(ctx, residual, increments, coefficients, norm_weight, merged, rstd)
        return merged, normed, rstd

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_merged: Tensor | None, grad_normed: Tensor | None, _: None
    ) -> tuple[Any, ...]:
        _, for_residual, for_coefficients, for_weight, _, *for_increments = ctx.needs_input_grad
        residual, increments, coefficients, weight = gradients_of_merge_norm(
            ctx.kernels.merge_norm_backward,
            grad_merged,
            grad_normed,
            ctx,
            for_increments=any(for_increments),
            for_coefficients=for_coefficients,
        )
        return (
            None,
            residual if for_residual else None,
            coefficients,
            weight if for_weight else None,
            None,
            *(
                gradient if wanted else None
                for gradient, wanted in zip(increments, for_increments, strict=True)
            ),
        )
