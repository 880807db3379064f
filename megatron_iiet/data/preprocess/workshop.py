"""Runs units: whole ones in worker processes where there are enough, else chunk by chunk."""

from __future__ import annotations

import errno
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_iiet.data.preprocess.pool import (
    TASKS_PER_WORKER,
    Done,
    Failed,
    Pool,
    Reported,
    StartError,
    failure,
)
from megatron_iiet.data.preprocess.records import UnitRecord
from megatron_iiet.data.preprocess.tasks import Recipe, Report, UnitTask
from megatron_iiet.data.reading.text import LONG_LINE_BYTES

_SECONDS_BETWEEN_LINES = 30.0
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


class Progress:
    """Counts units and what is in them: a bar on a terminal, else a plain line now and then for log files."""

    def __init__(self, title: str, what: str, units: int, enabled: bool) -> None:
        self._title, self._what, self._units = title, what, units
        self._enabled = enabled
        self._done = self._count = 0
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if enabled and sys.stderr.isatty():
            from tqdm import tqdm  # 40 ms that a batch job need not pay

            self._bar = tqdm(desc=title, unit=f" {what}", unit_scale=True)

    def add(self, count: int) -> None:
        """Count tokens or rows."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(self, file=sys.stderr, flush=True)

    def unit_done(self) -> None:
        """Count a finished unit."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._done}/{self._units} shards")

    def __str__(self) -> str:
        rate = self._count / max(time.monotonic() - self._start, 1e-9)
        return (
            f"{self._title}: {self._done} of {self._units} shards, {self._count:,} {self._what}, "
            f"{rate:,.0f} {self._what}/s"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def run_units(
    recipe: Recipe, pool: Pool | None, tasks: Sequence[UnitTask], finish: Finish, progress: Progress
) -> list[Failure]:
    """Run tasks, in any order, by a pool or in this process; ``finish`` is given the result of each.

    One that fails stops no other, except for want of disk space; those that fail are returned. Where bad
    inputs are to be skipped, a unit that has one is begun again without it.
    """
    failures: list[Failure] = []
    waiting = deque(tasks)
    streams = any(file.is_stream for task in tasks for file in task.inputs)  # only this process has them
    if pool is not None and len(tasks) >= len(pool) and not streams:
        outcomes = _side_by_side(pool, waiting, progress)
    else:
        outcomes = _one_by_one(recipe, pool, waiting, progress)
    for task, outcome in outcomes:
        if isinstance(outcome, Done):
            finish(outcome.value)
            progress.unit_done()
            continue
        if outcome.bad_input and recipe.options.bad_inputs == "skip":
            again = task.without(recipe, outcome.bad_input, outcome.message)
            if again is not None:
                waiting.append(again)
                continue
        failures.append(Failure(task, outcome.message))
        if outcome.errno in _FULL_DISK:
            waiting.clear()
    return failures


def _one_by_one(
    recipe: Recipe, pool: Pool | None, waiting: deque[UnitTask], progress: Progress
) -> Iterator[_Outcome]:
    while waiting:
        task = waiting.popleft()
        outcome: Done | Failed
        try:
            if pool is None:
                result = task(recipe, progress.add)
            else:
                chunks = (
                    # What is too large to send around is done here.
                    partial(chunk, recipe, progress.add) if len(chunk.chunk.data) > LONG_LINE_BYTES else chunk
                    for chunk in task.chunks(recipe)
                )
                result = task.write(recipe, _in_order(pool, progress.add, chunks))
            outcome = Done(0, result)
        except StartError:
            raise
        except TaskFailedError as error:
            outcome = error.failed
        except Exception as error:
            outcome = failure(0, error)
        yield task, outcome


def _side_by_side(pool: Pool, waiting: deque[UnitTask], progress: Progress) -> Iterator[_Outcome]:
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


def _in_order(pool: Pool, report: Report, tasks: Iterable[Any]) -> Iterator[Any]:
    """Results of tasks, in order, a bounded number of them held.

    Partial functions are called here, when all before them is done.
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
