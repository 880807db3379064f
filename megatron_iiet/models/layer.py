"""The LLaMA decoder layer as a function F: its output minus its input.

    a    = Attention(RMSNorm(y))
    F(y) = a + SwiGLU(RMSNorm(y + a))

so that ``y + F(y)`` is exactly a LLaMA layer. F knows nothing of the solver that integrates it, and of
parallelism only the linear maps it is given: each splits its heads or columns over the tensor-parallel ranks.

Shapes: B batch, T sequence (of the residual stream: this rank's part of it under sequence parallelism), D
hidden, H query heads, G key/value heads, K head width, M feed-forward width; H, G and M are this rank's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.attention_layout import AttentionLayout
from megatron_iiet.ops import merge_norm
from megatron_iiet.ops.pointwise import swiglu
from megatron_iiet.parallel import TensorParallel
from megatron_iiet.parallel.tensor import mark_shared_by_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), statistics in fp32."""

    def __init__(self, width: int, eps: float, backend: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.backend = backend

    def forward(self, x_BTD: Tensor) -> Tensor:
        normed = merge_norm(x_BTD, (), None, self.weight, eps=self.eps, backend=self.backend).normed
        assert normed is not None
        return normed


class KeysValues(NamedTuple):
    """What an evaluation of F attends to, [B, G, T, K] each, the keys rotated."""

    keys: Tensor
    values: Tensor


class Attention(nn.Module):
    """Grouped-query self-attention, causal within documents; q, k and v from one matrix [q; k; v]."""

    def __init__(self, config: ModelConfig, backend: str, parallel: TensorParallel) -> None:
        super().__init__()
        self.head_width, self.backend = config.head_width, backend
        query, kv = (heads * config.head_width for heads in (config.num_attention_heads, config.num_kv_heads))
        self.local_widths = [width // parallel.group.size for width in (query, kv, kv)]
        self.local_heads = self.local_widths[0] // self.head_width, self.local_widths[1] // self.head_width
        biases = config.attention_bias
        self.qkv = parallel.column_linear(config.hidden_size, (query, kv, kv), bias=biases != "none")
        self.output = parallel.row_linear(query, config.hidden_size, bias=biases == "qkvo")
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_width, config.rms_norm_eps, backend)
            self.k_norm = RMSNorm(config.head_width, config.rms_norm_eps, backend)
            for norm in (self.q_norm, self.k_norm):
                mark_shared_by_heads(norm.weight)
        self.weights = config.hidden_size * (query + 2 * kv + query)
        self.key_value_weights = config.hidden_size * 2 * kv
        self.query_width = query

    def forward(
        self, x_BTD: Tensor, layout: AttentionLayout, keys_values: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """``([B, T, D], the keys and values attended to)``; those given are used instead of x's own."""
        if keys_values is not None:
            q = layout.rotate(self._heads(self.qkv(x_BTD, self.local_widths[0]), self.q_norm))
        elif self.q_norm is None:
            q, *kv = layout.rotated_heads(self.qkv(x_BTD), self.local_heads, self.backend)
            keys_values = KeysValues(*kv)
        else:
            q, k, v = self.qkv(x_BTD).split(self.local_widths, dim=-1)
            q = layout.rotate(self._heads(q, self.q_norm))
            keys_values = KeysValues(layout.rotate(self._heads(k, self.k_norm)), self._heads(v))
        return self.output(
            layout.attend(q, *keys_values, self.backend).transpose(1, 2).flatten(2)
        ), keys_values

    def _heads(self, x_BTW: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """[B, T, heads · K] → [B, heads, T, K], each head normed if there is a norm."""
        x_BTHK = x_BTW.unflatten(-1, (-1, self.head_width))
        return (x_BTHK if norm is None else norm(x_BTHK)).transpose(1, 2)

    def forward_flops(self, length: int, *, own_keys: bool = True) -> int:
        """FLOPs of one sequence over all ranks: projections and the full T × T scores (the causal half is
        counted too); ``own_keys``: whether keys and values are computed."""
        weights = self.weights if own_keys else self.weights - self.key_value_weights
        return (2 * weights + 4 * self.query_width * length) * length


class SwiGLU(nn.Module):
    """Feed-forward ``down(silu(gate x) · up x)`` (Shazeer 2020); gate and up from one matrix [gate; up]."""

    def __init__(self, config: ModelConfig, backend: str, parallel: TensorParallel) -> None:
        super().__init__()
        self.backend = backend
        width = config.ffn_hidden_size
        self.gate_up = parallel.column_linear(config.hidden_size, (width, width))
        self.down = parallel.row_linear(width, config.hidden_size)
        self.weights = 3 * config.hidden_size * width

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(swiglu(self.gate_up(x_BTD), self.backend))

    def forward_flops(self, length: int) -> int:
        """FLOPs of one sequence of ``length`` tokens over all ranks."""
        return 2 * self.weights * length


class DecoderLayer(nn.Module):
    """F(y; θ_n): the increment of one whole decoder layer."""

    def __init__(
        self, config: ModelConfig, backend: str, parallel: TensorParallel, *, keeps_keys: bool = False
    ) -> None:
        """``keeps_keys``: later evaluations attend to the keys and values of the first."""
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.attention = Attention(config, backend, parallel)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.mlp = SwiGLU(config, backend, parallel)
        self.backend = backend
        self.keeps_keys = keeps_keys

    def forward(
        self,
        y_BTD: Tensor,
        normed_BTD: Tensor | None,
        layout: AttentionLayout,
        keys_values: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues | None]:
        """``(F(y) [B, T, D], the keys and values for later evaluations if this layer keeps them)``.

        ``normed_BTD`` is ``input_norm(y)`` where the caller already has it; ``keys_values`` are those of the
        layer's first evaluation.
        """
        if normed_BTD is None:
            normed_BTD = self.input_norm(y_BTD)
        return self.of_normed(y_BTD, normed_BTD, layout, keys_values)

    def of_normed(
        self, y_BTD: Tensor, normed_BTD: Tensor, layout: AttentionLayout, keys_values: KeysValues | None
    ) -> tuple[Tensor, KeysValues | None]:
        """As :meth:`forward`, of an input that is normed already; the same code for all evaluations, which
        is what training.compile compiles."""
        a_BTD, keys_values = self.attention(normed_BTD, layout, keys_values)
        norm = self.post_attention_norm
        again_BTD = merge_norm(y_BTD, (a_BTD,), None, norm.weight, eps=norm.eps, backend=self.backend).normed
        return a_BTD + self.mlp(again_BTD), keys_values if self.keeps_keys else None

    def forward_flops(self, length: int, evaluations: float = 1) -> float:
        """FLOPs of ``evaluations`` of F on one sequence; norms and other elementwise work are not counted."""
        mlp = self.mlp.forward_flops(length)
        first = self.attention.forward_flops(length) + mlp
        later = self.attention.forward_flops(length, own_keys=not self.keeps_keys) + mlp
        return first + (evaluations - 1) * later
