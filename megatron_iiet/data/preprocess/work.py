"""Does units: whole ones side by side in worker processes where there are enough, else chunk by chunk.

Every worker is a process pool of one, so that a worker which is killed costs its own task only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any, TypeVar, cast

from megatron_iiet.data.preprocess.records import UnitRecord
from megatron_iiet.data.preprocess.tasks import DigestChunk, EncodeChunk, Recipe, Report, Task, UnitTask, rest
from megatron_iiet.data.reading.sources import InputFile
from megatron_iiet.data.reading.text import LONG_LINE_BYTES

R = TypeVar("R")
Finish = Callable[[UnitRecord | None], None]

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_LEAVE = 5.0
_CHUNKS_PER_WORKER = 3  # one at work, one that waits, and a result that does
_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_GIANT_BYTES = 32 << 20
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 4 << 20
_DIED = (
    "its worker process died, most likely for want of memory: lower --workers, then run the same command "
    "again."
)


class FailedError(ValueError):
    """Why a task has no result: a sentence, the system's error number, the input at fault where it is one."""

    def __init__(self, message: str, number: int | None = None, bad_input: str = "") -> None:
        super().__init__(message, number, bad_input)  # all: it comes from workers
        self.message, self.errno, self.bad_input = message, number, bad_input

    def __str__(self) -> str:
        return self.message

    @classmethod
    def by(cls, error: BaseException) -> FailedError:
        """What is to be told of an exception in a task."""
        match error:
            case FailedError():
                return error
            case BrokenProcessPool():
                return cls(_DIED)
            case MemoryError():
                return cls("out of memory; lower --workers.")
            case ValueError() | OSError():
                return cls(str(error), getattr(error, "errno", None), getattr(error, "bad_input", ""))
        traceback.print_exception(error)  # a defect of this program: the trace is worth seeing
        return cls(f"{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Failure:
    """Inputs of which no shard could be made."""

    inputs: Sequence[InputFile]
    message: str

    def __str__(self) -> str:
        path, more = self.inputs[0].path, len(self.inputs) - 1
        if any(file.path in self.message for file in self.inputs):
            return self.message
        return f"{path}{f' and {more} more' if more else ''}: {self.message}"


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


class Workers:
    """Worker processes that know a recipe; use it as a context manager.

    Leaving by an exception stops them after their clean-up, and so does the death of this process.
    """

    def __init__(self, number: int, recipe: Any) -> None:
        self._recipe = recipe
        self._context = get_context("spawn")  # not forked: the caller may hold threads and locks
        # What each reported; without a lock, which one that is killed would hold for ever.
        self._counts: list[Any] = [self._context.RawValue("q", 0) for _ in range(number)]
        self._seen = 0
        self._theirs, self._ours = self._context.Pipe(duplex=False)  # its end tells them to leave
        self._pools = [self._start(worker) for worker in range(number)]

    def _start(self, worker: int) -> ProcessPoolExecutor:
        known = self._recipe, self._counts[worker], self._theirs
        return ProcessPoolExecutor(1, self._context, _begin, known)

    def __len__(self) -> int:
        return len(self._pools)

    def counted(self, worker: int) -> int:
        """What a worker has counted."""
        return int(self._counts[worker].value)

    def submit(self, worker: int, task: Callable[[Recipe, Report], Any]) -> Future[Any]:
        """Give a task to a worker, or to the one that takes the place of one that died."""
        with _interrupts_held():
            try:
                return self._pools[worker].submit(_do, task)
            except BrokenProcessPool:
                self._pools[worker] = self._start(worker)
                return self._pools[worker].submit(_do, task)

    def wait(self, futures: Iterable[Future[Any]], report: Report) -> set[Future[Any]]:
        """Those that are done, at least one."""
        waiting = set(futures)
        while True:
            done = wait(waiting, _SECONDS_BETWEEN_LOOKS, FIRST_COMPLETED).done
            before, self._seen = self._seen, sum(count.value for count in self._counts)
            report(self._seen - before)
            if done:
                return done

    def in_order(self, tasks: Iterable[EncodeChunk | DigestChunk], report: Report) -> Iterator[Any]:
        """Results of tasks in order, a bounded number of them held.

        Raises:
            FailedError: a task has none; told in its turn, so it is always the first defect of a file.
        """
        order: deque[Future[Any]] = deque()

        def finished(most_left: int) -> Iterator[Any]:
            while order and (len(order) > most_left or order[0].done()):
                self.wait([order[0]], report)
                yield _result(order.popleft())

        for number, task in enumerate(tasks):
            if len(task.chunk.data) > LONG_LINE_BYTES:  # too large to send around
                yield from finished(most_left=0)
                yield self._alone(task, report)
                continue
            order.append(self.submit(number % len(self), task))
            yield from finished(most_left=_CHUNKS_PER_WORKER * len(self))
        yield from finished(most_left=0)

    def _alone(self, task: EncodeChunk | DigestChunk, report: Report) -> Any:
        """Do a task in this process; where its line is giant, nobody holds more than must be meanwhile."""
        if len(task.chunk.data) <= _GIANT_BYTES:
            return task(self._recipe, report)
        for future in [self.submit(worker, rest) for worker in range(len(self))]:
            _result(future)
        try:
            return task(self._recipe, report)
        finally:
            rest(self._recipe, report)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._ours.close()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._ours.close()
        self._theirs.close()


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise FailedError.by(error) from None


@dataclass
class _Worker:
    """What a worker process knows."""

    recipe: Recipe
    count: Any
    is_busy: bool = False
    is_leaving: bool = False

    def leave(self, *_: object) -> None:
        """Leave by SIGTERM, but not while a result is sent, for whose end the parent would wait."""
        if self.is_busy and not self.is_leaving:
            self.is_leaving = True
            sys.exit(143)
        self.is_leaving = True

    def report(self, number: int) -> None:
        self.count.value += number


_worker: _Worker | None = None


def _begin(recipe: Recipe, count: Any, parent: Connection) -> None:
    """The start of a worker's life."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the processes are the parallelism
    # Ctrl-C reaches the whole group; the parent cleans up. One that waited since the start is gone with this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = _Worker(recipe, count)
    signal.signal(signal.SIGTERM, _worker.leave)
    give_back_large_blocks()
    Thread(target=_leave_with, args=(parent,), daemon=True).start()


def _leave_with(parent: Connection) -> None:
    parent.poll(None)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_SECONDS_TO_LEAVE)
    os._exit(1)


def _do(task: Callable[[Recipe, Report], Any]) -> Any:
    assert _worker is not None
    _worker.is_busy = True
    try:
        if _worker.is_leaving:
            sys.exit(143)
        return task(_worker.recipe, _worker.report)
    except SystemExit:
        os._exit(143)  # the pool would keep a worker that raises it
    except Exception as error:
        raise FailedError.by(error) from None
    finally:
        _worker.is_busy = False


def in_a_process_of_its_own(function: Callable[..., R], *args: Any, places: Sequence[str] = ()) -> R:
    """Call a function in a process that ends with it, and with it all that it imported and remembers.

    Args:
        places: what it works on, one after another, as :func:`work_on` tells.

    Raises:
        ValueError: the function raised something, or its process died.
    """
    with Workers(1, None) as workers:
        try:
            return cast(R, _result(workers.submit(0, partial(_call, partial(function, *args)))))
        except FailedError as error:
            if not places or error.message != _DIED:
                raise
            raise FailedError(f"{places[workers.counted(0)]}: {error}") from None


def work_on(place: int) -> None:
    """Tell which of its places a process of its own works on, for the case that it dies."""
    if _worker is not None:
        _worker.count.value = place


def _call(function: Callable[[], R], recipe: None, report: Report) -> R:
    return function()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end, and in processes started meanwhile until they say what to do of it.

    A process inherits its parent's signal mask. Without it, one that is still importing when Ctrl-C
    reaches the whole group would print a traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def give_back_large_blocks() -> None:
    """Keep large blocks out of this process's heap, from which freed ones seldom return.

    glibc does so until the first one is freed, then takes that size for usual: while a document of 50 MB is
    read, twice its bytes can be lost in the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def run_units(
    recipe: Any, workers: Workers | None, tasks: Sequence[Task], finish: Finish, progress: Progress
) -> list[Failure]:
    """Run tasks, in any order, by workers or in this process; ``finish`` is given the result of each.

    One that fails stops no other, except where there is no room on the disk or no worker lives; those that
    fail are returned. Where bad inputs are to be skipped, a unit that has one is begun again without it.
    """
    failures: list[Failure] = []
    deaths = 0  # one after another
    waiting = deque(tasks)
    streams = any(file.is_stream for task in tasks for file in task.inputs)  # only this process has them
    if workers is not None and len(tasks) >= len(workers) and not streams:
        outcomes = _side_by_side(workers, waiting, progress)
    else:
        outcomes = _one_by_one(recipe, workers, waiting, progress)
    for task, outcome in outcomes:
        if not isinstance(outcome, FailedError):
            finish(outcome)
            progress.unit_done()
            deaths = 0
            continue
        if outcome.bad_input and recipe.options.bad_inputs == "skip":
            again = task.without(recipe, outcome.bad_input, outcome.message)
            if again is not None:
                waiting.append(again)
                continue
        failures.append(Failure(task.inputs, outcome.message))
        deaths += outcome.message == _DIED
        if outcome.errno in _FULL_DISK or (workers is not None and deaths > len(workers)):
            waiting.clear()
    return failures


_Outcomes = Iterator[tuple[Task, UnitRecord | FailedError | None]]


def _one_by_one(recipe: Any, workers: Workers | None, waiting: deque[Task], progress: Progress) -> _Outcomes:
    while waiting:
        task = waiting.popleft()
        try:
            if workers is None or not isinstance(task, UnitTask):
                outcome: UnitRecord | FailedError | None = task(recipe, progress.add)
            else:
                outcome = task.write(recipe, workers.in_order(task.chunks(recipe), progress.add))
        except Exception as error:
            outcome = FailedError.by(error)
        yield task, outcome


def _side_by_side(workers: Workers, waiting: deque[Task], progress: Progress) -> _Outcomes:
    free = list(range(len(workers)))
    at_work: dict[Future[Any], tuple[int, Task]] = {}
    while waiting or at_work:
        while waiting and free:
            task, worker = waiting.popleft(), free.pop()
            at_work[workers.submit(worker, task)] = worker, task
        for future in workers.wait(at_work, progress.add):
            worker, task = at_work.pop(future)
            free.append(worker)
            error = future.exception()
            yield task, future.result() if error is None else FailedError.by(error)
