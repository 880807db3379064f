"""What other families have besides LLaMA: scaled positions, biases, q/k norms, a head's own width."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_iiet.config.schema import ModelConfig
from megatron_iiet.models.attention_layout import Rotary
from megatron_iiet.models.rope import rotary_frequencies
from tests.models.conftest import SHAPE, Build

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"factor": 3.0}),
    ("llama3", LLAMA3),
    ("llama3", {**LLAMA3, "factor": 32.0, "high_freq_factor": 2.0, "original_max_position_embeddings": 100}),
    ("yarn", YARN),
    ("yarn", {**YARN, "truncate": False}),
    ("yarn", {**YARN, "beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 0.7}),
    ("yarn", {**YARN, "factor": 0.5}),
    ("yarn", {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}),
    ("yarn", {**YARN, "mscale": 2.0}),
    ("yarn", {**YARN, "original_max_position_embeddings": 6}),  # the ramp has no length
]


@pytest.mark.parametrize(("kind", "parameters"), SCALINGS, ids=str)
def test_positions_are_scaled_as_transformers_scales_them(kind: str, parameters: dict[str, Any]) -> None:
    shape: dict[str, Any] = {"num_attention_heads": 4, "head_dim": 32, "max_position_embeddings": 256}
    theirs = LlamaConfig(
        **shape, rope_parameters={"rope_type": kind, "rope_theta": 500.0, **parameters}, hidden_size=64
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    ours = ModelConfig(**shape, rope_scaling={"kind": kind, **parameters}, rotary_base=500.0, hidden_size=64)
    found, ours_factor = rotary_frequencies(ours)
    assert torch.equal(found, wanted)
    assert ours_factor == pytest.approx(factor, rel=1e-12)
    plain, one = rotary_frequencies(ModelConfig(**shape, rotary_base=500.0, hidden_size=64))
    assert one == 1.0
    assert not torch.equal(plain, found)
    cos, signed_sin = Rotary(ours)(200, torch.float32)
    angles = torch.arange(200.0)[:, None] * wanted
    torch.testing.assert_close(cos, (angles.cos() * factor).repeat(1, 2))
    torch.testing.assert_close(signed_sin[:, 16:], angles.sin() * factor)


def test_initial_biases_and_norms(build: Build, tokens: torch.Tensor) -> None:
    """Biases are zero and norms one, so that everything else is drawn as ever."""
    plain, biased = build(), build(model={"attention_bias": "qkvo"})
    assert torch.equal(plain(tokens), biased(tokens))
    biases = {n: p for n, p in biased.named_parameters() if n.endswith(".bias")}
    assert {n.partition("increment.")[2] for n in biases} == {"attention.qkv.bias", "attention.output.bias"}
    assert not any(p.any() for p in biases.values())
    normed = build(model={"qk_norm": True})
    norms = {n: p for n, p in normed.named_parameters() if "q_norm" in n or "k_norm" in n}
    assert {tuple(p.shape) for p in norms.values()} == {(8,)}
    assert len(norms) == 8
    assert all(torch.equal(p, torch.ones(8)) for p in norms.values())


def test_sizes(build: Build) -> None:
    """Written out: hidden 24, three heads of 10 and one for keys and values, four layers."""
    d, q, kv = SHAPE["hidden_size"], 30, 10
    plain, wide = build(model={"head_dim": 8}), build(model={"head_dim": 10})
    assert plain.num_parameters() == build().num_parameters()
    matrices = 4 * d * (2 * (q + kv) - 2 * (24 + 8))
    assert wide.num_parameters() - plain.num_parameters() == matrices
    more = 2 * matrices * 16 + 4 * 4 * (q - 24) * 16 * 16
    assert wide.layer_flops(16) - plain.layer_flops(16) == more
    full = build(model={"head_dim": 10, "attention_bias": "qkvo", "qk_norm": True})
    assert full.num_parameters() - wide.num_parameters() == 4 * (q + 2 * kv + d + 2 * 10)
    assert full.layer_flops(16) == wide.layer_flops(16)
    some = build(model={"head_dim": 10, "attention_bias": "qkv"})
    assert some.num_parameters() - wide.num_parameters() == 4 * (q + 2 * kv)
