"""Frequencies of the rotary position embedding, scaled as transformers' ``ROPE_INIT_FUNCTIONS`` define it: to
the same rounding, which a position in the thousands multiplies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_iiet.config.rope import LinearScaling, Llama3Scaling, YarnScaling
from megatron_iiet.config.schema import ModelConfig


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Angle a position of each pair of a head's elements, [K / 2] fp32, and what multiplies cos and sin."""
    # A reciprocal, not a negative power: the rounding must be LLaMA's, position 2000 multiplies it.
    powers = torch.arange(0, config.head_width, 2, dtype=torch.float32) / config.head_width
    periods = config.rotary_base**powers
    scaling = config.resolved_rope_scaling
    match scaling:
        case LinearScaling():
            return 1.0 / periods / scaling.factor, 1.0
        case Llama3Scaling():
            return _llama3(1.0 / periods, scaling), 1.0
        case YarnScaling():
            return _yarn(periods, scaling, config), _attention_factor(scaling)
    assert scaling is None
    return 1.0 / periods, 1.0


def _llama3(inverse: Tensor, scaling: Llama3Scaling) -> Tensor:
    low, high, length = (
        scaling.low_freq_factor,
        scaling.high_freq_factor,
        scaling.original_max_position_embeddings,
    )
    wave_lengths = 2 * math.pi / inverse
    scaled = torch.where(wave_lengths > length / low, inverse / scaling.factor, inverse)
    smooth = (length / wave_lengths - low) / (high - low)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    outside = (wave_lengths < length / high) | (wave_lengths > length / low)
    return torch.where(outside, scaled, between)


def _yarn(periods: Tensor, scaling: YarnScaling, config: ModelConfig) -> Tensor:
    width, length = config.head_width, scaling.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        """The dimension that turns so often over the original length."""
        return (width * math.log(length / (rotations * 2 * math.pi))) / (2 * math.log(config.rotary_base))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(width // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / (scaling.factor * periods)) * (1 - kept) + (1.0 / periods) * kept


def _attention_factor(scaling: YarnScaling) -> float:
    def grown(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale is not None and scaling.mscale_all_dim is not None:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)
