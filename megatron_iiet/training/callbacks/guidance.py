"""Influence-guided training: iterations go to the layers where they change something, as training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_iiet.config import iterations_per_layer
from megatron_iiet.config.iteration_plan import IterationPlan
from megatron_iiet.config.schema import evaluations_in_budget
from megatron_iiet.data.loader.batches import ValidationBatches
from megatron_iiet.models.iterations import most_influential
from megatron_iiet.training.callbacks.base import Callback, is_due
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run


class Guidance(Callback):
    """Every ``guidance.interval`` steps: measures the influence of all iterations with full iterations in
    every layer, and puts the plan within the budget in force from the next step on.

    All ranks know all measurements, so they make the same plan.
    """

    def __init__(self, batches: ValidationBatches) -> None:
        """``batches``: this rank's part of the held-out sequences."""
        self.batches = batches

    def on_step(self, run: Run, result: StepResult) -> None:
        guidance, steps = run.config.guidance, run.config.training.steps
        # After the last step a plan would describe a model that was never trained with it.
        if is_due(run.step, guidance.interval) and round(guidance.start * steps) <= run.step < steps:
            self._make_plan(run)

    def _make_plan(self, run: Run) -> None:
        config, guidance = run.config, run.config.guidance
        layers, full = config.model.num_layers, iterations_per_layer(config)[0]
        with run.iterating([full] * layers):
            influence = self._measure(run)
        ranked = influence
        if run.plan is not None and run.plan.influence:
            influence = running_mean(run.plan.influence, influence, guidance.decay)
            ranked = favouring(influence, run.plan.iterations, guidance.inertia)
        counts = most_influential(ranked, layers, evaluations_in_budget(config))
        run.plan = IterationPlan(
            tuple(counts), full, "budget", step=run.step, budget=guidance.budget, influence=influence
        )
        run.record({f"guidance/layer_{n}": r for n, r in enumerate(counts)})
        run.record({"guidance/evaluations": run.plan.evaluations})
        run.record({f"guidance/influence_layer_{n}_iterate_{i}": v for (n, i), v in influence.items()})
        run.enter_stage()

    def _measure(self, run: Run) -> dict[tuple[int, int], float]:
        """Influence by (layer, iterate), the mean over the sequences of all ranks."""
        sums: dict[tuple[int, int], float] = {}
        rows = 0.0
        for batch in self.batches:
            weight = batch.weights.sum().item()
            for key, value in run.engine.observe(batch).influence.items():
                sums[key] = sums.get(key, 0.0) + weight * value
            rows += weight
        # Ranks of one pipeline or tensor-parallel group count several times, all replicas equally often.
        parts = run.context.world.gather_objects((sums, rows))
        total = sum(rows for _, rows in parts)
        return {key: sum(part[key] for part, _ in parts) / total for key in sorted(sums)}


def running_mean(
    before: Mapping[tuple[int, int], float], now: Mapping[tuple[int, int], float], decay: float
) -> dict[tuple[int, int], float]:
    """``decay · before + (1 − decay) · now``: one noisy measurement does not turn a plan over."""
    return {key: decay * before[key] + (1 - decay) * value for key, value in now.items()}


def favouring(
    influence: Mapping[tuple[int, int], float], iterations: Sequence[int], inertia: float
) -> dict[tuple[int, int], float]:
    """``influence``, that of the iterations in force (iterates 1 to r_n of layer n) 1 + ``inertia`` times as
    large.

    A layer that has an iteration learns to make it small, and its neighbour's looks larger.
    """
    return {
        (layer, i): value * (1 + inertia if 1 <= i <= iterations[layer] else 1)
        for (layer, i), value in influence.items()
    }
