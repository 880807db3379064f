"""Learning rate and corrector iterations as pure functions of the step: resuming needs no state."""

from __future__ import annotations

import math

from megatron_iiet.config import RunConfig, iterations_per_layer
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


def iterations_at(config: RunConfig, step: int) -> tuple[list[int], bool]:
    """Corrector iterations of every layer at step ``step`` (0-based), and whether layers merge at all.

    A stage with r = 0 of a schedule is plain Transformer++: no merge.
    """
    schedule = config.solver.schedule
    if config.solver.kind != "iiet" or not schedule:
        return iterations_per_layer(config), True
    layers = config.model.num_layers
    end = 0.0
    for fraction, r in schedule[:-1]:
        end += fraction
        if step < round(end * config.training.steps):
            return [r] * layers, r > 0
    final = iterations_per_layer(config)
    return final, any(final)


def mean_evaluations(config: RunConfig) -> list[float]:
    """Evaluations of F of every layer, averaged over the steps of the run."""
    if config.solver.kind == "iiet" and config.solver.schedule:
        mean = sum(fraction * (r + 1) for fraction, r in config.solver.schedule)
        return [mean] * config.model.num_layers
    return [r + 1.0 for r in iterations_per_layer(config)]
