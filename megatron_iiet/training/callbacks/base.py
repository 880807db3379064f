"""The contract between the loop and what happens around it."""

from __future__ import annotations

from megatron_iiet.training.engine import StepResult
from megatron_iiet.training.run import Run


class Callback:
    """Called on every rank, in the run's order. Collectives are allowed; decide by step, not by time."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process (also after a resume)."""

    def on_step(self, run: Run, result: StepResult) -> None:
        """After optimizer step number ``run.step`` (1-based)."""

    def on_end(self, run: Run) -> None:
        """After the last step of this process."""


def is_due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps (0: never) is due after step ``step``."""
    return interval > 0 and step % interval == 0
