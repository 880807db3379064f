"""Worker processes: order, large messages, failures, death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest

from megatron_iiet.data.preprocess.pool import (
    Done,
    Failed,
    Pool,
    Reported,
    StartError,
    _manner_of_death,
    _Worker,
)
from megatron_iiet.data.preprocess.workshop import TaskFailedError, _in_order
from tests.data.preprocess_runs import ENVIRONMENT, ROOT, wait_until


@dataclass(frozen=True)
class Act:
    """A task that says what to do."""

    what: str
    value: Any

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
        return value


class BadStart:
    """A recipe that no worker survives."""

    def __setstate__(self, state: object) -> None:
        os._exit(3)

    def __getstate__(self) -> object:
        return True


def events_of(pool: Pool, count: int) -> list[Done | Failed]:
    """That many results, whatever else comes between them."""
    events: list[Done | Failed] = []
    while len(events) < count:
        events += [event for event in pool.wait(30) if not isinstance(event, Reported)]
    return events


@pytest.mark.slow
def test_results_come_in_order() -> None:
    with Pool(3, None) as pool:
        tasks = [Act("sleep", 0.001 * (number * 7 % 11)) for number in range(60)]
        assert list(_in_order(pool, lambda _: None, tasks)) == [task.value for task in tasks]


@pytest.mark.slow
def test_messages_larger_than_a_pipe_block_nobody() -> None:
    with Pool(1, None) as pool:
        contents = [bytes([number]) * 5_000_000 for number in range(6)]
        assert (
            list(_in_order(pool, lambda _: None, (Act("echo", content) for content in contents))) == contents
        )


@pytest.mark.slow
def test_reports() -> None:
    numbers: list[int] = []
    with Pool(2, None) as pool:
        list(_in_order(pool, numbers.append, [Act("report", number) for number in range(9)]))
    assert sorted(numbers) == list(range(9))


@pytest.mark.slow
def test_failures_leave_the_pool_usable() -> None:
    tasks = [
        Act("echo", 1),
        Act("raise", ValueError("a sentence")),
        Act("raise", ValueError("another")),
        Act("echo", 2),
    ]
    with Pool(2, None) as pool:
        results = _in_order(pool, lambda _: None, tasks)
        assert next(results) == 1
        with pytest.raises(TaskFailedError, match="a sentence"):
            next(results)
        # Failures that are left over belong to what failed, not to what follows.
        assert list(_in_order(pool, lambda _: None, [Act("echo", number) for number in range(20)])) == list(
            range(20)
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "message", "number"),
    [
        (ValueError("a sentence."), "a sentence.", None),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device", 28),
        (MemoryError(), "out of memory; lower --workers.", None),
        (KeyError("defect"), "KeyError: 'defect'", None),
    ],
)
def test_what_is_told_of_errors(error: Exception, message: str, number: int | None) -> None:
    with Pool(1, None) as pool:
        ticket = pool.submit(Act("raise", error))
        assert events_of(pool, 1) == [Failed(ticket, message, number)]


def test_a_task_goes_to_the_worker_with_the_fewest() -> None:
    sent: list[str] = []
    pool = Pool(0, None)
    for name, tickets in (("a", [90, 91]), ("b", [92]), ("c", [93, 94])):
        connection = SimpleNamespace(send=lambda message, name=name: sent.append(name))
        pool._workers.append(_Worker(cast(Any, None), cast(Any, connection), tickets=tickets))
    assert [pool.submit(None) for _ in range(3)] == [0, 1, 2]
    assert sent == ["b", "a", "b"]
    assert pool.free(3)
    assert not pool.free(2)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (3, "exit code 3"),
        (-15, "killed by SIGTERM"),
        (-9, "killed by SIGKILL, most likely for want of memory: lower --workers"),
    ],
)
def test_how_a_worker_died(code: int, said: str) -> None:
    assert _manner_of_death(code) == said


@pytest.mark.slow
def test_a_dead_worker_is_replaced() -> None:
    with Pool(2, None) as pool:
        dying = pool.submit(Act("die", None))
        busy = pool.submit(Act("sleep", 1.0))
        first, second = events_of(pool, 2)
        assert first == Failed(
            dying,
            "its worker process died (killed by SIGKILL, most likely for want of memory: lower --workers).",
        )
        assert second == Done(busy, 1.0)
        for _ in range(4):
            pool.submit(Act("sleep", 0.2))
        assert len(events_of(pool, 4)) == 4
        assert len(pool) == 2


@pytest.mark.slow
def test_workers_that_cannot_start() -> None:
    with Pool(2, BadStart()) as pool:
        pool.submit(Act("echo", 1))
        with pytest.raises(StartError, match=r"died while starting \(exit code 3\)"):
            pool.wait()


class InterruptedStart:
    """A recipe that comes together with a Ctrl-C, long before its worker can say what to do of one."""

    def __setstate__(self, state: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def __getstate__(self) -> object:
        return True


@pytest.mark.slow
def test_ctrl_c_does_not_disturb_a_worker_that_is_starting(capfd: pytest.CaptureFixture[str]) -> None:
    with Pool(1, InterruptedStart()) as pool:
        pool.submit(Act("echo", 3))
        assert events_of(pool, 1) == [Done(0, 3)]
        # The parent makes of one what it always does.
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_leaving_by_an_exception_ends_busy_workers() -> None:
    def children() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]

    begin = time.monotonic()
    with pytest.raises(KeyError), Pool(2, None) as pool:  # noqa: PT012
        assert len(children()) == 2
        pool.submit(Act("sleep", 60))
        raise KeyError
    assert children() == []
    assert time.monotonic() - begin < 30


IDLE = """
import time
from megatron_iiet.data.preprocess.pool import Pool
from tests.data.test_preprocess_pool import Act
if __name__ == "__main__":
    with Pool(2, None) as pool:
        pool.submit(Act("echo", 1)); pool.wait()
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
def test_idle_workers_die_with_their_parent(tmp_path: Path) -> None:
    (script := tmp_path / "idle.py").write_text(IDLE)
    process = subprocess.Popen(
        [sys.executable, script], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    workers = [
        child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    process.kill()
    process.communicate()
    wait_until(lambda: not any(worker.is_running() for worker in workers), 20)
