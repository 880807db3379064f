"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.run import Run
from megatron_iiet.training.schedules import learning_rate
from megatron_iiet.training.stopping import stop_requests


def train(run: Run, callbacks: Sequence[Callback]) -> None:
    """Train from ``run.step`` to ``run.last_step``, or to the step in which a rank is sent SIGUSR1.

    Raises:
        FloatingPointError: loss or gradient stopped being finite; the checkpoints before are untouched.
    """
    with stop_requests(run.context) as agreed_to_stop:
        run.enter_stage()  # before the callbacks, which may validate
        for callback in callbacks:
            callback.on_start(run)
        run.flush()
        while run.step < run.last_step:
            _train_step(run, callbacks)
            run.continue_saving()
            if run.step < run.last_step and agreed_to_stop():
                run.say(f"step {run.step:>6} | stopping on SIGUSR1; the same command goes on from here")
                break
        for callback in callbacks:
            callback.on_end(run)
        run.finish_saving()


def _train_step(run: Run, callbacks: Sequence[Callback]) -> None:
    config = run.config
    run.enter_stage()
    started = time.perf_counter()
    result = run.engine.train_step(
        run.batches, learning_rate(config.optimizer, run.step, config.training.steps)
    )
    run.step_seconds = time.perf_counter() - started
    run.step += 1
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        # DeepSpeed leaves such a step out without a word.
        raise FloatingPointError(
            f"step {run.step} has loss {result.loss} and gradient norm {result.grad_norm}; resume from "
            f"the last checkpoint with a smaller optimizer.lr (now {config.optimizer.lr}) or a larger "
            "optimizer.warmup_fraction"
        )
    for callback in callbacks:
        callback.on_step(run, result)
    run.flush()
