"""What held-out batches say in the loop: the loss, and whether the corrector contracts."""

from __future__ import annotations

import math

from megatron_iiet.data.loader.batches import Batch, ValidationBatch, ValidationBatches
from megatron_iiet.training.callbacks.base import Callback, is_due
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run


class Validation(Callback):
    """Validates before the first step, every ``interval`` steps and after the last one of the run."""

    def __init__(self, batches: ValidationBatches, interval: int) -> None:
        self.batches = batches
        self.interval = interval

    def on_start(self, run: Run) -> None:
        if run.step == 0:
            self._validate(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        if is_due(run.step, self.interval) or run.step == run.config.training.steps:
            self._validate(run)

    def _validate(self, run: Run) -> None:
        loss = run.engine.evaluate(self.batches)
        run.record({"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))})
        run.say(
            f"step {run.step:>6} | validation loss {loss:.4f} | perplexity {math.exp(min(loss, 700.0)):.2f}"
        )


class SolverDiagnostics(Callback):
    """Every ``interval`` steps: relative residual and influence per layer and iterate, on one batch."""

    def __init__(self, batch: Batch | ValidationBatch, interval: int) -> None:
        """``batch``: this rank's; what the main rank sees in its own is recorded."""
        self.batch = batch
        self.interval = interval

    def on_step(self, run: Run, result: StepResult) -> None:
        if not is_due(run.step, self.interval):
            return
        statistics = run.engine.observe(self.batch)
        values = {
            f"relative_residual/layer_{n}_iterate_{i}": v
            for (n, i), v in statistics.relative_residual.items()
        }
        values |= {f"influence/layer_{n}_iterate_{i}": v for (n, i), v in statistics.influence.items()}
        if not values:
            return
        run.record(values)
        last = max(i for _, i in statistics.relative_residual)
        if last > 0:
            means = []
            for iterate in range(1, last + 1):
                of_iterate = [v for (_, i), v in statistics.relative_residual.items() if i == iterate]
                means.append(f"{sum(of_iterate) / len(of_iterate):.3f}")
            run.say(f"step {run.step:>6} | relative residual of iterations 1..{last}: {' '.join(means)}")
