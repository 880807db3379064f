"""Results of jobs, in order, computed by threads before they are asked for."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue
from typing import Any, Generic, Protocol, TypeVar

T = TypeVar("T", covariant=True)
R = TypeVar("R")
_AHEAD = 4  # jobs per thread
_FAREWELL_S = 1.0  # a thread that hangs must not keep the process from ending


class Job(Protocol[T]):
    """Something to compute; ``str`` of it says what it is busy with, to whoever is tired of waiting."""

    @property
    def waits_for_ranks(self) -> bool:
        """Whether it waits for other ranks, which have bounds of their own."""

    def run(self) -> T: ...


class ReadAhead(Generic[R]):
    """Iterator over the results of ``jobs``.

    Jobs are drawn in the thread that iterates and run in daemon threads, which end when this object does.

    Args:
        jobs: endless.
        threads: at least 1.
        timeout: seconds to wait for a result that no other rank keeps waiting.

    Raises:
        RuntimeError: while iterating, a result did not come in time.
        Exception: while iterating, what a job raised, in its turn.
    """

    def __init__(self, jobs: Iterator[Job[R]], threads: int, timeout: float) -> None:
        self._jobs = jobs
        self._timeout = timeout
        self._ahead = threads * _AHEAD
        self._queue: SimpleQueue[tuple[Job[R], Future[R]] | None] = SimpleQueue()
        self._pending: deque[tuple[Job[R], Future[R]]] = deque()
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
            task: tuple[Job[R], Future[R]] = next(self._jobs), Future()
            self._pending.append(task)
            self._queue.put(task)
        job, future = self._pending.popleft()
        while not wait([future], self._timeout).done:
            if not job.waits_for_ranks:
                raise RuntimeError(
                    f"Reading {job} takes longer than {self._timeout:g} s; look after the file system, or "
                    "raise data.timeout."
                )
        return future.result()


def _serve(queue: SimpleQueue[tuple[Job[R], Future[R]] | None]) -> None:
    while (task := queue.get()) is not None:
        job, future = task
        try:
            future.set_result(job.run())
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            future.set_exception(error)
        del task, job, future  # a waiting thread must not hold on to its last result


def _stop(queue: SimpleQueue[Any], workers: list[threading.Thread]) -> None:
    while not queue.empty():
        queue.get()
    for _ in workers:
        queue.put(None)
    deadline = time.monotonic() + _FAREWELL_S
    for worker in workers:
        if worker is not threading.current_thread():  # garbage is collected in any thread
            worker.join(max(0.0, deadline - time.monotonic()))
