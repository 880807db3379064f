"""``merge_norm`` on GPUs without the compiled extension, AMD's included: Triton kernels, optional.

Nothing in this file has run on a GPU: it was tested in Triton's interpreter and compiled for sm_80, sm_90 and
gfx942.

How it is laid out:

* One program holds one row of h numbers. The history is a table of addresses on the device and its length a
  run-time number, so a kernel is compiled once for every layer of a model, however much history it reads.
* What is not there (residual, coefficients) is a run-time flag and a masked load. The norm of a merge and the
  norm recomputed from the stored merge are thus the same machine code: that makes them bit-equal.
* Sums over rows go through partial sums, as many as :func:`_programs` says, added in a fixed order.

``merge_norm``, ``merge_norm_backward`` and ``transposed_merge`` are the operators of csrc/schema.cpp and keep
the contract of :mod:`megatron_iiet.ops.merge_norm`. Import this module only where triton was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_iiet.ops.extension import describe_operators

NAMESPACE = "megatron_iiet_triton"
MAX_WIDTH = 16384
MAX_TENSORS = 128
# As it was when triton was imported, which is when its functions become interpreted ones.
INTERPRETED: bool = triton.knobs.runtime.interpret

# Triton compiles again for an integer that is 1 or a multiple of 16, and for a pointer that is a multiple of
# 16, unless told that it does not matter. What changes from layer to layer must not matter.
_SCALARS_AT = ["table", "coefficients"]


@triton.jit
def _slab(table, index, like):  # type: ignore[no-untyped-def]
    """Address number ``index`` of the table, as a pointer of the type of ``like``."""
    # _ready sees to the 16 bytes; without the hint Triton would load number by number.
    return tl.multiple_of(tl.load(table + index).to(like.dtype), 16)


@triton.jit
def _load(pointer, columns, mask):  # type: ignore[no-untyped-def]
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "R", "n"], do_not_specialize_on_alignment=_SCALARS_AT)
def _merge_norm_kernel(  # type: ignore[no-untyped-def]
    residual, table, coefficients, weight, merged, normed, rstd,
    T, R, n, has_residual, has_coefficients, store_merged, eps,
    h: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    # Programs of one row and all its coefficient rows are neighbours: they find its history in the L2 cache.
    program = tl.program_id(0).to(tl.int64)
    r = program % R
    t = program // R
    columns = tl.arange(0, BLOCK)
    inside = columns < h
    total = _load(residual + t * h, columns, inside & has_residual)
    for j in tl.range(0, n, loop_unroll_factor=4):
        # A coefficient 1 makes the fma a plain addition.
        coefficient = tl.load(coefficients + r * n + j, mask=has_coefficients, other=1.0)
        total = tl.fma(coefficient, _load(_slab(table, j, residual) + t * h, columns, inside), total)
    row = r * T + t
    rounded = total.to(merged.dtype.element_ty)
    tl.store(merged + row * h + columns, rounded, mask=inside & store_merged)
    if NORM:  # R is 1
        # Beyond h an infinite coefficient times 0 has left NaN.
        y = tl.where(inside, rounded.to(tl.float32), 0.0)
        scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(y * y, axis=0) / h + eps))
        w = _load(weight, columns, inside)
        tl.store(rstd + row, scale)
        tl.store(normed + row * h + columns, (y * scale * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "n", "P"], do_not_specialize_on_alignment=_SCALARS_AT)
def _backward_kernel(  # type: ignore[no-untyped-def]
    grad_merged, grad_normed, merged, rstd, weight, coefficients, table,
    grad_base, weight_partials, coefficient_partials,
    T, n, P, has_grad_merged,
    h: tl.constexpr, BLOCK: tl.constexpr, TENSORS: tl.constexpr,
    NORM: tl.constexpr, INCREMENTS: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < h
    numbers = tl.arange(0, TENSORS)
    dots = tl.zeros([TENSORS], tl.float32)
    grad_w = tl.zeros([BLOCK], tl.float32)
    for t in range(p, T, P):
        g = _load(grad_merged + t * h, columns, inside & has_grad_merged)
        if NORM:
            # Read for every row, from the cache: kept, it would cost as many registers as a row.
            w = _load(weight, columns, inside)
            dy = _load(grad_normed + t * h, columns, inside)
            y = _load(merged + t * h, columns, inside)
            scale = tl.load(rstd + t)
            grad_w += dy * y * scale
            mean = tl.sum(w * dy * y, axis=0) * (scale * scale * scale) / h
            rounded = (g + scale * (w * dy) - y * mean).to(grad_base.dtype.element_ty)
            tl.store(grad_base + t * h + columns, rounded, mask=inside)
            g = tl.where(inside, rounded.to(tl.float32), 0.0)
        # G is still in registers.
        for j in range(n):
            if COEFFICIENTS:
                x = _load(_slab(table, j, grad_merged) + t * h, columns, inside)
                dots += tl.where(numbers == j, tl.sum(x * g, axis=0), 0.0)
            if INCREMENTS:
                out = _slab(table, n + j, grad_merged) + t * h
                value = tl.load(coefficients + j) * g
                tl.store(out + columns, value.to(grad_merged.dtype.element_ty), mask=inside)
    if NORM:
        tl.store(weight_partials + p * h + columns, grad_w, mask=inside)
    if COEFFICIENTS:
        tl.store(coefficient_partials + p * n + numbers, dots, mask=numbers < n)


@triton.jit(do_not_specialize=["T", "n", "M", "P"], do_not_specialize_on_alignment=_SCALARS_AT)
def _transposed_kernel(  # type: ignore[no-untyped-def]
    direct, table, coefficients, coefficient_partials,
    T, n, M, P, has_direct,
    h: tl.constexpr, BLOCK: tl.constexpr, TENSORS: tl.constexpr,
    INCREMENTS: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    # For n increments at once; the programs that read the same gradients are neighbours.
    program = tl.program_id(0).to(tl.int64)
    j = program % n
    p = program // n
    columns = tl.arange(0, BLOCK)
    inside = columns < h
    numbers = tl.arange(0, TENSORS)
    dots = tl.zeros([TENSORS], tl.float32)
    x = tl.zeros([BLOCK], tl.float32)
    for t in range(p, T, P):
        if COEFFICIENTS:
            x = _load(_slab(table, M + j, direct) + t * h, columns, inside)
        total = _load(direct + t * h, columns, inside & has_direct)
        for m in range(M):
            g = _load(_slab(table, m, direct) + t * h, columns, inside)
            total = tl.fma(tl.load(coefficients + m * n + j), g, total)
            if COEFFICIENTS:
                dots += tl.where(numbers == m, tl.sum(x * g, axis=0), 0.0)
        if INCREMENTS:
            out = _slab(table, M + n + j, direct) + t * h
            tl.store(out + columns, total.to(direct.dtype.element_ty), mask=inside)
    if COEFFICIENTS:
        tl.store(coefficient_partials + (p * M + numbers) * n + j, dots, mask=numbers < M)


@triton.jit(do_not_specialize=["count", "width"])
def _sum_kernel(partials, total, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    columns = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    tile = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < count)[:, None] & inside[None, :]
        tile += tl.load(partials + rows[:, None] * width + columns[None, :], mask=mask, other=0.0)
    tl.store(total + columns, tl.sum(tile, axis=0), mask=inside)


def merge_norm(
    residual: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As in csrc/schema.cpp: ``merged`` [R?, ..., h], ``normed`` [..., h] and ``rstd`` [...] of a residual
    [..., h], n increments like it and coefficients [n] or [R, n].

    Raises:
        ValueError: h or a number of tensors is over the limit, the tensors are not on a GPU, or several rows
            of coefficients are to be normed.
    """
    first = increments[0] if residual is None else residual
    h, shape = first.shape[-1], first.shape
    rows = coefficients.shape[:-1] if coefficients is not None else ()
    R = math.prod(rows)
    _check("merge_norm", first, increments=len(increments), coefficients=R)
    _check_rows("merge_norm", rows, norm_weight)
    merged = _new(first, (*rows, *shape) if increments else (0,))
    normed = _new(first, (0,) if norm_weight is None else shape)
    rstd = first.new_empty((0,) if norm_weight is None else shape[:-1], dtype=torch.float32)
    increments = [_ready(t) for t in increments]
    first = _ready(first)
    # Pointers must be of the same types with and without: what is missing is replaced, and a flag says so.
    weight = first if norm_weight is None else _ready(norm_weight)
    T = first.numel() // h
    _run(
        _merge_norm_kernel, T * R,
        first, _table(first.device, increments), rstd if coefficients is None else coefficients.contiguous(),
        weight, merged if increments else first, normed, rstd,
        T, R, len(increments),
        residual is not None, coefficients is not None, bool(increments), eps,
        h=h, NORM=norm_weight is not None, **_shape(h),
    )  # fmt: skip
    return merged, normed, rstd


