"""Worker processes: order, large messages, failures, death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from megatron_iiet.data.preprocess.work import (
    FailedError,
    Progress,
    Workers,
    in_a_process_of_its_own,
    run_units,
    work_on,
)
from megatron_iiet.data.reading.sources import InputFile
from tests.data.preprocess_runs import ENVIRONMENT, ROOT, wait_until

pytestmark = pytest.mark.slow  # processes that start


@dataclass(frozen=True)
class Act:
    """A task that says what to do."""

    what: str
    value: Any
    chunk: Any = field(default_factory=lambda: SimpleNamespace(data=b""))
    inputs: Any = (InputFile("a.jsonl", 1, ""),)

    def __call__(self, recipe: object, report: Callable[[int], None]) -> Any:
        what, value = self.what, self.value
        if what == "sleep":
            time.sleep(value)
        elif what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "raise":
            raise value
        elif what == "report":
            report(value)
        elif what == "recipe":
            return recipe
        return value


def in_order(workers: Workers, tasks: Iterable[Act], reported: Callable[[int], None] = lambda _: None) -> Any:
    return workers.in_order(cast(Any, tasks), reported)


@pytest.fixture
def workers() -> Iterable[Workers]:
    with Workers(2, "recipe") as workers:
        yield workers


def test_results_come_in_order_and_reports_add_up(workers: Workers) -> None:
    numbers: list[int] = []
    tasks = [Act("sleep", 0.001 * (number * 7 % 11)) for number in range(60)]
    assert list(in_order(workers, tasks)) == [task.value for task in tasks]
    assert list(in_order(workers, [Act("report", n) for n in range(9)], numbers.append)) == list(range(9))
    assert sum(numbers) == sum(range(9))


def test_messages_larger_than_a_pipe_block_nobody(workers: Workers) -> None:
    contents = [bytes([number]) * 5_000_000 for number in range(8)]
    assert list(in_order(workers, (Act("echo", content) for content in contents))) == contents


def test_what_is_too_large_to_send_is_done_here_in_its_turn(workers: Workers) -> None:
    large = SimpleNamespace(data=b" " * 9_000_000)
    tasks = [Act("sleep", 0.1), Act("echo", here := object(), large), Act("echo", 3)]
    assert list(in_order(workers, tasks)) == [0.1, here, 3]


def test_few_results_wait(workers: Workers) -> None:
    """Tasks are asked for as results are taken, not ahead of them without end."""
    asked: list[int] = []

    def tasks() -> Iterable[Act]:
        for number in range(100):
            asked.append(number)
            yield Act("echo", number)

    results = in_order(workers, tasks())
    assert next(results) == 0
    assert len(asked) <= 8
    results.close()


def test_failures_leave_workers_usable(workers: Workers) -> None:
    tasks = [Act("echo", 1), Act("raise", ValueError("a")), Act("raise", ValueError("b")), Act("echo", 2)]
    results = in_order(workers, tasks)
    assert next(results) == 1
    with pytest.raises(FailedError, match=r"^a$"):
        next(results)
    assert list(in_order(workers, [Act("echo", number) for number in range(20)])) == list(range(20))


class TwoArgumentsError(ValueError):
    """An exception that pickle cannot make again."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(reason)
        self.bad_input = path


@pytest.mark.parametrize(
    ("error", "message", "number", "bad_input"),
    [
        (ValueError("a sentence."), "a sentence.", None, ""),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", 28, ""),
        (MemoryError(), "out of memory; lower --workers.", None, ""),
        (KeyError("defect"), "KeyError: 'defect'", None, ""),
        (TwoArgumentsError("a.jsonl", "is cut"), "is cut", None, "a.jsonl"),
    ],
)
def test_what_is_told_of_errors(error: Exception, message: str, number: int | None, bad_input: str) -> None:
    assert vars(FailedError.by(error)) == {"message": message, "errno": number, "bad_input": bad_input}
    assert str(FailedError.by(error)) == message


