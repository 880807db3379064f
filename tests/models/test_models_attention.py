"""Attention written out on CPUs in bf16 is SDPA's, to the rounding of bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.attention_layout import (
    LONGEST_WRITTEN_OUT,
    AttentionLayout,
    Rotary,
    attention_layout,
)
from megatron_iiet.ops import products


def layout(length: int, dtype: torch.dtype, positions: Tensor | None = None) -> AttentionLayout:
    rotary = Rotary(ModelConfig(hidden_size=32, num_attention_heads=4, max_position_embeddings=length))
    return attention_layout(rotary, length, dtype, positions)


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether this machine has them or not."""
    monkeypatch.setattr(products, "_SLOW_IN_BF16", False)


def test_written_out_where_it_is_faster() -> None:
    assert layout(8, torch.bfloat16).written_out
    assert not layout(8, torch.float32).written_out
    assert not layout(8, torch.bfloat16, torch.arange(8)[None]).written_out
    assert not layout(LONGEST_WRITTEN_OUT + 1, torch.bfloat16).written_out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_written_out_is_attention(kv_heads: int) -> None:
    """Output and gradients are as close to fp32's as SDPA's in bf16 are."""
    T = 96
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, heads, T, 8, generator=generator) for heads in (4, kv_heads, kv_heads, 4)]

    def run(dtype: torch.dtype, written_out: bool) -> list[Tensor]:
        q, k, v = (x.to(dtype, copy=True).requires_grad_() for x in whole[:3])
        chosen = layout(T, dtype)
        assert chosen.written_out == (dtype == torch.bfloat16)
        if not written_out:
            chosen = AttentionLayout(chosen.cos, chosen.signed_sin)
        out = chosen.attend(q, k, v)
        (out.float() * whole[3]).sum().backward()
        return [x.float() for x in (out.detach(), q.grad, k.grad, v.grad)]  # type: ignore[union-attr]

    exact = run(torch.float32, written_out=False)
    by_sdpa, by_us = (run(torch.bfloat16, written_out=ours) for ours in (False, True))
    for wanted, sdpa, ours in zip(exact, by_sdpa, by_us, strict=True):
        assert (ours - wanted).norm() < 2 * (sdpa - wanted).norm() < 0.05 * wanted.norm()
