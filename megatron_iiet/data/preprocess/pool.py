"""Worker processes that outlive each other: one that is killed costs its task, not the run.

Each worker is one spawned process with a connection of its own. It is started once and given what all tasks
need as its start-up argument; after that only tasks and their results travel. A worker whose parent is gone,
however it went, leaves at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import SimpleQueue
from threading import Thread
from typing import Any, ParamSpec, TypeVar, cast

from megatron_iiet import durable

P = ParamSpec("P")
R = TypeVar("R")
Report = Callable[[int], None]

TASKS_PER_WORKER = 2  # one at work, one that waits: the worker never waits for the parent
_SECONDS_TO_LEAVE = 5.0
_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 4 << 20


@dataclass(frozen=True)
class Done:
    """A task's result."""

    ticket: int
    value: Any


@dataclass(frozen=True)
class Failed:
    """Why a task has no result."""

    ticket: int
    message: str
    errno: int | None = None
    bad_input: str = ""  # path of the input at fault, where it is one


@dataclass(frozen=True)
class Reported:
    """A number that a task reported."""

    number: int


Event = Done | Failed | Reported


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    started: bool = False
    tickets: list[int] = field(default_factory=list)  # tasks it holds, in the order given


class StartError(RuntimeError):
    """Workers cannot be started."""


class Pool:
    """A number of workers; use it as a context manager.

    Tasks are called with ``recipe``, what all of them need, and a function that sends numbers to the parent.
    Leaving normally lets them finish, leaving by an exception stops them after their clean-up.
    """

    def __init__(self, workers: int, recipe: Any) -> None:
        self._recipe = recipe
        self._next_ticket = 0
        self._context = get_context("spawn")  # not forked: the caller may hold threads and locks
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(self._start())
        except BaseException:
            self._stop()
            raise

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self._recipe), daemon=True)
        with _interrupts_held():
            process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        return _Worker(process, ours)

    def __len__(self) -> int:
        return len(self._workers)

    def free(self, tasks_per_worker: int = TASKS_PER_WORKER) -> bool:
        """Whether some worker holds fewer tasks than that."""
        return any(len(worker.tickets) < tasks_per_worker for worker in self._workers)

    def submit(self, task: Any) -> int:
        """Give a task to the worker with the fewest; returns the ticket its events will carry."""
        worker = min(self._workers, key=lambda worker: len(worker.tickets))
        ticket = self._next_ticket
        self._next_ticket += 1
        worker.tickets.append(ticket)
        with suppress(OSError):  # it died: the next wait() tells
            worker.connection.send((ticket, task))
        return ticket

    def wait(self, timeout: float | None = None) -> list[Event]:
        """Events of all workers, at least one unless the time (in seconds) is over first.

        Raises:
            StartError: a worker died before it could work at all.
        """
        by_connection = {worker.connection: worker for worker in self._workers}
        events: list[Event] = []
        for connection in wait(list(by_connection), timeout):
            assert isinstance(connection, Connection)
            events += self._receive(by_connection[connection])
        return events

    def _receive(self, worker: _Worker) -> Iterator[Event]:
        try:
            event = worker.connection.recv()
        except (EOFError, OSError):
            yield from self._bury(worker)
            return
        if event is None:
            worker.started = True
            return
        if not isinstance(event, Reported):
            worker.tickets.remove(event.ticket)
        yield event

    def _bury(self, worker: _Worker) -> Iterator[Event]:
        """Replace a dead worker; its tasks have failed."""
        worker.process.join(_SECONDS_TO_LEAVE)
        worker.connection.close()
        how = _manner_of_death(worker.process.exitcode)
        self._workers.remove(worker)
        if not worker.started:
            raise StartError(f"A worker process died while starting ({how}); its messages are above.")
        self._workers.append(self._start())
        for ticket in worker.tickets:
            yield Failed(ticket, f"its worker process died ({how}).")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for worker in self._workers:
                with suppress(OSError):
                    worker.connection.send(None)
            for worker in self._workers:
                worker.process.join(_SECONDS_TO_LEAVE)
        self._stop()

    def _stop(self) -> None:
        for worker in self._workers:
            if worker.process.is_alive():
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_LEAVE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.connection.close()
            worker.process.close()


def in_a_process_of_its_own(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function in a worker that ends with it, and with it all that it imported and remembers.

    Raises:
        ValueError: the function raised something, or the worker died.
    """
    with Pool(1, None) as pool:
        pool.submit(partial(_call, partial(function, *args, **kwargs)))
        while True:
            for event in pool.wait():
                if isinstance(event, Failed):
                    raise ValueError(event.message)
                if isinstance(event, Done):
                    return cast(R, event.value)


def _call(function: Callable[[], R], recipe: None, report: Report) -> R:
    return function()


def failure(ticket: int, error: Exception) -> Failed:
    """What is to be told of an exception in a task."""
    if isinstance(error, ValueError | OSError):
        return Failed(ticket, str(error), getattr(error, "errno", None), getattr(error, "bad_input", ""))
    if isinstance(error, MemoryError):
        return Failed(ticket, "out of memory; lower --workers.")
    traceback.print_exception(error)  # a defect of this program: the trace is worth seeing
    return Failed(ticket, f"{type(error).__name__}: {error}")


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end, and in processes started meanwhile until they say what to do of it.

    A process inherits its parent's signal mask. Without it, one that is still importing when Ctrl-C
    reaches the whole group would print a traceback.
    """
    # Started by the first process if not before, and unblocks Ctrl-C in doing so.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _manner_of_death(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    hint = ", most likely for want of memory: lower --workers" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def give_back_large_blocks() -> None:
    """Keep large blocks out of this process's heap, from which freed ones seldom return.

    glibc does so until the first one is freed, then takes that size for usual: while a document of 50 MB is
    read, twice its bytes can be lost in the heap.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def _serve(connection: Connection, recipe: Any) -> None:
    """A worker's life: take tasks, send results."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker: the processes are the parallelism
    # Ctrl-C reaches the whole group; the parent cleans up. One that waited since the start is gone with this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    durable.leave_cleanly_on_sigterm()
    inbox: SimpleQueue[tuple[int, Any] | None] = SimpleQueue()
    give_back_large_blocks()
    Thread(target=_take_in, args=(connection, inbox), daemon=True).start()
    connection.send(None)
    while (message := inbox.get()) is not None:
        ticket, task = message
        event: Event
        try:
            event = Done(ticket, task(recipe, lambda number: connection.send(Reported(number))))
        except Exception as error:
            event = failure(ticket, error)
        connection.send(event)


def _take_in(connection: Connection, inbox: SimpleQueue[tuple[int, Any] | None]) -> None:
    """Receive all the time: a parent that sends never waits for a worker that sends."""
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):  # the parent is gone
            os._exit(1)
        inbox.put(message)
        if message is None:
            return
