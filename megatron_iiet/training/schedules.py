"""Learning rate as a pure function of the step: resuming needs no state."""

from __future__ import annotations

import math

from megatron_iiet.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (0-based) of ``steps``: linear warm-up, then cosine or constant.

    The first step already moves (1/warm-up of the peak); the last one has reached ``min_lr_ratio``.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup + 1) / max(1, steps - warmup)
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
