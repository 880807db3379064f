"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from megatron_iiet.signals import Phase
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.run import Run
from megatron_iiet.training.schedules import learning_rate
from megatron_iiet.training.stopping import Stopped, heard


def train(run: Run, callbacks: Sequence[Callback]) -> bool:
    """Train from ``run.step`` to ``run.last_step``, or to where the ranks agree that one of them was asked to
    stop; whether they got to the end.

    Raises:
        FloatingPointError: loss or gradient stopped being finite; the checkpoints before are untouched.
        ValueError: another run has taken the folder.
    """
    first = run.step
    with heard(run.config, Phase.TRAINING) as requests:
        finished = True
        try:
            run.stop_if_asked()
            run.enter_stage()  # before the callbacks, which may validate
            run.open_record()
            for callback in callbacks:
                callback.on_start(run)
            run.flush()
            while run.step < run.last_step:
                if run.step + 1 == run.last_step:
                    requests.enter(Phase.ENDING)
                _train_step(run, callbacks)
                run.continue_saving()
                run.stop_if_asked()
        except Stopped as reason:
            finished = False
            run.say(f"step {run.step:>6} | stopping on {reason}; the same command goes on from here")
        if finished or run.step > first:  # else there is nothing to save
            for callback in callbacks:
                callback.on_end(run)
        run.flush()
        run.finish_saving()
    return finished


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
