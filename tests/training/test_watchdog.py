"""What a rank's watchdog tells the others and hears of them, and how it ends a run: two of them in one
process, whose notes are exchanged when a test says so."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch.distributed as dist

from megatron_iiet.config.timeouts import Timeouts
from megatron_iiet.training.judge import Pulse, Verdict
from megatron_iiet.training.progress import Activity, Progress
from megatron_iiet.training.watchdog import Notes, Watchdog, describe_silent, position
from tests.training.bare_run import alone

NEVER = 3600.0  # seconds between beats: what a test does not ask for does not come to pass


def until(fulfilled: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not fulfilled():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.002)


class Pair:
    """The watchdogs of the main rank and of another, and what they left with."""

    def __init__(self, folder: Path) -> None:
        self.store, self.folder, self.left = dist.HashStore(), folder, list[int]()
        self.progress = Progress(Timeouts(start=50, step=10, save=70))
        self.main, self.other = (self.of_rank(rank) for rank in range(2))

    def of_rank(self, rank: int) -> Watchdog:
        context = replace(alone(2), rank=rank, store=self.store)
        return Watchdog(context, self.progress, self.folder, beat_seconds=NEVER, leave=self.left.append)

    def notes(self) -> dict[int, dict[str, Any]]:
        return Notes(self.store, 2).read_all()

    def exchange(self, dog: Watchdog) -> None:
        """As at its next beat."""
        dog._now.set()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(tmp_path)
    yield made
    for dog in (made.main, made.other):
        dog.close()


def test_pulses_and_verdicts_are_exchanged(pair: Pair) -> None:
    """A rank is known from its start on; the main one hears of all, the others of it and its verdict."""
    assert {note["pulse"]["pid"] for note in pair.notes().values()} == {os.getpid()}
    assert pair.notes()[0]["verdict"] is None
    assert "verdict" not in pair.notes()[1], "only the main rank judges"
    pair.progress.begin(Activity.STEP, 7)
    pair.other._own = pair.other._look_at_self(3.0)
    pair.exchange(pair.other)
    until(lambda: pair.notes()[1]["pulse"]["beat"] == 1)
    pair.exchange(pair.main)
    until(lambda: pair.main._pulses)
    assert set(pair.main._pulses) == {0, 1}
    heard = pair.main._pulses[1]
    assert heard == pair.other._own
    assert (heard.activity, heard.step, heard.count, heard.start > 0) == ("step", 7, 1, True)

    pair.main._verdict = Verdict("rank 1 is stopped", (heard,), "step_7")
    pair.exchange(pair.main)
    until(lambda: pair.notes()[0]["verdict"])
    pair.exchange(pair.other)
    until(lambda: pair.other._verdict)
    assert pair.other._pulses == {0: pair.main._own}
    assert pair.other._judgement(4.0) == pair.other._verdict == pair.main._verdict


class SlowStore(dist.Store):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.answer = Event(), Event()
        self.calls = 0

    def clone(self) -> SlowStore:
        return self

    def set_timeout(self, timeout: timedelta) -> None: ...

    def set(self, key: str, value: str) -> None:
        self.calls += 1
        if self.calls > 1:  # the first one is by the thread that starts the watchdog
            self.asked.set()
            self.answer.wait(30)

    def get(self, key: str) -> bytes:
        return b""


def test_no_thread_talks_to_the_store_once_it_is_closed(tmp_path: Path) -> None:
    """One that came back from torch while the interpreter ends would abort the process."""
    store = SlowStore()
    context = replace(alone(2), rank=1, store=store)
    dog = Watchdog(context, Progress(Timeouts()), tmp_path, beat_seconds=NEVER)
    dog._now.set()
    assert store.asked.wait(30)
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(dog.close)
        until(dog._over.is_set)
        assert dog._exchanging is not None
        assert dog._exchanging.is_alive()
        store.answer.set()
        closing.result()
    assert not dog._exchanging.is_alive()
    assert store.calls == 2
    idle = Watchdog(context, Progress(Timeouts()), tmp_path, beat_seconds=NEVER)
    idle.close()
    assert store.calls == 3, "the note of its start"


def test_the_collectives_of_a_rank_that_is_late_are_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """From half of the bound on, counted from when it last got on."""
    monkeypatch.setattr("megatron_iiet.training.watchdog.collectives_begun", lambda: {"0 world": 3})
    dog = pair.main
    pair.progress.begin(Activity.STEP, 7)
    for now, told in ((100.0, {}), (104.9, {}), (105.0, {"0 world": 3})):
        dog._own = dog._look_at_self(now)
        assert dog._own.collectives == told, now
    pair.progress.begin(Activity.STEP, 8)
    assert dog._look_at_self(106.0).collectives == {}


def test_a_main_rank_without_a_sign_of_life_is_judged_by_the_others(pair: Pair) -> None:
    dog, pulse = pair.other, Pulse("host0", 12, 0, beat=3, step=7)
    assert dog._judgement(0.0) is None, "nothing has been heard yet"
    dog._beat_seconds, dog._pulses = 2.0, {0: pulse}
    assert dog._judgement(100.0) is None
    assert dog._judgement(155.9) is None, "a start may be silent as long as it may take, and three beats"
    found = dog._judgement(156.0)
    assert found is not None
    assert found.sentence == (
        "rank 0 (process 12 on host0) gave no sign of life for 56 s: it is stopped, or its host is gone "
        "(the bound is 50 s)"
    )
    assert (found.silent, found.folder) == ((pulse,), "step_00000007_of_process_12")
    pair.progress.begin(Activity.STEP, 8)
    assert dog._judgement(115.9) is None
    assert "for 16 s" in str(dog._judgement(116.0)), "in a step by its bound"
    dog._lost_at = 101.0
    assert dog._judgement(115.9) is None
    assert "closed its connections and is gone" in str(dog._judgement(116.0))


class Exchanged(Notes):
    """Of a store that is there or gone, at the last exchange of a watchdog."""

    def __init__(self, dog: Watchdog, store: dist.Store, gone: bool) -> None:
        super().__init__(store, 2)
        self._dog, self._gone = dog, gone
        dog._over.clear()
        dog._now.set()

    def write(self, rank: int, note: dict[str, Any]) -> None:
        self._dog._over.set()
        if self._gone:
            raise dist.DistNetworkError("connection reset")


def test_since_when_a_store_is_gone(pair: Pair) -> None:
    dog = pair.other
    dog.close()
    for seconds, gone, lost_at in ((5.0, True, 5.0), (9.0, True, 5.0), (9.0, False, None)):
        dog._clock.seconds = seconds
        dog._exchange(Exchanged(dog, pair.store, gone))
        assert dog._lost_at == lost_at


def test_the_end_of_a_run_that_hangs(pair: Pair, capfd: pytest.CaptureFixture[str]) -> None:
    """The main rank says why, both write what they were at, and the main one goes last."""
    pair.progress.begin(Activity.STEP, 7)
    for dog in (pair.main, pair.other):
        dog._own, dog._beat_seconds = dog._look_at_self(1.0), 0.0
    silent = Pulse("elsewhere", 12, 0, place="plain.py:9 (f)")
    pair.other._verdict = verdict = Verdict("rank 2 is stopped", (silent,), "step_7")
    pair.other._end(verdict)
    assert pair.left == [1]
    until(lambda: pair.notes()[1]["pulse"]["ended"])
    pair.main._end(verdict)
    assert pair.left == [1, 1]
    until(lambda: pair.notes()[0]["verdict"])
    assert capfd.readouterr().err == (
        f"rank 2 is stopped; the run ends, its ranks' stacks and last collectives are in "
        f"{pair.folder / 'hangs' / 'step_7'}, and the same command goes on from the newest checkpoint\n"
    )
    for rank in range(2):
        lines = (pair.folder / "hangs/step_7" / f"rank_{rank:05d}.txt").read_text().splitlines()
        assert lines[0] == "rank 2 is stopped"
        assert lines[2].startswith(f"rank {rank}, process {os.getpid()} on ")
        assert lines[2].endswith(", step of step 7")
        assert lines[3] == "silent: process 12 on elsewhere, last heard at plain.py:9 (f)"
        assert lines[5] == "last collectives begun, the newest last"
        assert any("Thread 0x" in line for line in lines[7:]), "the stacks of all threads"


def test_what_the_kernel_says_of_a_silent_process() -> None:
    own = Pulse("here", os.getpid(), 1, place="plain.py:9 (f)")
    assert describe_silent(own, "here").endswith("last heard at plain.py:9 (f)\n"), "its id is used again"


def test_where_the_main_thread_is() -> None:
    """Outside of libraries, and whether any thread is in a collective."""
    with ThreadPoolExecutor() as pool:
        place, waits = pool.submit(position).result()
    assert re.fullmatch(r"test_watchdog\.py:\d+ \(test_where_the_main_thread_is\)", place)
    assert not waits
