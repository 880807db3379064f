"""Causal attention in bf16 on CPUs that multiply it: csrc/cpu/attention_bf16.cpp, elsewhere torch's SDPA.

Shapes: B batch, T sequence, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_iiet.ops.extension import has_cpu_kernels, load_extension
from megatron_iiet.ops.pointwise import looked_into

WIDTHS = 16
"""The kernels' head widths are multiples of it."""


@cache
def attention_runs_here() -> bool:
    """Whether the extension is there and this CPU multiplies bf16."""
    return load_extension().loaded and bool(torch.ops.megatron_iiet.has_attention())


def has_causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, backend: str) -> bool:
    """Whether :func:`causal_attention` takes these, and is worth it: it gives a thread whole heads."""
    return (
        not looked_into()  # first: a compiler looks into the rest
        and has_cpu_kernels(backend)
        and q_BHTK.device.type == "cpu"
        and q_BHTK.dtype == torch.bfloat16
        and q_BHTK.shape[-1] % WIDTHS == 0
        and attention_runs_here()
        and k_BGTK.shape[0] * k_BGTK.shape[1] >= torch.get_num_threads()
    )


def causal_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
    """softmax(q kᵀ / √K) v over the keys up to a query's own, [B, H, T, K], which in memory is [B, T, H, K].

    Scores, sums and gradients are fp32, products' factors and results bf16, as in torch's flash attention on
    CPUs. Of the scores only a sum for each query and head is kept.

    Raises:
        ValueError: this CPU lacks the instructions, or a shape or type does not fit.
    """
    return cast(Tensor, _CausalAttention.apply(q_BHTK, k_BGTK, v_BGTK))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        out_BHTK, log_sums_BHT = torch.ops.megatron_iiet.attention(q_BHTK, k_BGTK, v_BGTK)
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, out_BHTK, log_sums_BHT)
        return cast(Tensor, out_BHTK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHTK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cast(
            tuple[Tensor, Tensor, Tensor],
            torch.ops.megatron_iiet.attention_gradients(gradient_BHTK, *ctx.saved_tensors),
        )
