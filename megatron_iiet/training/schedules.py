"""Learning rate and corrector iterations as pure functions of the step: resuming needs no state."""

from __future__ import annotations

import itertools
import math

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.config.iteration_plan import even_iterations
from megatron_iiet.config.schema import OptimizerConfig, evaluations_in_budget
from megatron_iiet.config.solvers import Iterating, one_per_layer


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

    A stage of a schedule with r = 0 in every layer is plain Transformer++: no merge. With guidance: until its
    first plan.
    """
    if config.guidance.interval:
        return even_iterations(config.model.num_layers, evaluations_in_budget(config)), True
    schedule = config.solver.schedule if isinstance(config.solver, Iterating) else None
    if not schedule:
        return iterations_per_layer(config), True
    ends = itertools.accumulate(fraction for fraction, _ in schedule[:-1])
    stage = sum(step >= round(end * config.training.steps) for end in ends)
    iterations = one_per_layer(schedule[stage][1], config.model.num_layers)
    return iterations, any(iterations)


def mean_evaluations(config: RunConfig) -> list[float]:
    """Evaluations of F of every layer, averaged over the steps of the run. With guidance, which moves them
    about, over the layers too."""
    solver, layers = config.solver, config.model.num_layers
    if config.guidance.interval:
        return [evaluations_in_budget(config) / layers] * layers
    if isinstance(solver, Iterating) and solver.schedule:
        stages = [(share, one_per_layer(r, layers)) for share, r in solver.schedule]
        return [sum(share * solver.evaluations(r[n]) for share, r in stages) for n in range(layers)]
    return [float(solver.evaluations(r)) for r in iterations_per_layer(config)]
