"""The backends of ``merge_norm``: which are there, and which one runs.

A backend is three functions. ``reference`` is plain torch; ``cpu`` and ``cuda`` are the extension's
operators, ``triton`` the kernels of :mod:`megatron_iiet.ops.triton_kernels`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops import reference
from megatron_iiet.ops.attention import attention_runs_here, causal_attention
from megatron_iiet.ops.extension import load_extension
from megatron_iiet.ops.pointwise import rotated_heads, swiglu

NAMES = ("reference", "cpu", "cuda", "triton")


@dataclass(frozen=True)
class Backend:
    """What a backend computes; arguments are already checked. Shapes as in
    :func:`megatron_iiet.ops.merge_norm`."""

    merge_norm: Callable[..., tuple[Tensor, Tensor | None]]
    """(residual, increments, coefficients, norm_weight, eps) → (merged, normed); differentiable."""
    merge_gradients: Callable[[Tensor, Sequence[Tensor], Tensor, bool], tuple[Sequence[Tensor], Tensor]]
    """(gradient [...], increments, coefficients [k], whether for increments) →
    (gradient of each increment or nothing, of the coefficients)."""
    transposed_merge: Callable[[Tensor | None, Tensor, Sequence[Tensor], Tensor, bool], tuple[Tensor, Tensor]]
    """(direct [...] or None, increment, M gradients, coefficients [M], whether for coefficients) →
    (direct + Σ_m coefficients[m] · gradients[m], ⟨increment, gradients[m]⟩ [M] or [0])."""


def unavailable(name: str) -> str | None:
    """Why a backend cannot run on this machine; None if it can."""
    if name == "reference":
        return None
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed (pip install triton)"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted or torch.cuda.is_available() else "there is no GPU"
    status = load_extension()
    if not status.loaded:
        return status.reason
    if name == "cuda":
        if not status.build["cuda"]:
            return f"the extension was built without CUDA kernels: {status.build['no_cuda_because']}"
        if not torch.cuda.is_available():
            return "there is no GPU"
    return None


_READY: dict[str, Backend] = {}  # a dictionary and no @cache: torch.compile looks into functions, past caches


def get_backend(name: str) -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: there is none of that name, or it cannot run here.
    """
    if name not in _READY:
        _READY[name] = _make_backend(name)
    return _READY[name]


def _make_backend(name: str) -> Backend:
    if name not in NAMES:
        raise ValueError(f"backend is '{name}', expected one of {', '.join(NAMES)}")
    reason = unavailable(name)
    if reason is not None:
        raise ValueError(f"backend '{name}' is not available here: {reason}")
    if name == "reference":
        return Backend(reference.merge_norm_reference, reference.merge_gradients, reference.transposed_merge)
    if name == "triton":
        from megatron_iiet.ops import triton_kernels

        return _fused(triton_kernels.operators())
    return _fused(torch.ops.megatron_iiet)


def _fused(kernels: Any) -> Backend:
    """A backend of kernels with the signatures of csrc/schema.cpp."""

    def merge_norm(
        residual: Tensor | None,
        increments: Sequence[Tensor],
        coefficients: Tensor | None,
        norm_weight: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor | None]:
        if not increments and norm_weight is None:  # nothing to compute
            return reference.merge_norm_reference(residual, increments, coefficients, norm_weight, eps)
        if norm_weight is not None and norm_weight.dtype != torch.float32:
            storage = increments[0].dtype if residual is None else residual.dtype
            norm_weight = norm_weight if norm_weight.dtype == storage else norm_weight.float()
        coefficients = coefficients if increments else None
        results = FusedMergeNorm.apply(kernels, residual, coefficients, norm_weight, eps, *increments)
        merged = results[0] if increments else residual
        assert merged is not None
        return merged, None if norm_weight is None else results[-2]

    def merge_gradients(
        gradient: Tensor, increments: Sequence[Tensor], coefficients: Tensor, wanted: bool
    ) -> tuple[Sequence[Tensor], Tensor]:
        _, _, for_increments, for_coefficients = kernels.merge_norm_backward(
            gradient, None, None, None, None, increments, coefficients, wanted, True
        )
        return for_increments, for_coefficients

    return Backend(merge_norm, merge_gradients, kernels.transposed_merge)


