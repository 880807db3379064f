"""How many corrector iterations each layer gets: at a step of a run, and by what they change.

All are pure functions: resuming needs no state, and all ranks decide the same.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence

from megatron_iiet.config import RunConfig, iterations_per_layer
from megatron_iiet.config.iteration_plan import Influence
from megatron_iiet.config.schema import evaluations_in_budget
from megatron_iiet.config.solvers import Iterating, one_per_layer


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


def most_influential(influence: Influence, layers: int, evaluations: int) -> list[int]:
    """Iterations of every layer within ``evaluations`` evaluations of F over all layers (E-IIET, IIET paper,
    section 4, under a budget instead of a threshold).

    Every layer has its first evaluation; the others go to the iterations (iterates from 1 on) of largest
    influence. A layer gets as many as it has among them: weights are shared, so which ones does not matter.
    Of equal influences the earlier iterate comes first, then the lower layer.

    Raises:
        ValueError: fewer evaluations than layers, an unknown layer, or an influence that is not finite.
    """
    if evaluations < layers:
        raise ValueError(f"{evaluations} evaluations for {layers} layers; give at least one a layer")
    iterations = {key: value for key, value in influence.items() if key[1] >= 1}
    for (layer, iterate), value in iterations.items():
        if not 0 <= layer < layers:
            raise ValueError(f"influence of layer {layer} is given, but there are {layers} layers, from 0 on")
        if not math.isfinite(value):
            raise ValueError(f"influence of iteration {iterate} of layer {layer} is {value}, not a number")
    ranked = sorted(iterations, key=lambda key: (-iterations[key], key[1], key[0]))
    return _counts(ranked[: evaluations - layers], layers)


def above_threshold(influence: Influence, layers: int, threshold: float) -> list[int]:
    """The number of iterations (iterates from 1 on) of every layer whose influence is at least ``threshold``
    (E-IIET, IIET paper, section 4)."""
    return _counts([key for key, value in influence.items() if key[1] >= 1 and value >= threshold], layers)


def auto_threshold(influence: Influence) -> float:
    """The paper's threshold: what the weakest predictor changes."""
    return min(value for (_, iterate), value in influence.items() if iterate == 0)


def _counts(kept: Sequence[tuple[int, int]], layers: int) -> list[int]:
    counts = Counter(layer for layer, _ in kept)
    return [counts[layer] for layer in range(layers)]


def even_iterations(layers: int, evaluations: int) -> list[int]:
    """Iterations as equal as ``evaluations`` over all layers allow, those left over spread over the depth.

    What to do while nothing is known: it favours neither end of the model, and keeps pipeline stages level.
    """
    extra = evaluations - layers
    return [(n + 1) * extra // layers - n * extra // layers for n in range(layers)]
