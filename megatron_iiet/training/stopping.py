"""Ending a run on all ranks: from outside, after the step in progress, or by what one finds wrong."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_iiet import signals
from megatron_iiet.config import RunConfig
from megatron_iiet.parallel import ParallelContext
from megatron_iiet.signals import Phase, StopRequests
from megatron_iiet.storage.integrity import DamagedError
from megatron_iiet.training.lock import RunLock


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


def stop_if_asked(context: ParallelContext, lock: RunLock | None = None) -> None:
    """End training on all ranks if one was asked to stop, be it by a signal that the others never saw. Every
    rank calls it at the same place.

    Raises:
        Stopped: one was.
        ValueError: the run's folder is another's by now; ``lock`` is the main rank's.
    """
    flags = [signals.requests.ask(), lock is not None and lock.lost]
    noted = torch.tensor(flags, dtype=torch.int32, device=context.device)
    context.world.all_reduce(noted)
    asked, lost = noted.tolist()
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