def test_errors_come_from_workers_whole(workers: Workers) -> None:
    error = workers.submit(0, Act("raise", OSError(28, "full"))).exception()
    assert isinstance(error, FailedError)
    assert (error.message, error.errno) == ("[Errno 28] full", 28)


def test_a_dead_worker_costs_its_task_and_is_replaced(workers: Workers) -> None:
    dying, busy = workers.submit(0, Act("die", None)), workers.submit(1, Act("sleep", 1.0))
    assert workers.wait([dying], lambda _: None) == {dying}
    assert str(FailedError.by(dying.exception() or KeyError())).startswith(
        "its worker process died, most likely"
    )
    assert busy.result() == 1.0
    assert list(in_order(workers, [Act("recipe", None) for _ in range(4)])) == ["recipe"] * 4


def die_at(place: int) -> None:
    for number in range(place + 1):
        work_on(number)
    os._exit(3)


@pytest.mark.parametrize("place", [0, 2])
def test_a_process_of_its_own_that_dies_names_what_it_read(place: int) -> None:
    names = ["tokenizer.model", "a.jsonl", "b.jsonl"]
    with pytest.raises(ValueError, match=f"^{names[place]}: its worker process died"):
        in_a_process_of_its_own(die_at, place, places=names)


class BadStart:
    """A recipe that no worker survives."""

    def __setstate__(self, state: object) -> None:
        os._exit(3)

    def __getstate__(self) -> object:
        return True


def test_workers_that_cannot_start_end_the_run() -> None:
    tasks = [Act("echo", number) for number in range(20)]
    with Workers(2, BadStart()) as workers, Progress("", "", 20, False) as progress:
        failures = run_units(BadStart(), workers, cast(Any, tasks), lambda _: None, progress)
    assert 3 <= len(failures) <= 4
    assert str(failures[0]).startswith("a.jsonl: its worker process died, most likely for want of memory")


class InterruptedStart:
    """A recipe that comes together with a Ctrl-C, long before its worker can say what to do of one."""

    def __setstate__(self, state: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def __getstate__(self) -> object:
        return True


def test_ctrl_c_does_not_disturb_a_worker_that_is_starting(capfd: pytest.CaptureFixture[str]) -> None:
    with Workers(1, InterruptedStart()) as workers:
        assert workers.submit(0, Act("echo", 3)).result() == 3
        # The parent makes of one what it always does.
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def children(process: int) -> list[psutil.Process]:
    found = psutil.Process(process).children()
    return [child for child in found if "spawn_main" in " ".join(child.cmdline())]


def test_leaving_by_an_exception_ends_busy_workers(tmp_path: Path) -> None:
    before, begin = set(children(os.getpid())), time.monotonic()
    with pytest.raises(KeyError), Workers(2, None) as workers:  # noqa: PT012
        futures = [workers.submit(number, Act("sleep", 60)) for number in range(2)]
        wait_until(lambda: all(future.running() for future in futures))
        assert len(set(children(os.getpid())) - before) == 2
        raise KeyError
    assert set(children(os.getpid())) <= before
    assert time.monotonic() - begin < 30


def test_nothing_stays_open(workers: Workers) -> None:
    """Also while somebody keeps what has ended."""
    kept: list[Workers] = []
    for _ in range(2):
        before = len(os.listdir("/proc/self/fd"))
        with Workers(1, "recipe") as found:
            assert found.submit(0, Act("recipe", None)).result() == "recipe"
        kept.append(found)
    assert len(os.listdir("/proc/self/fd")) == before


IDLE = """
import time
from megatron_iiet.data.preprocess.work import Workers
from tests.data.test_preprocess_work import Act
if __name__ == "__main__":
    with Workers(2, None) as workers:
        for number in range(2):
            workers.submit(number, Act("echo", 1)).result()
        print("ready", flush=True)
        time.sleep(60)
"""


def test_idle_workers_die_with_their_parent(tmp_path: Path) -> None:
    (script := tmp_path / "idle.py").write_text(IDLE)
    process = subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(worker.is_running() for worker in workers), 20)