class FusedMergeNorm(torch.autograd.Function):
    """``merge_norm`` of a fused backend, its derivative in terms of the kernels.

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


def resolve_backend(requested: str, device: torch.device | str = "cpu") -> tuple[str, str]:
    """The backend that ``requested`` means for tensors on ``device``, and why: ``(name, reason)``.

    ``auto`` takes the extension's kernels for the device and falls back to ``reference``, saying why. A fused
    backend is compared with the reference on a few numbers on this very device before it is chosen.

    Raises:
        ValueError: ``requested`` cannot run here, not on this device, or computes something else.
    """
    kind = torch.device(device).type
    name = (kind if kind in ("cpu", "cuda") else "reference") if requested == "auto" else requested
    reason = _unsupported_reason(name, kind)
    if reason is None:
        get_backend(name)  # before anything is compiled, which would be compiled again once it is there
        return name, "asked for" if requested == name else _describe(name)
    if requested == "auto":
        return "reference", f"plain torch; {reason}"
    supported = [other for other in NAMES if _unsupported_reason(other, kind) is None]
    raise ValueError(
        f"ops.backend is '{requested}', but {reason}; available on this {kind} device: {', '.join(supported)}"
    )


def chosen_backend(device: torch.device | str, *, tell: bool) -> str:
    """What ``auto`` means on a device; a fallback to plain torch is told in one line on standard error."""
    name, reason = resolve_backend("auto", device)
    if name == "reference" and tell:
        print(f"merge_norm backend: {name} ({reason})", file=sys.stderr, flush=True)
    return name


def _describe(name: str) -> str:
    """What a chosen backend is, for the line at start."""
    if name == "reference":
        return "plain torch"
    if name == "cpu":
        return f"compiled extension, {torch.backends.cpu.get_cpu_capability()} kernels"
    return f"compiled extension, CUDA {load_extension().build['cuda']} kernels"


def _unsupported_reason(name: str, kind: str) -> str | None:
    """Why a backend cannot be used for tensors on a device of this kind; None if it can."""
    if name not in NAMES:
        return f"there are only {', '.join(NAMES)}"
    reason = unavailable(name)
    if reason is None and name in ("cpu", "cuda") and name != kind:
        reason = f"its kernels cannot read tensors on {kind}"
    if reason is None and name == "triton" and kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f"its kernels cannot read tensors on {kind}"
    return reason or self_check(name, kind)


def _of_own_size(difference: Tensor, size: Tensor) -> float:
    return (difference.abs().max() / size.abs().max()).item()


def _cross_entropy(logits_nV: Tensor, columns_n: Tensor, name: str) -> list[Tensor]:
    """Logarithms of the sums of exponentials, and the gradient by the logits."""
    if name != "cpu":
        here_n = columns_n.to(logits_nV.device)
        one_hot_nV = torch.zeros_like(logits_nV)
        one_hot_nV[here_n >= 0] = F.one_hot(here_n[here_n >= 0], logits_nV.shape[1]).float()
        return [logits_nV.logsumexp(-1), logits_nV.softmax(-1) - one_hot_nV]
    kernels = torch.ops.megatron_iiet
    tops_n, sums_n, _ = kernels.cross_entropy_parts(logits_nV, columns_n)
    numbers = columns_n, tops_n, 1 / sums_n, torch.ones_like(sums_n)
    return [tops_n + sums_n.log(), kernels.cross_entropy_gradient_(logits_nV, *numbers)]


def _attention_in_fp32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True).to(q.dtype)


@cache
def self_check(name: str, kind: str) -> str | None:
    """Run small cases of all that ``name`` has kernels for, with their gradients, on it and on the reference;
    the difference if there is one."""
    if name == "reference":
        return None

    def results(name: str) -> list[Tensor]:
        backend = get_backend(name)
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(kind).requires_grad_()

        residual, weight, coefficients = draw(3, 256), draw(256), draw(2)
        increments = [draw(3, 256), draw(3, 256)]
        merged, normed = backend.merge_norm(residual, increments, coefficients, weight, 1e-6)
        assert normed is not None
        leaves = [residual, *increments, coefficients, weight]
        gradients = torch.autograd.grad((merged * draw(3, 256)).sum() + (normed * draw(3, 256)).sum(), leaves)
        with torch.no_grad():
            transposed = backend.transposed_merge(residual, increments[0], increments, coefficients, True)
        rows, cos, sin = draw(1, 3, 256), draw(3, 64).detach(), draw(3, 64).detach()
        parts = [swiglu(rows, name).flatten(), *rotated_heads(rows, (2, 1), cos, sin, name)]
        flat = torch.cat([part.flatten() for part in parts])
        gradients += torch.autograd.grad((flat * draw(len(flat))).sum(), rows)
        made = [merged.detach(), normed.detach(), *gradients, *transposed, flat.detach()]
        made += _cross_entropy(draw(3, 200).detach(), torch.tensor([5, -1, 199]), name)
        q, k, v = (draw(1, heads, 40, 32).bfloat16() for heads in (2, 1, 1))
        if kind == "cpu" and attention_runs_here():
            out = causal_attention(q, k, v) if name == "cpu" else _attention_in_fp32(q, k, v)
            made += [out.detach(), *torch.autograd.grad((out * draw(40, 32)).sum(), (q, k, v))]
        return made

    try:
        pairs = zip(results(name), results("reference"), strict=True)
        errors = [(_of_own_size(a - b, b) / (1000 if a.dtype == torch.bfloat16 else 1)) for a, b in pairs]
    except Exception as failure:  # whatever a kernel that does not fit this device raises
        return f"its self-check on this device failed: {failure}"
    wrong = [error for error in errors if not error < 1e-5]  # NaN is wrong too
    return f"it is {wrong[0]:.1e} away from plain torch on this device" if wrong else None
