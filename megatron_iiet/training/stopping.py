"""Ending a run on all ranks: from outside, after the step in progress, or by what one finds wrong."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from megatron_iiet import signals
from megatron_iiet.config import RunConfig
from megatron_iiet.parallel import Group, ParallelContext
from megatron_iiet.signals import Phase, StopRequests
from megatron_iiet.storage.integrity import DamagedError
from megatron_iiet.training.lock import RunLock

POLL_SECONDS = 2.0
"""How long a run of several ranks trains on at most after one of them was asked to stop, or one step."""


class Stopped(BaseException):
    """The ranks have agreed to end; why, in a few words. No error, and nobody's to handle on the way."""


@contextmanager
def heard(config: RunConfig, phase: Phase) -> Iterator[StopRequests]:
    """Inside the block, what the configuration names asks for a stop."""
    with signals.heard(phase) as requests:
        signals.keep_only(config.training.stop_signals)
        requests.limit = config.training.wall_seconds
        requests.enter(phase)
        yield requests


class Poll:
    """When the ranks ask each other next. That waits for the device and for the slowest rank, so they do it
    every POLL_SECONDS rather than at every place where they could; and at the same place, so it is counted in
    places, by how far apart those were of late."""

    def __init__(self, world: Group, clock: Callable[[], float] = time.monotonic) -> None:
        self._world, self._clock = world, clock
        self._places = self._next = 0
        """Passed since the ranks asked last; and at which they do again, 0: the first one."""
        self._asked_at = 0.0

    def due(self) -> bool:
        """Whether to ask at this place; called at every one. A rank alone always does."""
        self._places += 1
        return self._places >= self._next or self._world.size == 1

    def apart(self) -> float:
        """Seconds from place to place since the ranks asked last, on this one; infinite the first time."""
        return (self._clock() - self._asked_at) / self._places if self._next else math.inf

    def asked(self, apart: float) -> None:
        """The ranks have asked; ``apart``: the longest :meth:`apart` of them."""
        self._places, self._next = 0, max(1, int(POLL_SECONDS / max(apart, 1e-6)))
        self._asked_at = self._clock()


def stop_if_asked(context: ParallelContext, lock: RunLock | None = None, poll: Poll | None = None) -> None:
    """End training on all ranks if one was asked to stop, be it by a signal that the others never saw. Every
    rank calls it at the same place; ``poll``: what found that it is time to.

    Raises:
        Stopped: one was.
        ValueError: the run's folder is another's by now; ``lock`` is the main rank's.
    """
    own = [signals.requests.ask(), lock is not None and lock.lost, 0.0 if poll is None else poll.apart()]
    noted = torch.tensor(own, dtype=torch.float64, device=context.device)
    context.world.maximum(noted)
    asked, lost, apart = noted.tolist()
    if poll is not None:
        poll.asked(apart)
    if lost:
        with failing_together(context):
            if lock is not None:
                lock.check()
    if asked:
        signals.requests.enter(Phase.ENDING)
        reasons = context.world.gather_objects(signals.requests.reason)
        raise Stopped(", ".join(dict.fromkeys(filter(None, reasons))))


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
