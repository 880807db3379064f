"""Reading ahead: in order, bounded, never hanging, and gone when it should be."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import pytest

from megatron_iiet.data.loader.read_ahead import ReadAhead


class Call:
    """A job that calls a function with its number."""

    waits_for_ranks = False

    def __init__(self, function: Callable[[int], Any], number: int) -> None:
        self.function, self.number = function, number

    def run(self) -> Any:
        return self.function(self.number)

    def __str__(self) -> str:
        return f"number {self.number}"


def calls(function: Callable[[int], Any]) -> Iterator[Call]:
    return (Call(function, number) for number in count())


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("data-reader")]


@pytest.fixture(autouse=True)
def _nobody_stays() -> Iterator[None]:
    assert readers() == []
    yield
    gc.collect()
    assert readers() == []


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_in_order_whoever_is_first(threads: int) -> None:
    results = ReadAhead(calls(lambda n: (time.sleep(0.003 * (n % 3)), n)[1]), threads, 10)
    assert list(islice(results, 40)) == list(range(40))
    assert len(readers()) == threads
    results.close()


def test_ahead_but_not_by_much() -> None:
    drawn: list[int] = []
    results = ReadAhead(calls(drawn.append), 2, 10)
    assert drawn == []
    next(results)
    time.sleep(0.05)
    assert len(drawn) == 8
    next(results)
    time.sleep(0.05)
    assert len(drawn) == 9
    del results


def test_runs_off_the_thread_that_iterates() -> None:
    results = ReadAhead(calls(lambda n: threading.current_thread().name), 2, 10)
    assert set(islice(results, 20)) <= {"data-reader-0", "data-reader-1"}
    del results


def test_errors_come_in_their_turn() -> None:
    def work(number: int) -> int:
        if number == 3:
            raise OSError("the disk is gone")
        return number

    results = ReadAhead(calls(work), 2, 10)
    assert list(islice(results, 3)) == [0, 1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(results)
    results.close()


def test_a_job_that_hangs_is_named() -> None:
    released = threading.Event()
    results = ReadAhead(calls(lambda n: n if n < 2 else released.wait(60)), 1, 0.3)
    assert list(islice(results, 2)) == [0, 1]
    began = time.monotonic()
    with pytest.raises(
        RuntimeError, match=r"Reading number 2 takes longer than 0.3 s; .* raise data\.timeout"
    ):
        next(results)
    assert time.monotonic() - began < 5
    released.set()
    results.close()


def test_threads_end_with_their_reader() -> None:
    results = ReadAhead(calls(lambda n: n), 3, 10)
    next(results)
    assert len(readers()) == 3
    del results
    assert readers() == []


def test_closing_waits_for_who_is_at_work() -> None:
    """What a job still reads may go right after: shards are closed, a folder is removed."""
    busy = threading.Event()
    finished: list[int] = []

    def work(number: int) -> None:
        if number == 1:
            busy.set()
            time.sleep(0.2)
            finished.append(number)

    results = ReadAhead(calls(work), 1, 10)
    next(results)
    assert busy.wait(10)
    results.close()
    assert finished == [1]
    assert readers() == []


def test_closing_twice() -> None:
    results = ReadAhead(calls(lambda n: n), 1, 10)
    results.close()
    results.close()


PROGRAM = """
import sys, time
from itertools import count
from megatron_iiet.data.loader.read_ahead import ReadAhead
from tests.data.test_read_ahead import Call
results = ReadAhead((Call(time.sleep, n) for n in map(float, {numbers})), 1, 600)
{then}
"""


def start(numbers: str, then: str) -> subprocess.Popen[str]:
    program = PROGRAM.format(numbers=numbers, then=then)
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_hanging_thread_does_not_keep_the_process() -> None:
    with start("[0] + [10_000] * 99", "next(results); print('end')") as process:
        assert process.communicate(timeout=60) == ("end\n", "")
        assert process.returncode == 0


@pytest.mark.slow
def test_interrupt_while_waiting() -> None:
    """Ctrl-C reaches the training thread although it waits for a reading one."""
    with start("[10_000] * 99", "print('waiting', flush=True); next(results)") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert process.returncode == -signal.SIGINT
