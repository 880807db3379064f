"""Saving during the run and at its end."""

from __future__ import annotations

from megatron_iiet.training.callbacks.base import Callback, is_due
from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run


class Checkpointing(Callback):
    """Saves every ``interval`` steps (0: never in between) and wherever this process stops."""

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.saved_step: int | None = None

    def on_start(self, run: Run) -> None:
        self.saved_step = run.step if run.step else None

    def on_step(self, run: Run, result: StepResult) -> None:
        if is_due(run.step, self.interval):
            self._save(run)

    def on_end(self, run: Run) -> None:
        if self.saved_step != run.step:
            self._save(run)

    def _save(self, run: Run) -> None:
        folder = run.save()
        self.saved_step = run.step
        run.say(f"step {run.step:>6} | checkpoint {folder}")
