"""Ending a run on all ranks: from outside, after the step in progress, or by what one finds wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_iiet.parallel import ParallelContext
from megatron_iiet.storage.integrity import DamagedError


@contextmanager
def stop_requests(context: ParallelContext) -> Iterator[Callable[[], bool]]:
    """Notes SIGUSR1 in the block, and gives what tells whether any rank was asked to stop. Every rank calls
    that after the same step: a signal may reach one of them only, or each at another time.

    SIGTERM keeps its meaning: launchers send it to what is left of a run that failed, whose ranks wait for
    one that is gone and would never come to the end of a step.
    """
    asked = threading.Event()

    def agreed() -> bool:
        noted = torch.tensor(int(asked.is_set()), device=context.device)
        context.world.all_reduce(noted)
        return bool(noted.item())

    before = None
    if threading.current_thread() is threading.main_thread():  # no other thread may
        before = signal.signal(signal.SIGUSR1, lambda number, frame: asked.set())
    try:
        yield agreed
    finally:
        if before is not None:
            signal.signal(signal.SIGUSR1, before)


@contextmanager
def failing_together(context: ParallelContext) -> Iterator[None]:
    """At the end of the block, which every rank enters and in which none meets another, the failure of the
    first rank that has one is everybody's.

    Raises:
        ValueError: what that rank's ValueError or OSError said; its :class:`DamagedError` stays one.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = DamagedError if isinstance(error, DamagedError) else ValueError, str(error)
    for told in context.world.gather_objects(failure):
        if told is not None:
            kind, message = told
            raise kind(message)
