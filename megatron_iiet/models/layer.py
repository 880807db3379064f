"""The LLaMA decoder layer as a function F: its output minus its input.

    a    = Attention(RMSNorm(y))
    F(y) = a + SwiGLU(RMSNorm(y + a))

so that ``y + F(y)`` is exactly a LLaMA layer. F knows nothing of the solver that integrates it.

Shapes: B batch, T sequence, D hidden, H query heads, G key/value heads, K head width, M feed-forward width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.ops import merge_norm


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


class Rotary(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), half-split layout as in LLaMA."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.length = config.max_position_embeddings
        # A reciprocal, not a negative power: the rounding must be LLaMA's, position 2000 multiplies it.
        powers_K = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        inverse_K = 1.0 / config.rotary_base**powers_K
        angles = torch.outer(torch.arange(self.length, dtype=torch.float32), inverse_K)
        self.register_buffer("cos", angles.cos().repeat(1, 2), persistent=False)
        # The rotation swaps the halves and negates one: the sign sits in the table, so a roll does the swap.
        self.register_buffer("signed_sin", torch.cat((-angles.sin(), angles.sin()), dim=-1), persistent=False)

    def forward(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of the first ``length`` positions, each [T, K], in ``dtype``."""
        if length > self.length:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the rotary table "
                f"(model.max_position_embeddings = {self.length}); shorten it or enlarge the table"
            )
        cos, sin = self.get_buffer("cos"), self.get_buffer("signed_sin")
        return cos[:length].to(dtype), sin[:length].to(dtype)


def rotate(x_BHTK: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Apply the rotary tables ([T, K] each) to queries or keys."""
    cos_TK, signed_sin_TK = tables
    return torch.addcmul(x_BHTK * cos_TK, x_BHTK.roll(x_BHTK.shape[-1] // 2, -1), signed_sin_TK)


def weight_count(linear: nn.Linear) -> int:
    """Entries of a linear map's matrix; from its shape, because ZeRO-3 holds the matrix elsewhere."""
    return linear.in_features * linear.out_features


class Attention(nn.Module):
    """Causal grouped-query self-attention; queries, keys and values from one matrix [q; k; v]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query_width = config.num_attention_heads * config.head_dim
        self.kv_width = config.num_kv_heads * config.head_dim
        self.grouped = config.num_kv_heads != config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, self.query_width + 2 * self.kv_width, bias=False)
        self.output = nn.Linear(self.query_width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = self.qkv(x_BTD).split((self.query_width, self.kv_width, self.kv_width), dim=-1)
        q_BHTK = rotate(q.view(B, T, -1, self.head_dim).transpose(1, 2), tables)
        k_BGTK = rotate(k.view(B, T, -1, self.head_dim).transpose(1, 2), tables)
        v_BGTK = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        out_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, is_causal=True, enable_gqa=self.grouped
        )
        return self.output(out_BHTK.transpose(1, 2).reshape(B, T, self.query_width))

    def forward_flops(self, length: int) -> int:
        """FLOPs of one sequence: projections and the full T × T scores (the causal half is counted too)."""
        return (
            2 * (weight_count(self.qkv) + weight_count(self.output)) + 4 * self.query_width * length
        ) * length


class SwiGLU(nn.Module):
    """Feed-forward ``down(silu(gate x) · up x)`` (Shazeer 2020); gate and up from one matrix [gate; up]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=False)
        self.down = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTM, up_BTM = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate_BTM) * up_BTM)

    def forward_flops(self, length: int) -> int:
        """FLOPs of one sequence of ``length`` tokens."""
        return 2 * (weight_count(self.gate_up) + weight_count(self.down)) * length


class DecoderLayer(nn.Module):
    """F(y; θ_n): the increment of one whole decoder layer."""

    def __init__(self, config: ModelConfig, backend: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.attention = Attention(config)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, backend)
        self.mlp = SwiGLU(config)
        self.backend = backend

    def forward(self, y_BTD: Tensor, normed_BTD: Tensor | None, tables: tuple[Tensor, Tensor]) -> Tensor:
        """F(y), [B, T, D]; ``normed_BTD`` is ``input_norm(y)`` where the caller already has it."""
        if normed_BTD is None:
            normed_BTD = self.input_norm(y_BTD)
        a_BTD = self.attention(normed_BTD, tables)
        norm = self.post_attention_norm
        normed_BTD = merge_norm(y_BTD, (a_BTD,), None, norm.weight, eps=norm.eps, backend=self.backend).normed
        return a_BTD + self.mlp(normed_BTD)

    def forward_flops(self, length: int) -> int:
        """FLOPs of one evaluation of F on one sequence; norms and other elementwise work are not counted."""
        return self.attention.forward_flops(length) + self.mlp.forward_flops(length)
