"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.run import Run
from megatron_iiet.training.schedules import iterations_at, learning_rate


def train(run: Run, callbacks: Sequence[Callback]) -> None:
    """Train from ``run.step`` to ``run.last_step``.

    Raises:
        FloatingPointError: the loss stopped being finite; the checkpoints before it are untouched.
    """
    config = run.config
    for callback in callbacks:
        callback.on_start(run)
    run.flush()
    stage = None
    while run.step < run.last_step:
        if stage != (stage := iterations_at(config, run.step)):
            iterations, merging = stage
            run.model.set_iterations(iterations, merging=merging)
            run.say(f"step {run.step:>6} | {run.describe_solver()}")
        started = time.perf_counter()
        result = run.engine.train_step(
            run.batches, learning_rate(config.optimizer, run.step, config.training.steps)
        )
        run.step_seconds = time.perf_counter() - started
        run.step += 1
        if not math.isfinite(result.loss):
            raise FloatingPointError(
                f"the loss of step {run.step} is {result.loss}; resume from the last checkpoint with a "
                f"smaller optimizer.lr (now {config.optimizer.lr}) or a larger optimizer.warmup_fraction"
            )
        for callback in callbacks:
            callback.on_step(run, result)
        run.flush()
    for callback in callbacks:
        callback.on_end(run)
