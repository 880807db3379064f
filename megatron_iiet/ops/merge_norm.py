"""``merge_norm``: the step that makes a numerical Transformer, as one public function.

    merged = residual + Σ_j coefficients[j] · increments[j]
    normed = merged · rsqrt(mean(merged²) + eps) · norm_weight

The contract every backend keeps is in docs/kernels.md, as are the forms that appear in the model: ``merged``
is rounded to the storage type (fp32, bf16, fp16) before it is normed; all else is fp32, summed in the order
residual, increments[0], increments[1], …, and deterministic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_iiet.ops.backends import get_backend

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MergeNorm(NamedTuple):
    """Result of :func:`merge_norm`."""

    merged: Tensor
    """[..., d], or [R, ..., d] for R coefficient rows; storage type of the inputs."""
    normed: Tensor | None
    """[..., d], RMSNorm of ``merged`` times ``norm_weight``; None without ``norm_weight``."""


def merge_norm(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None = None,
    norm_weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "reference",
) -> MergeNorm:
    """Merge increments into a residual stream and normalise the result.

    Args:
        residual: [..., d] or None (then the merge is the weighted sum alone).
        increments: k tensors of the residual's shape and type; k may be 0 if there is a residual.
        coefficients: fp32, [k] or [R, k]; None means all ones.
        norm_weight: [d], with one row of coefficients [k] or none; None skips the norm.
        eps: epsilon of the RMSNorm.
        backend: a name from :func:`megatron_iiet.ops.resolve_backend`.

    Returns:
        MergeNorm: merged and normed, with a leading R if ``coefficients`` has rows.

    Raises:
        ValueError: shapes, types, devices or the backend do not fit; the message names the argument.
    """
    try:
        implementation = get_backend(backend)
    except ValueError as error:
        raise ValueError(f"merge_norm: {error}") from None
    _check(residual, increments, coefficients, norm_weight)
    return MergeNorm(*implementation.merge_norm(residual, increments, coefficients, norm_weight, eps))


def _check(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
) -> None:
    tensors = [*increments] if residual is None else [residual, *increments]
    if not tensors:
        raise ValueError("merge_norm: residual is None and increments is empty; give at least one of them")
    first = tensors[0]
    if first.dtype not in STORAGE_DTYPES:
        raise ValueError(f"merge_norm: storage type {first.dtype} is not fp32, bf16 or fp16")
    offset = 0 if residual is None else -1
    for i, t in enumerate(tensors):
        if t.shape != first.shape or t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"merge_norm: increments[{i + offset}] is {tuple(t.shape)} {t.dtype} on {t.device}, "
                f"expected {tuple(first.shape)} {first.dtype} on {first.device}"
            )
    if coefficients is not None and (
        coefficients.dtype != torch.float32
        or coefficients.dim() not in (1, 2)
        or coefficients.shape[-1] != len(increments)
        or coefficients.device != first.device
    ):
        raise ValueError(
            f"merge_norm: coefficients is {tuple(coefficients.shape)} {coefficients.dtype} on "
            f"{coefficients.device}, expected fp32 [{len(increments)}] or [rows, {len(increments)}] "
            f"on {first.device}"
        )
    if norm_weight is not None:
        if norm_weight.shape != first.shape[-1:] or norm_weight.device != first.device:
            raise ValueError(
                f"merge_norm: norm_weight is {tuple(norm_weight.shape)} on {norm_weight.device}, expected "
                f"[{first.shape[-1]}] on {first.device}"
            )
        if coefficients is not None and coefficients.dim() == 2:
            raise ValueError(
                f"merge_norm: coefficients is {tuple(coefficients.shape)}, but a norm is of one merge: give "
                f"[{len(increments)}], or norm each row's merge in a call of its own"
            )
