"""Learning rate as a pure function of the step: resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from megatron_iiet.config.optimizers import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of step ``step`` (0-based) of ``steps``: linear warm-up, then ``config.schedule``.

    The first step already moves (1/warm-up of the peak); where the schedule falls, the last one has reached
    ``min_lr_ratio``.
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    low = config.lr * config.min_lr_ratio
    return low + (config.lr - low) * _SHAPES[config.schedule](config, step + 1, warmup, steps)


def _progress(taken: int, start: int, stop: int) -> float:
    """How far ``taken`` steps are from ``start`` to ``stop``, 0 to 1."""
    return min(1.0, max(0.0, (taken - start) / max(1, stop - start)))


_SHAPES: dict[str, Callable[[OptimizerConfig, int, int, int], float]] = {
    "cosine": lambda c, taken, warmup, steps: 0.5 * (1 + math.cos(math.pi * _progress(taken, warmup, steps))),
    "linear": lambda c, taken, warmup, steps: 1 - _progress(taken, warmup, steps),
    "constant": lambda c, taken, warmup, steps: 1.0,
    # Warm-up, stable, decay (MiniCPM, Hu et al. 2024, with a line as decay).
    "wsd": lambda c, taken, warmup, steps: (
        1 - _progress(taken, steps - round(c.decay_fraction * steps), steps)
    ),
}
"""By ``optimizer.schedule``: the share of the way from the final to the peak rate, when ``taken`` steps, this
one among them, of ``steps`` are taken and the warm-up was ``warmup`` of them."""
