"""Is the corrector contracting? Logged, so that a run whose iterations hurt is seen and not guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_iiet.data.loader.batches import Batch, ValidationBatch
from megatron_iiet.training.callbacks.base import Callback, is_due

if TYPE_CHECKING:
    from megatron_iiet.training.engine import StepResult
    from megatron_iiet.training.run import Run


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
