"""The training loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_iiet.signals import Phase
from megatron_iiet.training.callbacks import Callback
from megatron_iiet.training.engine import StepResult, Verdict
from megatron_iiet.training.engine.phases import STEP, phase
from megatron_iiet.training.guards import Guards, must_read
from megatron_iiet.training.progress import Activity
from megatron_iiet.training.run import Run
from megatron_iiet.training.schedules import learning_rate
from megatron_iiet.training.stopping import Poll, Stopped, heard

GARBAGE_EVERY = 50
"""Steps between two collections of cyclic garbage; a tensor in a cycle keeps its memory until then."""


def train(run: Run, callbacks: Sequence[Callback]) -> bool:
    """Train from ``run.step`` to ``run.last_step``, or to where the ranks agree that one of them was asked to
    stop; whether they got to the end.

    Raises:
        BadNumbersError: loss or gradient stopped being finite, or a guard gave up; nothing was trained on it.
        ValueError: another run has taken the folder.
    """
    first, guards, poll = run.step, None, Poll(run.context.world)
    with heard(run.config, Phase.TRAINING) as requests:
        finished = True
        try:
            run.stop_if_asked()
            run.enter_stage()  # before the callbacks, which may validate
            run.open_record()
            for callback in callbacks:
                callback.on_start(run)
            run.flush()
            guards = Guards(run)
            activity = Activity.START  # the first step compiles kernels
            with _garbage_left():
                while run.step < run.last_step:
                    if run.step + 1 == run.last_step:
                        requests.enter(Phase.ENDING)
                    run.progress.begin(activity, run.step + 1)
                    _train_step(run, callbacks, guards)
                    run.progress.begin(activity, run.step)  # what waits for the device is of the step
                    activity = Activity.STEP
                    if run.step % GARBAGE_EVERY == 0:
                        gc.collect()
                    if poll.due():
                        run.continue_saving()
                        run.stop_if_asked(poll)
        except Stopped as reason:
            finished = False
            run.say(f"step {run.step:>6} | stopping on {reason}; the same command goes on from here")
        if finished or run.step > first:  # else there is nothing to save
            if guards is not None:
                guards.settle(run)
            for callback in callbacks:
                callback.on_end(run)
        run.flush()
        run.batches.settle()
        run.finish_saving()
        if finished:  # a stop has no time for it; the next start makes up for it
            run.finish_mirror()
    return finished


@contextmanager
def _garbage_left() -> Iterator[None]:
    """Inside the block Python collects no garbage of itself: it would on each rank at another time, and all
    others wait for that one. What there is before the block is taken to last, and not looked through."""
    was_on = gc.isenabled()
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_on:
            gc.enable()


def _train_step(run: Run, callbacks: Sequence[Callback], guards: Guards) -> None:
    run.enter_stage()
    first_sample = run.batches.consumed_samples
    started = time.perf_counter()
    with phase(STEP):
        result = _take_step(run)
        run.step += 1
        guards.note(run, first_sample, result)
        if must_read(run.config, run.step, run.last_step):
            result.read()  # waits for the device, which is part of the step's time
    run.step_seconds = time.perf_counter() - started
    run.progress.begin(Activity.BETWEEN, run.step)
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
