"""SwiGLU's product and the rotary embedding in fewer passes over memory than their parts' gradients take.

For the backward pass one keeps its input, the other nothing, and both write each gradient once, where
autograd would make one of every operator and put halves together. Backend ``cpu`` has kernels that do each
in one pass (csrc/cpu/pointwise.h), summed in fp32 and rounded once; the others are torch's operators.
torch.compile fuses the plain formulas, so it gets those, and so do torch.func's transforms.

Shapes: B batch, T sequence, M feed-forward width, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.extension import has_cpu_kernels


def looked_into() -> bool:
    """Whether torch.compile or a transform of torch.func traces the call: they want plain operators."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def swiglu(gate_up: Tensor, backend: str = "reference") -> Tensor:
    """``silu(gate) · up`` of [gate; up], [..., 2M] → [..., M] (Shazeer 2020).

    Raises:
        ValueError: the backend is not there.
    """
    if looked_into():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return cast(Tensor, _SwiGLU.apply(gate_up, has_cpu_kernels(backend)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, fused: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.fused = fused
        if fused:
            return cast(Tensor, torch.ops.megatron_iiet.swiglu(gate_up))
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        if ctx.fused:
            return torch.ops.megatron_iiet.swiglu_backward(gradient, gate_up), None
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        for_gate, for_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=for_gate)
        return out, None


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """``x · cos + swap(x) · signed_sin``, [..., K], where swap exchanges the halves of the last dimension:
    the rotary embedding (Su et al. 2021), half-split, if the sines of the first half are negated."""
    if looked_into():
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)
    return cast(Tensor, _Rotate.apply(x, cos, signed_sin))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return _turned(x, cos, signed_sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, signed_sin = ctx.saved_tensors
        half = signed_sin.shape[-1] // 2
        return _turned(gradient, cos, signed_sin.roll(half, -1)), None, None


def rotated_heads(
    qkv: Tensor, heads: tuple[int, int], cos: Tensor, signed_sin: Tensor, backend: str = "reference"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, T, K], keys and values [B, G, T, K] of their product [q; k; v], [B, T, (H + 2G) K], the
    first two as :func:`rotate` turns them; ``heads``: H and G; cosines and sines [T, K] or [B, 1, T, K].

    All three are parts of one tensor, so that of ``qkv`` nothing is kept for values that look into it.

    Raises:
        ValueError: the backend is not there.
    """
    if looked_into():
        q, k, v = _parts(qkv, heads)
        return rotate(q, cos, signed_sin), rotate(k, cos, signed_sin), v
    return cast(
        tuple[Tensor, Tensor, Tensor],
        _RotatedHeads.apply(qkv, heads, cos, signed_sin, has_cpu_kernels(backend)),
    )


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, heads: tuple[int, int], cos: Tensor, signed_sin: Tensor, fused: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, signed_sin)
        ctx.joined = torch.ops.megatron_iiet.rotated_heads if fused else _joined
        return _parts(ctx.joined(*_parts(qkv, heads), cos, signed_sin), heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, signed_sin = ctx.saved_tensors
        back = signed_sin.roll(signed_sin.shape[-1] // 2, -1)
        return ctx.joined(*gradients, cos, back), None, None, None, None


def _parts(qkv: Tensor, heads: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    H, G = heads
    q, k, v = qkv.unflatten(-1, (H + 2 * G, -1)).transpose(1, 2).split((H, G, G), dim=1)
    return q, k, v


def _joined(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """[q; k; v] of its parts, of which queries and keys are turned first."""
    B, H, T, K = q.shape
    G = k.shape[1]
    qkv = q.new_empty(B, T, (H + 2 * G) * K)
    for_q, for_k, for_v = _parts(qkv, (H, G))
    _turned(q, cos, signed_sin, out=for_q)
    _turned(k, cos, signed_sin, out=for_k)
    for_v.copy_(v)
    return qkv


def _turned(x: Tensor, cos: Tensor, signed_sin: Tensor, out: Tensor | None = None) -> Tensor:
    half = x.shape[-1] // 2
    out = torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return out
