"""Results of jobs, in order, computed by threads before they are asked for."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

T = TypeVar("T", covariant=True)
R = TypeVar("R")
_AHEAD = 4  # jobs per thread
_FAREWELL_S = 1.0  # a thread that hangs must not keep the process from ending


class Job(Protocol[T]):
    """Something to compute; ``str`` of it says what it is busy with, to whoever is tired of waiting."""

    def run(self) -> T: ...


class ReadAhead(Generic[R]):
    """Iterator over the results of ``jobs``.

    Jobs are drawn in the thread that iterates and run in daemon threads, which end when this object does.

    Args:
        jobs: endless.
        threads: at least 1.
        timeout: seconds to wait for a result.

    Raises:
        RuntimeError: while iterating, a result did not come in time.
        Exception: while iterating, what a job raised, in its turn.
    """

    def __init__(self, jobs: Iterator[Job[R]], threads: int, timeout: float) -> None:
        self._jobs = jobs
        self._timeout = timeout
        self._ahead = threads * _AHEAD
        self._queue: SimpleQueue[_Task[R] | None] = SimpleQueue()
        self._pending: deque[_Task[R]] = deque()
        # The threads know the queue only: they must not keep this object alive.
        workers = [
            threading.Thread(target=_serve, args=(self._queue,), name=f"data-reader-{i}", daemon=True)
            for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        self.close = weakref.finalize(self, _stop, self._queue, workers)
        """End the threads; also happens with the object, and before the interpreter exits."""

    def __iter__(self) -> ReadAhead[R]:
        return self

    def __next__(self) -> R:
        while len(self._pending) < self._ahead:
            task = _Task(next(self._jobs))
            self._pending.append(task)
            self._queue.put(task)
        task = self._pending.popleft()
        if not task.done.wait(self._timeout):
            raise RuntimeError(
                f"Reading {task.job} takes longer than {self._timeout:g} s; look after the file system, or "
                "raise data.timeout."
            )
        if task.error is not None:
            raise task.error
        return task.result


class _Task(Generic[R]):
    """A job and what became of it."""

    result: R

    def __init__(self, job: Job[R]) -> None:
        self.job = job
        self.done = threading.Event()
        self.error: BaseException | None = None


def _serve(queue: SimpleQueue[_Task[R] | None]) -> None:
    while (task := queue.get()) is not None:
        try:
            task.result = task.job.run()
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            task.error = error
        task.done.set()
        del task  # a waiting thread must not hold on to its last result


def _stop(queue: SimpleQueue[_Task[R] | None], workers: list[threading.Thread]) -> None:
    while not queue.empty():
        queue.get()
    for _ in workers:
        queue.put(None)
    deadline = time.monotonic() + _FAREWELL_S
    for worker in workers:
        if worker is not threading.current_thread():  # garbage is collected in any thread
            worker.join(max(0.0, deadline - time.monotonic()))
