"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence

from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.guards import Guards, must_read
from megatron_iiet.training.run import Run
from megatron_iiet.training.schedules import learning_rate
from megatron_iiet.training.stopping import stop_requests


def train(run: Run, callbacks: Sequence[Callback]) -> None:
    """Train from ``run.step`` to ``run.last_step``, or to the step in which a rank is sent SIGUSR1.

    Raises:
        BadNumbersError: loss or gradient stopped being finite, or a guard gave up; nothing was trained on it.
    """
    with stop_requests(run.context) as agreed_to_stop:
        run.enter_stage()  # before the callbacks, which may validate
        for callback in callbacks:
            callback.on_start(run)
        run.flush()
        guards = Guards(run)
        while run.step < run.last_step:
            _train_step(run, callbacks, guards)
            if run.step < run.last_step and agreed_to_stop():
                run.say(f"step {run.step:>6} | stopping on SIGUSR1; the same command goes on from here")
                break
        guards.settle(run)
        for callback in callbacks:
            callback.on_end(run)


def _train_step(run: Run, callbacks: Sequence[Callback], guards: Guards) -> None:
    run.enter_stage()
    first_sample = run.batches.consumed_samples
    started = time.perf_counter()
    result = _take_step(run)
    run.step += 1
    guards.note(run, first_sample, result)
    if must_read(run.config, run.step, run.last_step):
        result.read()  # waits for the device, which is part of the step's time
    run.step_seconds = time.perf_counter() - started
    if result.is_read and guards.settle(run):
        return
    for callback in callbacks:
        callback.on_step(run, result)
    run.flush()


def _take_step(run: Run) -> StepResult:
    config, batches = run.config, run.batches
    lr = learning_rate(config.optimizer, run.step, config.training.steps)
    if not batches.leaves_out(run.step + 1):
        return run.engine.train_step(batches, lr)
    batches.pass_over()
    batches.left_out.add(run.step + 1)
    return StepResult(lr=lr, verdict=Verdict.LEFT_OUT)
