"""Ending a run on all ranks: from outside, after the step in progress, or by what one finds wrong."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

import torch

from megatron_iiet.parallel import ParallelContext


class StopRequests:
    """Notes SIGUSR1 while entered.

    SIGTERM keeps its meaning: launchers send it to what is left of a run that failed, whose ranks wait for
    one that is gone and would never come to the end of a step.
    """

    def __init__(self) -> None:
        self._noted = False
        self._before: Any = None

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():  # no other thread may
            self._before = signal.signal(signal.SIGUSR1, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True

    def agreed(self, context: ParallelContext) -> bool:
        """Whether any rank was asked to stop. Every rank calls it after the same step: a signal may reach one
        of them only, or each at another time."""
        noted = torch.tensor(int(self._noted), device=context.device)
        context.world.all_reduce(noted)
        return bool(noted.item())


@contextmanager
def failing_together(context: ParallelContext) -> Iterator[None]:
    """At the end of the block, which every rank enters and in which none meets another, the failure of the
    first rank that has one is everybody's.

    Raises:
        ValueError: what that rank's ValueError or OSError said.
    """
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = str(error)
    for told in context.world.gather_objects(failure):
        if told is not None:
            raise ValueError(told)
