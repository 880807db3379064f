"""Runs units: whole ones in worker processes where there are enough, else chunk by chunk."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_iiet.data.preprocess.chunks import EncodeChunk, Recipe, Report
from megatron_iiet.data.preprocess.pool import (
    TASKS_PER_WORKER,
    Done,
    Failed,
    Pool,
    Reported,
    StartError,
    failure,
)
from megatron_iiet.data.preprocess.progress import Progress
from megatron_iiet.data.preprocess.records import UnitRecord
from megatron_iiet.data.preprocess.unit import UnitTask
from megatron_iiet.data.reading.text import LONG_LINE_BYTES

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}

Finish = Callable[[UnitRecord | None], None]
_Outcome = tuple[UnitTask, Done | Failed]


@dataclass(frozen=True)
class Failure:
    """A unit that could not be made."""

    task: UnitTask
    message: str

    def __str__(self) -> str:
        path, more = self.task.inputs[0].path, len(self.task.inputs) - 1
        if any(file.path in self.message for file in self.task.inputs):
            return self.message
        return f"{path}{f' and {more} more' if more else ''}: {self.message}"


class TaskFailedError(Exception):
    """A chunk could not be done, for the reason given."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.failed = failed


class Workshop:
    """Workers and their recipe; the workers are started when they are first needed."""

    def __init__(self, recipe: Recipe, workers: int) -> None:
        self._recipe = recipe
        self._workers = workers
        self._stack = ExitStack()
        self._pool: Pool | None = None

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)

    def run(self, tasks: Sequence[UnitTask], finish: Finish, progress: Progress) -> list[Failure]:
        """Run tasks, in any order; ``finish`` is given the result of each. Those that fail are returned.

        One that fails stops no other, except for want of disk space.
        """
        failures: list[Failure] = []
        waiting = deque(tasks)
        if self._workers > 1 and self._pool is None and tasks:
            self._pool = self._stack.enter_context(Pool(self._workers, self._recipe))
        if self._pool is not None and len(tasks) >= self._workers:
            outcomes = self._side_by_side(waiting, progress, self._pool)
        else:
            outcomes = self._one_by_one(waiting, progress)
        for task, outcome in outcomes:
            if isinstance(outcome, Done):
                finish(outcome.value)
                progress.unit_done()
                continue
            failures.append(Failure(task, outcome.message))
            if outcome.errno in _FULL_DISK:
                waiting.clear()
        return failures

    def _one_by_one(self, waiting: deque[UnitTask], progress: Progress) -> Iterator[_Outcome]:
        while waiting:
            task = waiting.popleft()
            outcome: Done | Failed
            try:
                if self._pool is None:
                    result = task(self._recipe, progress.add)
                else:
                    result = task.write(self._recipe, self._chunks(task, self._pool, progress.add))
                outcome = Done(0, result)
            except StartError:
                raise
            except TaskFailedError as error:
                outcome = error.failed
            except Exception as error:
                outcome = failure(0, error)
            yield task, outcome

    def _side_by_side(self, waiting: deque[UnitTask], progress: Progress, pool: Pool) -> Iterator[_Outcome]:
        at_work: dict[int, UnitTask] = {}
        while waiting or at_work:
            while waiting and pool.free(1):
                task = waiting.popleft()
                at_work[pool.submit(task)] = task
            for event in pool.wait():
                if isinstance(event, Reported):
                    progress.add(event.number)
                else:
                    yield at_work.pop(event.ticket), event

    def _chunks(self, task: UnitTask, pool: Pool, report: Report) -> Iterator[Any]:
        """Results of a unit's chunks, in order, done by the pool."""

        def tasks() -> Iterator[Any]:
            for chunk_task in task.chunks(self._recipe):
                if isinstance(chunk_task, EncodeChunk) and len(chunk_task.chunk.data) > LONG_LINE_BYTES:
                    yield partial(chunk_task, self._recipe, report)
                else:
                    yield chunk_task

        return _in_order(pool, report, tasks())


def _in_order(pool: Pool, report: Report, tasks: Iterable[Any]) -> Iterator[Any]:
    """Results of tasks, in order, a bounded number of them held.

    Partial functions are called here, when all before them is done: for what is too large to send around.
    """
    order: deque[int] = deque()
    results: dict[int, Done | Failed] = {}

    def collect(timeout: float | None = None) -> None:
        for event in pool.wait(timeout):
            if isinstance(event, Reported):
                report(event.number)
            elif event.ticket in order:  # else it is left over from a unit that failed
                results[event.ticket] = event

    def finished(most_left: int) -> Iterator[Any]:
        while order and (len(order) > most_left or order[0] in results):
            while order[0] not in results:
                collect()
            event = results.pop(order.popleft())
            if isinstance(event, Failed):  # told in its turn: always the first defect of a file
                raise TaskFailedError(event)
            yield event.value

    for task in tasks:
        if isinstance(task, partial):
            yield from finished(most_left=0)
            yield task()
            continue
        while not pool.free(TASKS_PER_WORKER):
            collect()
        order.append(pool.submit(task))
        collect(0)
        yield from finished(most_left=2 * TASKS_PER_WORKER * len(pool))
    yield from finished(most_left=0)
