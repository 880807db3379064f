"""Validation loss in the loop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from megatron_iiet.data.loader.batches import ValidationBatches
from megatron_iiet.training.callbacks.base import Callback, is_due

if TYPE_CHECKING:
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