def merge_norm_backward(
    grad_merged: Tensor | None,
    grad_normed: Tensor | None,
    merged: Tensor | None,
    rstd: Tensor | None,
    norm_weight: Tensor | None,
    increments: Sequence[Tensor],
    coefficients: Tensor | None,
    want_increments: bool,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """As in csrc/schema.cpp: the gradient at the rounded sum [..., h], of the weight [h], of the increments
    and of the coefficients. A None of the first two arguments is zeros; without coefficients none of the last
    two results is wanted.

    Raises:
        ValueError: as in :func:`merge_norm`, or both gradients are None.
    """
    like = grad_normed if grad_merged is None else grad_merged
    if like is None:
        raise ValueError("merge_norm_backward: grad_merged and grad_normed are both None; give one of them")
    if coefficients is None:
        coefficients = torch.empty(0, dtype=torch.float32, device=like.device)
        want_increments = want_coefficients = False
    R = coefficients.shape[0] if coefficients.dim() == 2 else 1
    _check("merge_norm_backward", like, increments=len(increments), coefficients=R)
    _check_rows("merge_norm_backward", coefficients.shape[:-1], grad_normed)
    norm = [t for t in (grad_normed, merged, rstd, norm_weight) if grad_normed is not None and t is not None]
    assert len(norm) in (0, 4), "grad_normed comes with merged, rstd and norm_weight"

    like = _ready(like)
    wants = (want_increments, want_coefficients) if R == 1 else (False, False)
    G, grad_weight, grad_increments, grad_coefficients = _launch_backward(
        like, grad_merged is not None, norm, increments, coefficients, *wants
    )
    if R > 1 and (want_increments or want_coefficients):
        # G of every coefficient row is needed at once: a second kernel, the transposed merge.
        grad_increments, grad_coefficients = _launch_transposed(
            None, increments, like.unbind(0), coefficients, want_increments, want_coefficients
        )
    if want_coefficients:
        grad_coefficients = grad_coefficients.view(coefficients.shape)
    return G, grad_weight, grad_increments, grad_coefficients


def transposed_merge(
    direct: Tensor | None,
    increment: Tensor,
    gradients: Sequence[Tensor],
    coefficients: Tensor,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor]:
    """As in csrc/schema.cpp: the gradient of an increment [..., h] from those of the M merges that read it,
    and of its coefficients [M]. The increment is not read where only the first is wanted.

    Raises:
        ValueError: as in :func:`merge_norm`, or there are no gradients.
    """
    if not gradients:
        raise ValueError("transposed_merge: gradients is empty; give at least one tensor")
    _check("transposed_merge", increment, gradients=len(gradients))
    (grad_increment,), grad_coefficients = _launch_transposed(
        direct, [increment], gradients, coefficients, True, want_coefficients
    )
    return grad_increment, grad_coefficients


@cache
def operators() -> Any:
    """These three as operators, which torch.compile takes as they are: it can't follow addresses."""
    for function in (merge_norm, merge_norm_backward, transposed_merge):
        torch.library.custom_op(f"{NAMESPACE}::{function.__name__}", function, mutates_args=())
    describe_operators(NAMESPACE)
    return getattr(torch.ops, NAMESPACE)


def _launch_backward(
    grad_merged: Tensor,
    has_grad_merged: bool,
    norm: Sequence[Tensor],
    increments: Sequence[Tensor],
    coefficients: Tensor,
    want_increments: bool,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """G, and in the same pass what is wanted of the increments' and of the coefficients' gradients."""
    h, n = grad_merged.shape[-1], len(increments) if want_increments or want_coefficients else 0
    T = grad_merged.numel() // h
    P = _programs(T, h)
    sources = [_ready(t) if want_coefficients else None for t in increments[:n]]
    outputs = [_new(grad_merged, increments[0].shape) for _ in increments] if want_increments else []
    grad_normed, merged, rstd, weight = [_ready(t) for t in norm] or [grad_merged] * 4
    G = _new(grad_merged, grad_merged.shape if norm else (0,))
    for_weight = _new(coefficients, (P * h if norm else 0,))
    for_coefficients = _new(coefficients, (P * n if want_coefficients else 0,))
    _run(
        _backward_kernel, P if norm or n else 0,
        grad_merged, grad_normed, merged, rstd, weight,
        coefficients.contiguous(), _table(G.device, sources, outputs), G, for_weight, for_coefficients,
        T, n, P, has_grad_merged,
        h=h, TENSORS=MAX_TENSORS, NORM=bool(norm),
        INCREMENTS=want_increments, COEFFICIENTS=want_coefficients, **_shape(h),
    )  # fmt: skip
    grad_weight = _sum(for_weight, h) if norm else for_weight
    return G, grad_weight, outputs, _sum(for_coefficients, n) if want_coefficients else for_coefficients


def _launch_transposed(
    direct: Tensor | None,
    increments: Sequence[Tensor],
    gradients: Sequence[Tensor],
    coefficients: Tensor,
    want_increments: bool,
    want_coefficients: bool,
) -> tuple[list[Tensor], Tensor]:
    """From M gradients of merges: the gradients of n increments, and of the coefficients, fp32 [M * n]."""
    gradients = [_ready(t) for t in gradients]
    like = gradients[0]
    h, n, M = like.shape[-1], len(increments), len(gradients)
    T = like.numel() // h
    P = _programs(T, h)
    sources = [_ready(t) if want_coefficients else None for t in increments]
    outputs = [_new(like, like.shape) for _ in increments] if want_increments else []
    partials = _new(coefficients, (P * M * n if want_coefficients else 0,))
    _run(
        _transposed_kernel, P * n,
        like if direct is None else _ready(direct), _table(like.device, gradients, sources, outputs),
        coefficients.contiguous(), partials, T, n, M, P, direct is not None,
        h=h, TENSORS=MAX_TENSORS, INCREMENTS=want_increments, COEFFICIENTS=want_coefficients, **_shape(h),
    )  # fmt: skip
    return outputs, _sum(partials, M * n) if want_coefficients else partials


def _sum(partials: Tensor, width: int) -> Tensor:
    """The sum of rows of ``width`` numbers, in an order that their count alone decides: fp32 [width]."""
    total = _new(partials, (width,))
    count = partials.numel() // max(width, 1)
    _run(_sum_kernel, triton.cdiv(width, 64), partials, total, count, width, ROWS=32, BLOCK=64, num_warps=4)
    return total


def _run(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    if programs:
        with torch.cuda.device_of(arguments[0]):
            kernel[(programs,)](*arguments, **constants)


def _programs(T: int, h: int) -> int:
    """Programs, each with one partial sum, for T rows: a function of T and h, never of the GPU.

    Enough to fill a GPU, few enough that partial sums as wide as a row are little to read and write.
    """
    return min(T, max(512, min(2048, 2**21 // h)))


def _shape(h: int) -> dict[str, int]:
    # 16 numbers of a row in each thread: with more, the backward kernel's registers leave room for few warps.
    block = triton.next_power_of_2(h)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def _new(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _ready(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes; a copy if need be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _table(device: torch.device, *groups: Sequence[Tensor | None]) -> Tensor:
    """The tensors' addresses, 0 for None, as int64 on the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError("merge_norm: ops.backend 'triton' can't be captured in a CUDA graph; use another")
    addresses = [0 if t is None else t.data_ptr() for group in groups for t in group]
    # From pinned memory, or the host would wait for the device at every call.
    on_host = torch.tensor(addresses, dtype=torch.int64, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _check(function: str, like: Tensor, **counts: int) -> None:
    h = like.shape[-1]
    if not 1 <= h <= MAX_WIDTH:
        raise ValueError(f"{function}: the last dimension is {h}, the Triton kernels take 1 to {MAX_WIDTH}")
    for name, count in counts.items():
        if count > MAX_TENSORS:
            raise ValueError(f"{function}: {name} has {count} entries, the Triton kernels take {MAX_TENSORS}")
    if not (like.is_cuda or INTERPRETED):
        raise ValueError(f"{function}: the tensors are on {like.device}, the Triton backend needs a GPU")


def _check_rows(function: str, rows: Sequence[int], norm: Tensor | None) -> None:
    if rows and norm is not None:
        raise ValueError(f"{function}: coefficients has {rows[0]} rows, but a norm is of one merge")
