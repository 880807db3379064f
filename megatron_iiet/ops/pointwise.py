"""SwiGLU's product and the rotary embedding in fewer passes over memory than their parts' gradients take.

For the backward pass one keeps its input, the other nothing, and both write each gradient once, where
autograd would make one of every operator and put halves together. torch.compile fuses the plain formulas, so
it gets those, and so do torch.func's transforms.

Shapes: M feed-forward width, K head width.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def _looked_into() -> bool:
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) · up`` of [gate; up], [..., 2M] → [..., M] (Shazeer 2020)."""
    if _looked_into():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return cast(Tensor, _SwiGLU.apply(gate_up))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        for_gate, for_up = out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=for_gate)
        return out


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """``x · cos + swap(x) · signed_sin``, [..., K], where swap exchanges the halves of the last dimension:
    the rotary embedding (Su et al. 2021), half-split, if the sines of the first half are negated."""
    if _looked_into():
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


def _turned(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], signed_sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], signed_sin[..., half:])
    return out
